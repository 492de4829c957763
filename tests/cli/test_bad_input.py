"""Bad input is rejected before any work: a one-line error, exit code 2, no files."""

import errno
import gzip
import http.server
import threading
from pathlib import Path

import pytest
import torch
from command import SMALL

from rwkv_pl import RWKV4, RWKV4Config
from rwkv_pl.compose import check_config, compose
from rwkv_pl.errors import UserError

CASES = {
    # unknown keys, with the closest match
    "model.n_layr=3": "did you mean n_layer?",
    "optm.lr=3": "did you mean optim?",
    "foo=1": "foo is not a setting",
    "trainer.max_step=3": "did you mean max_steps?",
    "schedule.decay_steps=5": "schedule.decay_steps is not a setting",
    "schedule=cosine schedule.decay_share=0.1": "schedule.decay_share is not a setting; did you mean decay_steps?",
    "schedule=wsd schedule.decay_share=0": "schedule.decay_share must be above 0 and at most 1, got 0.0",
    "schedule=wsd schedule.decay_share=null": "schedule.decay_share is missing; it belongs to schedule=wsd",
    "schedule=wsd schedule.warmup_steps=4": "schedule.warmup_steps=4 must be below the run's 4 steps",
    "schedule.name=wsd": "schedule.decay_share is missing; it belongs to schedule=wsd",
    "schedule.name=wds": "schedule.name must be one of constant, cosine, linear, wsd, exponential, got 'wds'",
    "schedule=wds": "schedule=wds does not exist",
    "optim.momentum=0.9": "optim.momentum is not a setting",
    "optim=sgd optim.momentum=fast": "optim.momentum must be a number, got 'fast'",
    "optim=sgd optim.betas=[0.9,0.99]": "optim.betas is not a setting",
    "optim.own={momentum:0.9}": "optim.own is not a setting",
    "callbacks.last.every=3": "callbacks.last.every is not a setting",
    "callbacks.ema.decay=0.5": "is not a setting; choose its file too: 'callbacks=[best,last,ema]'",
    "logger.wandb.project=x": "is not a setting; choose its file too: 'logger=[tensorboard,wandb]'",
    "logger.tensorboard.comment=x": "another argument of its class needs your own file with that key, "
    "mine/logger/NAME.yaml: --config-dir mine logger=NAME",
    "model.n_layer.x=3": "model.n_layer is a value",
    # types
    "optim.lr=fast": "optim.lr must be a number, got 'fast'",
    "model.n_layer=abc": "model.n_layer must be a whole number, got 'abc'",
    "model.n_layer=2.5": "model.n_layer must be a whole number, got 2.5",
    "model.n_layer=true": "model.n_layer",
    "model.n_layer=null": "model.n_layer must be a whole number, got None",
    "optim.betas=[0.9,x]": "optim.betas[1] must be a number, got 'x'",
    "optim.betas=0.9": "optim.betas must be a list, got 0.9",
    "weights=[a]": "weights must be a string, got ['a']",
    "trainer.max_steps=abc": "trainer.max_steps must be a whole number, got 'abc'",
    "trainer.max_steps=true": "trainer.max_steps must be a whole number, got True",
    "trainer.val_check_interval=0.5": "trainer.val_check_interval must be a whole number",
    "trainer.deterministic=3": "trainer.deterministic must be true or false",
    "trainer.max_time=3": "trainer.max_time must be days:hours:minutes:seconds, as in 00:08:00:00 for eight "
    "hours, got '3'",
    "trainer.max_time={hour:8}": "trainer.max_time must be days:hours:minutes:seconds",
    "trainer.max_time={hours:x}": "trainer.max_time must be days:hours:minutes:seconds",
    "trainer.max_time=8h": "days:hours:minutes:seconds, as in 00:08:00:00 for eight hours, got '8h'",
    "trainer={a:1}": "trainer",
    "callbacks.last.every_n_train_steps=abc": "callbacks.last.every_n_train_steps must be a whole number, got 'abc'",
    "callbacks.best.mode=3": "callbacks.best.mode must be a string",
    "logger.tensorboard.name=[3]": "logger.tensorboard.name must be a string",
    "seed=x": "seed",
    "data=3": "data=3 does not exist; available: ",
    # ranges
    "optim.lr=nan": "optim.lr must be a finite number above 0, got nan",
    "optim.lr=0": "optim.lr must be a finite number above 0, got 0.0",
    "optim.lr=inf": "optim.lr must be a finite number above 0, got inf",
    "optim.betas=[0.9,1]": "optim.betas",
    "optim.eps=-1": "optim.eps",
    "optim.betas=[]": "optim.betas must be numbers from 0 to below 1",
    "optim.betas=[0.9]": "optim.betas must be 2 numbers for torch.optim.AdamW",
    "skip_nonfinite=-1": "skip_nonfinite must be at least 0, got -1",
    "compile=perhaps": "compile must be true or false, got 'perhaps'",
    "activation_checkpointing=null": "activation_checkpointing must be true or false, got None",
    "activation_checkpointing=3": "activation_checkpointing must be true or false, got 3",
    "checkpoints=3": "checkpoints must be a mapping, got 3",
    "checkpoints=null": "checkpoints must be a mapping, got None",
    "checkpoints.shard=true": "checkpoints.shard is not a setting; did you mean sharded?",
    "checkpoints.sharded=3": "checkpoints.sharded must be true or false, got 3",
    "checkpoints.sharded=true": "checkpoints.sharded=true needs trainer=fsdp, got trainer.strategy=auto: give "
    "checkpoints.sharded=false",
    "tf32=0.5": "tf32 must be true or false, got 0.5",
    "loss_chunk_len=0": "loss_chunk_len must be at least 1, got 0",
    "loss_chunk_len=half": "loss_chunk_len must be a whole number, got 'half'",
    "trainer.precision=16": "trainer.precision=16 needs a GPU; use trainer.precision=auto on a CPU",
    "trainer.precision=16-mixed": "trainer.precision=16-mixed needs a GPU; use trainer.precision=auto on a CPU",
    "trainer.precision=16-true": "trainer.precision=16-true is not supported",
    "callbacks.last.dirpath=elsewhere": "callbacks.last.dirpath must be checkpoints",
    "callbacks.best.dirpath=/elsewhere": "callbacks.best.dirpath must be checkpoints",
    "optim.weight_decay=-1": "optim.weight_decay must be at least 0",
    "data.ctx_len=0": "data.ctx_len must be at least 1, got 0",
    "data.batch_size=-1": "data.batch_size must be at least 1, got -1",
    "data.vocab=word": "data.vocab must be one of byte, char, 20b, world, unknown, got 'word'",
    "data.split=[1,2]": "data.split",
    "data.split=[0,1,0]": "data.split must be three fractions (train, val, test) above 0",
    "model.n_embd=0": "model.n_embd must be at least 1, got 0",
    "model.dropout=1": "model.dropout must be from 0 to below 1, got 1.0",
    "model.name=rwkv9": "model.name must be one of rwkv4",
    "schedule.warmup_steps=-1": "schedule.warmup_steps must be at least 0",
    "trainer.max_steps=0": "trainer.max_steps must be at least 1, or -1 for no limit",
    "trainer.val_check_interval=0": "trainer.val_check_interval must be at least 1",
    "trainer.accumulate_grad_batches=0": "trainer.accumulate_grad_batches must be at least 1",
    "trainer.gradient_clip_val=nan": "trainer.gradient_clip_val must be a finite number",
    "trainer.precision=13": "trainer.precision must be one of auto, 32-true, 64-true, bf16-mixed, bf16-true, 16-mixed, "
    "got 13",
    "trainer.precision=8-bit": "trainer.precision must be one of auto, 32-true",
    "trainer.accelerator=abacus": "trainer.accelerator must be one of auto, cpu, gpu, cuda, mps, got 'abacus'",
    "trainer.strategy=dpp": "trainer.strategy=dpp: Lightning refuses it: You selected an invalid strategy name",
    "trainer.devices=0": "trainer.devices=0: Lightning refuses it: ",
    "trainer.gradient_clip_algorithm=x": "trainer.gradient_clip_algorithm=x: Lightning refuses it: ",
    "callbacks.best.mode=avg": "callbacks.best refuses its settings",
    "callbacks.best.mode=max": "callbacks.best.mode must be min, got max",
    "callbacks=[default,early_stopping] callbacks.early_stopping.mode=max": "early_stopping.mode must be min, got max",
    "callbacks.best.filename=lowest": "filename=lowest must contain {step}",
    "callbacks.best.save_top_k=0": "save_top_k that is not 0",
    "kernel=magic": "kernel must be one of auto, compiled, scan, recurrence, got 'magic'",
    "seed=-1": "seed must be from 0",
    "trainer.limit_val_batches=5.0": "trainer.limit_val_batches must be a fraction from 0.0 to 1.0",
    "trainer.limit_val_batches=0.0001": "less than one validation batch",
    "trainer.min_steps=5": "trainer.min_steps is not supported",
    "callbacks.last.every_n_train_steps=0": "callbacks.last refuses its settings",
    "callbacks.last.dirpath=null": "callbacks.last.dirpath must be a string, got None",
    "callbacks.best.monitor=val/nosuch": "callbacks.best.monitor must be one of val/bits_per_byte, val/loss",
    "callbacks.best=null": "callbacks.best must be a mapping, got None",
    "logger.tensorboard=null": "logger.tensorboard must be a mapping, got None",
    "trainer=null": "trainer takes the name of a file",
    "callbacks=null": "callbacks takes the name of a file",
    "optim.lr_scale={time_decay:fast}": "optim.lr_scale.time_decay must be a number",
    "optim.lr_scale=3": "optim.lr_scale",
    # syntax
    "+foo=1": "cannot add a key",
    "+model.foo=1": "cannot add a key",
    "++optim.lr=1": "drop the ++",
    "+optim.momentum=0.9": "your own file with that key, mine/optim/NAME.yaml: --config-dir mine optim=NAME",
    "+optim.momentum=0.9 resume=run": "drop the + if it exists; another argument of its class needs a new run",
    "+callbacks=ema": "to add one, list them all: 'callbacks=[default,ema]'",
    "+logger=wandb": "to add one, list them all: 'logger=[tensorboard,wandb]'",
    "~trainer.max_steps": "cannot remove a key",
    "~model": "cannot remove a key",
    "data.path='unclosed": "can't be parsed as key=value",
    "data.field=~/x": "can't be parsed as key=value: write the home folder instead of ~",
    "lr": "lr needs a value: write lr=VALUE",
    "corpus.txt": "can't be parsed as key=value",
    "optim.lr=1e-3,1e-4": "add -m",
    "optim.lr=choice(1e-3,1e-4)": "add -m to run them all\n",
    "callbacks=default,ema": "add -m to run them all, or for a list write 'callbacks=[default,ema]'",
    "--bogus": "--bogus",
    "--config-dir=nosuch": "nosuch is not a folder",
    "--config-name=x": "--config-dir",
    "hydra.searchpath=[file://hollow]": "hydra.searchpath is not used: give your folder as --config-dir FOLDER",
    "--config-dir=hollow hydra.searchpath=[hollow] --cfg job": "hydra.searchpath is not used",
    # choices and files
    "data=nosuch": "data=nosuch does not exist; available: binidx, enwik8, mix, stdlib, text, tokens",
    "experiment=nosuch": "experiment=nosuch does not exist",
    "experiment=null": "experiment=null: experiment takes the name of a file",
    "experiment=[null]": "experiment takes the name of a file",
    "-m experiment=null,debug": "experiment takes the name of a file",
    "-m hydra.sweep.subdir=a,b seed=1": "hydra.sweep.subdir=a,b: Hydra's own settings take one value",
    "-m hydra.launcher=null seed=1": "hydra.launcher and hydra.sweeper can't be null",
    "-m hydra.sweeper=null seed=1": "can't be null",
    "callbacks=[default,nosuch]": "callbacks=nosuch does not exist; available: best, default, device_stats, "
    "early_stopping, ema, last, sample_text, weight_averaging",
    "data.path=missing.txt": "missing.txt",
    "data.path=null": "data.path is missing",
    "data.path=empty.txt": "empty.txt",
    "data.path=hollow": "hollow is a folder without files",
    "data.path='*.md'": "no file matches",
    "data.path=broken.txt.gz": "broken.txt.gz is corrupt or truncated",
    "data.path=rows.jsonl": "rows.jsonl, line 2 has no field text (its fields: words)",
    "data.path=rows.jsonl data.field=words": "rows.jsonl, line 3 is not JSON",
    "data.field=null": "data.field",
    "data.val_path=missing.txt": "data.val_path=",
    "data.val_path=empty.txt": "data.val_path names 1 file(s) without any text",
    "data.val_path=''": "data.val_path is empty",
    "data.val_path=corpus.txt": "none is left to train on",
    "data.ctx_len=1000000": "one window of data.ctx_len=1000000",
    "weights=nosuch.pth": "nosuch.pth",
    "weights=dot.pth": "is not a checkpoint that can be read safely",
    "weights=words.pth": "holds more than weights: blocks.0.att.key.bias is a str, not a tensor",
    "weights=flat.pth": "has no emb.weight of (vocabulary, channels)",
    "weights=hollow.ckpt": "is not a whole checkpoint",
    "hydra.run.dir=${nosuch}": "nosuch",
    "hydra/job_logging=nosuch": "hydra/job_logging=nosuch does not exist",
    "trainer.strategy=ddp_spawn trainer.devices=2": "trainer.strategy=ddp_spawn is not supported",
    "trainer.strategy=ddp_fork": "use ddp",
    "trainer.strategy=DDP_SPAWN": "use ddp",
    "trainer.strategy=ddp_notebook_find_unused_parameters_true": "use ddp",
    "trainer.deterministic=yes": "trainer.deterministic, if neither true nor false, must be one of warn, got 'yes'",
    "callbacks=[default,device_stats] logger=none": "callbacks.device_stats needs a logger: leave out logger=none",
    "hydra.mode=MULTIRUN": "hydra.mode=MULTIRUN is not supported, -m starts a sweep: leave it out",
    "hydra.output_subdir=null": "hydra.output_subdir=None is not supported",
    "hydra.job.chdir=true": "hydra.job.chdir=True is not supported",
    "hydra.job.name=mine": "the log of a run is train.log",
    "hydra.job.env_copy=[NOSUCH]": "hydra.job.env_copy names 'NOSUCH', an environment variable that is not set",
    "hydra.job_logging.root.level=LOUD": "hydra.job_logging is invalid: Unknown level: 'LOUD'",
    "hydra.verbose=3": "hydra.verbose must be true, false or a list of loggers, got 3",
    "hydra.overrides.task=['seed=1']": "hydra.overrides cannot be set",
    "hydra.sweep.dir=there": "hydra.sweep.dir=there has no effect without -m: a run's is hydra.run.dir=FOLDER",
    "weights=corpus.txt": "is not a checkpoint that can be read safely",
    "weights=empty.txt": "empty.txt",
    "weights=.": "is not a run folder with weights",
    "weights=tensors.pth": "holds no RWKV weights",
    "weights=list.pth": "holds no weights",
    "weights=larger.pth": "has 3 x 16, the config has 2 x 16: give model.n_layer=3 model.n_embd=16 too",
    "weights=partial.pth": "does not hold a whole rwkv4 model",
    "weights=rwkv5.pth": "holds a rwkv5 model; supported: rwkv4",
    "resume=nosuch": "is not a run folder",
    # settings of other groups
    "trainer.limit_train_batches=5": "trainer.limit_train_batches is not supported",
    "trainer.fast_dev_run=true": "use trainer.max_steps=1",
    "trainer.accumulate_grad_batches=4": "data.batch_size=6",
    "trainer.max_epochs=-1 trainer.max_steps=-1": "the run has no end",
    "schedule=cosine trainer.max_steps=-1 trainer.max_epochs=-1 trainer.max_time=00:00:01:00": "needs a length",
    "schedule=cosine schedule.warmup_steps=9": "set schedule.warmup_steps=0",
    "optim.lr_scale={time_decoy:2}": "optim.lr_scale.time_decoy matches no parameter",
    # classes
    "optim._target_=os.system": "optim._target_=os.system is not a trusted class: add plugins=[os] if",
    "optim._target_=torch.optim.optimizer.torch.hub.load": "trusted: torch.optim",
    "optim._target_=torch.optim.lr_scheduler": "is not a class of torch.optim",
    "optim._target_=torch.optim.Nosuch": "is not a class of torch.optim",
    "optim._target_=torch.optim.SGD": "has no argument betas",
    "callbacks.best._target_=builtins.eval": "callbacks.best._target_=builtins.eval is not a trusted class",
    "callbacks.best._target_=lightning.pytorch.callbacks.model_checkpoint.os.mkdir": "is not a trusted class",
    "callbacks.best.dirpath={_target_:os.getcwd}": "",
    "trainer.profiler={_target_:os.getcwd}": "",
    "logger.tensorboard._target_=lightning.pytorch.loggers.CSVLogger": "would delete metrics.csv",
    "logger.tensorboard._target_=lightning.pytorch.loggers.Logger": "logger.tensorboard refuses its settings",
    "logger.tensorboard._target_=os.mkdir": "logger.tensorboard._target_=os.mkdir is not a trusted class",
}


@pytest.fixture
def files(tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "hollow").mkdir()
    (tmp_path / "broken.txt.gz").write_bytes(gzip.compress(b"text" * 1000)[:-4])
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "words": "b"}\n{"words": "c"}\n{"words')
    torch.save({"a": torch.zeros(2)}, tmp_path / "tensors.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    weights = RWKV4(RWKV4Config(256, 3, 16)).state_dict()
    torch.save(weights, tmp_path / "larger.pth")
    torch.save(weights | {"blocks.0.att.time_faaaa": torch.zeros(2)}, tmp_path / "rwkv5.pth")
    torch.save(weights | {"blocks.0.att.key.bias": "text"}, tmp_path / "words.pth")
    torch.save(weights | {"emb.weight": torch.zeros(2)}, tmp_path / "flat.pth")
    torch.save({"rwkv_pl": {}, "state_dict": {}}, tmp_path / "hollow.ckpt")
    (tmp_path / "dot.pth").write_bytes(b".")
    del weights["blocks.1.att.key.weight"]
    torch.save(weights, tmp_path / "partial.pth")


# `make test` has the other cases of each kind of check.
SLOW = {
    "callbacks.last.every=3", "callbacks.best.mode=3", "logger.tensorboard.name=[3]",
    "callbacks.last.every_n_train_steps=abc", "model.n_layer=2.5", "model.n_layer=null", "trainer.max_steps=abc",
    "trainer.val_check_interval=0.5", "optim.lr=0", "optim.lr=inf", "optim.eps=-1", "skip_nonfinite=-1",
    "activation_checkpointing=null", "activation_checkpointing=3", "tf32=0.5", "loss_chunk_len=half",
    "checkpoints=3", "checkpoints=null", "checkpoints.shard=true", "checkpoints.sharded=3",
    "callbacks.best.dirpath=/elsewhere", "optim.weight_decay=-1", "data.batch_size=-1", "model.n_embd=0",
    "schedule.warmup_steps=-1", "trainer.val_check_interval=0", "trainer.accumulate_grad_batches=0",
    "callbacks.last.dirpath=null", "callbacks.best=null", "trainer=null", "optim.lr_scale=3", "+model.foo=1",
    "~trainer.max_steps", "data.val_path=missing.txt", "data.val_path=empty.txt", "weights=empty.txt",
    "weights=corpus.txt", "weights=list.pth", "weights=tensors.pth", "optim._target_=torch.optim.Nosuch",
    "callbacks.best._target_=builtins.eval", "logger.tensorboard._target_=os.mkdir", "data.vocab=word", "seed=x",
    "schedule=wsd schedule.decay_share=0", "optim=sgd optim.betas=[0.9,0.99]", "trainer.max_time=3",
    "trainer.max_time={hour:8}", "trainer.max_time={hours:x}", "trainer={a:1}", "optim.betas=0.9", "model.n_layer=true",
    "trainer.max_steps=true", "trainer.deterministic=3", "optim.betas=[0.9,1]", "optim.betas=[]", "compile=perhaps",
    "trainer.precision=16-mixed", "trainer.precision=8-bit", "model.dropout=1", "data.split=[0,1,0]",
    "callbacks=[default,early_stopping] callbacks.early_stopping.mode=max", "callbacks.best.save_top_k=0",
    "trainer.gradient_clip_val=nan", "trainer.devices=0", "trainer.gradient_clip_algorithm=x",
    "logger.tensorboard=null", "optim.lr_scale={time_decay:fast}", "+logger=wandb", "~model", "lr",
    "optim.lr=choice(1e-3,1e-4)", "experiment=[null]", "-m hydra.sweeper=null seed=1", "data.path='*.md'",
    "weights=dot.pth", "trainer.strategy=ddp_fork", "trainer.strategy=DDP_SPAWN",
    "trainer.strategy=ddp_notebook_find_unused_parameters_true", "hydra.job.chdir=true",
    "optim._target_=torch.optim.lr_scheduler", "trainer.profiler={_target_:os.getcwd}",
}  # fmt: skip
assert CASES.keys() > SLOW


@pytest.mark.parametrize(
    "arguments", [pytest.param(case, marks=pytest.mark.slow) if case in SLOW else case for case in CASES]
)
def test_bad_input_gives_one_line_exit_2_and_no_folder(train, files, tmp_path, arguments):
    before = sorted(tmp_path.rglob("*"))
    result = train(*SMALL, *arguments.split())
    assert result.code == 2
    assert result.err.count("\n") == 1, result.err
    assert result.err.startswith("rwkv-train: ")
    assert CASES[arguments] in result.err
    assert "Traceback" not in result.err + result.out
    assert sorted(tmp_path.rglob("*")) == before


def test_old_precision_name_gives_no_warning(train, recwarn):
    assert train(*SMALL, "trainer.precision=16").code == 2
    assert not [each for each in recwarn if "precision" in str(each.message)]


def test_text_without_path_gives_one_line_error(train, tmp_path):
    result = train("data=text")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "data.path is missing" in result.err


def test_path_without_data_is_not_taken_for_the_folder_of_enwik8(train, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    result = train("data.path=~/mine.txt")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert f"data.path={tmp_path / 'mine.txt'} does not exist: for your own text, add data=text" in result.err
    result = train("data.path=corpus.txt")
    assert "data.path=" in result.err and "for your own text, add data=text" in result.err


@pytest.mark.parametrize("text", [b"", b"too short"])
def test_too_short_text_gives_one_line_error(train, tmp_path, text):
    (tmp_path / "corpus.txt").write_bytes(text)
    result = train(*SMALL)
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert not (tmp_path / "outputs").exists()


def test_sweep_with_a_wrong_setting_in_every_job_is_rejected(train, tmp_path):
    result = train("-m", *SMALL, "optim.lr=1e-3,1e-4", "model.n_layr=3")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "did you mean n_layer?" in result.err
    assert not (tmp_path / "multirun").exists()


def test_output_folder_below_a_file_gives_one_line_error(train, tmp_path):
    result = train(*SMALL, "hydra.run.dir=corpus.txt/run")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "can't be created" in result.err


def test_unwritable_output_folder_gives_one_line_error(train, tmp_path, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    result = train(*SMALL)
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "can't be created (Permission denied)" in result.err


def test_failed_run_folder_removes_its_parents(train, tmp_path):
    result = train(*SMALL, f"hydra.run.dir=new/sub/{'x' * 300}")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert not (tmp_path / "new").exists()


def test_corrupt_download_gives_one_line_error_and_leaves_no_files(train, tmp_path):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        server.RequestHandlerClass.log_message = lambda *_: None
        before = sorted(tmp_path.rglob("*"))
        result = train("data=enwik8", f"data.url=http://127.0.0.1:{server.server_port}/corpus.txt")
        server.shutdown()
    assert (result.code, result.err.count("\n")) == (2, 1), result.err
    assert "is not the archive of enwik8" in result.err or "not the archive" in result.err
    assert sorted(tmp_path.rglob("*")) == before


def test_existing_run_folder_is_not_overwritten(train, tmp_path):
    assert train(*SMALL, "hydra.run.dir=run").code == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    result = train(*SMALL, "hydra.run.dir=run")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert f"resume={tmp_path / 'run'}" in result.err
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_truncated_checkpoint_gives_one_line_error(train, tmp_path):
    assert train(*SMALL, "hydra.run.dir=run").code == 0
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:1000])
    for argument in ("resume=run", f"weights={last}"):
        result = train(*(SMALL if argument.startswith("weights") else ()), argument)
        assert (result.code, result.err.count("\n")) == (2, 1)
        assert "last.ckpt is not a checkpoint that can be read safely" in result.err


def test_hostile_checkpoint_executes_no_code(train, tmp_path):
    class Hostile:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "owned",))

    torch.save({"emb.weight": Hostile()}, tmp_path / "hostile.pth")
    result = train(*SMALL, "weights=hostile.pth")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("mode: MULTIRUN", "hydra.mode=MULTIRUN is not supported"),
        ("callbacks: {x: {_target_: os.mkdir, path: executed}}", "hydra.callbacks={'x': {'_target_': 'os.mkdir'"),
        ("output_subdir: null", "hydra.output_subdir=None is not supported"),
        ("overrides: {task: [seed=1]}", "hydra.overrides cannot be set"),
    ],
)
@pytest.mark.parametrize("flags", [(), ("-m",)])
def test_setting_of_hydra_in_an_experiment_is_rejected(train, tmp_path, settings, message, flags):
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "x.yaml").write_text(f"# @package _global_\nhydra:\n  {settings}\n")
    before = sorted(tmp_path.rglob("*"))
    result = train(*flags, *SMALL, "--config-dir", "mine", "experiment=x")
    assert (result.code, result.err.count("\n")) == (2, 1), result.err
    assert message in result.err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("setting", ["hydra.run.dir=there", "hydra/job_logging=stdout", "hydra.mode=MULTIRUN"])
def test_setting_of_hydra_without_effect_in_a_sweep_is_rejected(train, tmp_path, setting):
    before = sorted(tmp_path.rglob("*"))
    result = train("-m", *SMALL, "seed=1,2", setting)
    assert (result.code, result.err.count("\n")) == (2, 1), result.err
    assert setting in result.err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("text", "expected"),
    [("12:00:00:00", "12:00:00:00"), ("1:30:00:00", "1:30:00:00"), ("'00:08:00:00'", "00:08:00:00"), ("300000", None)],
)
@pytest.mark.parametrize("group", ["experiment", "trainer"])
def test_max_time_in_a_file_is_days_hours_minutes_seconds(train, tmp_path, text, expected, group):
    head = {"experiment": "# @package _global_\ntrainer:\n  ", "trainer": "defaults: [default]\n"}[group]
    (tmp_path / "mine" / group).mkdir(parents=True)
    (tmp_path / "mine" / group / "long.yaml").write_text(f"{head}max_time: {text}\n")
    composed = compose([f"{group}=long"], str(tmp_path / "mine"))
    if expected is None:
        with pytest.raises(UserError, match=r"must be days:hours:minutes:seconds, .* got '300000'"):
            check_config(composed)
    else:
        assert check_config(composed).trainer["max_time"] == expected
