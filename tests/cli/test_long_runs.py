"""Problems of long runs: non-finite losses, a corpus that changes, a second start, untrusted files."""

import codecs
import errno
import os
import shutil
import time
from pathlib import Path

import forks
import psutil
import pytest
import torch
import yaml
from command import SMALL, copy_run, make_run
from systems import WINDOWS, replaces_mapped_files
from test_train import load_checkpoint, read_column, read_metrics

from rwkv_pl.errors import UserError
from rwkv_pl.runs.folder import locked
from rwkv_pl.sweeps.report import read_run
from rwkv_pl.targets import MOVED
from rwkv_pl.terminal import resume_command
from rwkv_pl.training import checkpoint_io, module
from rwkv_pl.training.callbacks.pending_validation import PendingValidation
from rwkv_pl.training.module import LitRWKV

EVERY = ("trainer.log_every_n_steps=1", "trainer.max_steps=8", "callbacks.last.every_n_train_steps=2")


@pytest.fixture(scope="module")
def run_of_eight_steps(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"), *EVERY)


@pytest.fixture
def run(run_of_eight_steps, tmp_path) -> Path:
    return copy_run(run_of_eight_steps, tmp_path)


@pytest.fixture
def make_nonfinite(monkeypatch):
    """make_nonfinite(3, 5): the third and fifth micro-batch have a NaN loss; factor=1e38: only an Inf gradient."""
    whole, step = module.l2wrap, LitRWKV.training_step

    def start_at(*calls: int, factor: float = float("nan")) -> None:
        count = 0

        def training_step(*arguments):
            nonlocal count
            count += 1
            return step(*arguments)

        def l2wrap(largest):
            pull = whole(largest)
            if count not in calls:
                return pull
            return pull * factor if factor != factor else pull * factor - (pull * (factor - 1)).detach()

        monkeypatch.setattr(LitRWKV, "training_step", training_step)
        monkeypatch.setattr(module, "l2wrap", l2wrap)

    return start_at


@pytest.mark.parametrize("factor", [float("nan"), 1e38])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_nonfinite_loss_or_gradient_stops_the_run_before_the_step(train, tmp_path, make_nonfinite, factor, accumulate):
    make_nonfinite(5 * accumulate, factor=factor)  # of batch 4, the fifth
    more = ("optim.lr=1e-2", f"trainer.accumulate_grad_batches={accumulate}", "hydra.run.dir=run")
    result = train(*SMALL, *EVERY, *more)
    assert (result.code, result.err.count("\n")) == (1, 1), result.err
    for part in ("of batch 4 is not finite", "loss ", "gradient norm ", "learning rate 0.01", "optimizer step 5"):
        assert part in result.err
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert f"the last checkpoint is {last} at step 4; to resume: {resume_command(tmp_path / 'run')}" in result.err
    assert all(value.isfinite().all() for value in load_checkpoint(tmp_path / "run")["state_dict"].values())
    assert [step for step, _ in read_column(tmp_path / "run", "train/loss")] == [1, 2, 3, 4]


def test_nonfinite_batches_can_be_skipped(train, tmp_path, make_nonfinite, monkeypatch):
    with monkeypatch.context() as then:
        make_nonfinite(3, 5)
        result = train(*SMALL, *EVERY, "skip_nonfinite=2", "trainer.max_steps=6", "hydra.run.dir=run")
        then.undo()
    assert result.code == 0, result.err
    assert "skipped, 2 of at most 2" in result.out
    weights = {}
    run = tmp_path / "run"
    assert load_checkpoint(run)["rwkv_pl"]["skipped"] == 2
    assert [value for _, value in read_column(run, "train/grad_norm")][2] == "nan"
    assert (run / "loss.png").stat().st_size > 0
    weights = load_checkpoint(run)["state_dict"]
    assert all(value.isfinite().all() for value in weights.values())
    steps = load_checkpoint(run)["optimizer_states"][0]["state"][0]["step"]
    assert steps == 4
    # The limit counts over the whole run, so the third batch exceeds it.
    make_nonfinite(1)
    result = train("resume=run", "trainer.max_steps=8")
    assert (result.code, result.err.count("\n")) == (1, 1), result.err
    assert "of batch 6 is not finite" in result.err


def test_gradient_norm_is_read_once_per_step(train, tmp_path, monkeypatch):
    calls = []
    whole = torch.nn.utils.get_total_norm
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", lambda *a, **k: calls.append(1) or whole(*a, **k))
    assert train(*SMALL, "trainer.accumulate_grad_batches=3", "trainer.max_steps=5").code == 0
    assert len(calls) == 5


def test_float16_loss_scaler_may_see_inf_gradients(train, tmp_path, make_nonfinite, monkeypatch):
    """The scaler searches for the largest scale: steps with Inf gradients are allowed, a NaN loss is not."""
    from lightning.pytorch.plugins import MixedPrecision

    from rwkv_pl.runs import build

    trainer = build.Trainer

    def scaled(**arguments):
        del arguments["precision"]
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
        arguments["plugins"] = [*arguments["plugins"], MixedPrecision("16-mixed", "cpu", scaler)]
        return trainer(**arguments)

    monkeypatch.setattr(build, "Trainer", scaled)
    make_nonfinite(3, factor=1e38)
    result = train(*SMALL, *EVERY, "hydra.run.dir=run")
    assert result.code == 0, result.err
    scaler = load_checkpoint(tmp_path / "run")["MixedPrecision"]
    assert scaler["scale"] == 1.0
    # The scaler's state is resumed too: the same bits in two parts.
    make_nonfinite(3, factor=1e38)
    assert train(*SMALL, *EVERY, "trainer.max_steps=4", "hydra.run.dir=parts").code == 0
    assert train("resume=parts", "trainer.max_steps=8").code == 0
    whole, parts = load_checkpoint(tmp_path / "run"), load_checkpoint(tmp_path / "parts")
    assert parts["MixedPrecision"] == scaler
    assert all(torch.equal(value, parts["state_dict"][name]) for name, value in whole["state_dict"].items())
    make_nonfinite(3)
    result = train(*SMALL, *EVERY, "hydra.run.dir=next")
    assert result.code == 1
    assert "the loss of batch 2 is not finite" in result.err


def test_loss_scaler_that_has_skipped_every_step(train, tmp_path, monkeypatch):
    from lightning.pytorch.plugins import MixedPrecision

    from rwkv_pl.runs import build

    trainer = build.Trainer

    def scaled(**arguments):
        del arguments["precision"]
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
        arguments["plugins"] = [*arguments["plugins"], MixedPrecision("16-mixed", "cpu", scaler)]
        return trainer(**arguments)

    monkeypatch.setattr(build, "Trainer", scaled)
    assert train(*SMALL, *EVERY, "trainer.max_steps=2", "hydra.run.dir=run").code == 0
    assert not load_checkpoint(tmp_path / "run")["optimizer_states"][0]["state"]
    result = train("resume=run", "trainer.max_steps=4")
    assert result.code == 0, result.err


@pytest.mark.parametrize("row", ["nan,,,,,,,,,,", "inf,1,,,,,,,,,", "3,inf,1,,,,,,,,", "3,96,1,,,,,,,,,surplus"])
def test_corrupt_metrics_file_is_reported(train, run, tmp_path, row):
    record = tmp_path / "run" / "metrics.csv"
    lines = record.read_text().splitlines(keepends=True)
    record.write_text("".join([*lines[:3], row + "\n", *lines[3:]]))
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    result = train("resume=run", "trainer.max_steps=9")
    assert (result.code, result.err.count("\n")) == (2, 1), result.err
    assert "metrics.csv is corrupt" in result.err and "move it away" in result.err
    after = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert after == before


def test_step_that_differs_from_the_loops_is_corruption(train, run, tmp_path):
    checkpoints = tmp_path / "run" / "checkpoints"
    for name in ("last.ckpt", "last.prev.ckpt", "best.ckpt"):
        content = torch.load(checkpoints / name, weights_only=True) | {"global_step": 3}
        (checkpoints / name).unlink()
        torch.save(content, checkpoints / name)
    result = train("resume=run", "trainer.max_steps=9")
    assert (result.code, result.err.count("\n")) == (2, 1), result.err
    assert "loop step 8, but global step 3" in result.err


@pytest.mark.parametrize("content", [{"rwkv_pl": 3}, {"rwkv_pl": None}, {}])
def test_unreadable_checkpoint_does_not_hide_the_latest_run(train, run_of_eight_steps, tmp_path, content):
    for name in ("a", "b"):
        run = tmp_path / "outputs" / "2026-01-01" / name
        run.parent.mkdir(parents=True, exist_ok=True)
        copy_run(run_of_eight_steps, tmp_path).rename(run)
    last = tmp_path / "outputs" / "2026-01-01" / "a" / "checkpoints" / "last.ckpt"
    last.with_name("last.prev.ckpt").replace(last)
    for result in (tmp_path / "outputs").rglob("result.json"):  # like killed runs
        result.unlink()
    torch.save(content, tmp_path / "outputs" / "2026-01-01" / "b" / "checkpoints" / "last.ckpt")
    result = train("resume=latest")
    assert result.err.count("\n") <= 1, result.err


@replaces_mapped_files
@pytest.mark.parametrize(
    ("change", "workers"),
    [
        ("shorter", 0),
        ("other", 1),
        ("gone", 0),
        ("touched", 0),
        *(pytest.param(*long, marks=pytest.mark.slow) for long in (("shorter", 1), ("other", 0), ("gone", 1))),
        pytest.param("touched", 1, marks=pytest.mark.slow),
    ],
)
def test_text_changed_during_a_run_is_reported(train, tmp_path, monkeypatch, change, workers):
    path, text = tmp_path / "corpus.txt", (tmp_path / "corpus.txt").read_bytes()
    count = 0
    whole = LitRWKV.training_step

    def training_step(self, batch, batch_idx):
        nonlocal count
        count += 1
        if count == 5:
            new = {"shorter": text[:-1], "other": text.replace(b"a", b"b"), "touched": text}.get(change)
            if new is None:
                path.unlink()
            else:
                path.with_name("new").write_bytes(new)
                path.with_name("new").replace(path)
        return whole(self, batch, batch_idx)

    monkeypatch.setattr(LitRWKV, "training_step", training_step)
    result = train(*SMALL, *EVERY, f"data.num_workers={workers}", "trainer.max_steps=12", "hydra.run.dir=run")
    if change == "touched":
        assert result.code == 0, result.err
        return
    assert (result.code, result.err.count("\n")) == (1, 1), result.err
    assert f"the data file {path} changed during the run" in result.err
    assert "; to resume: " in result.err
    path.write_bytes(text)
    result = train("resume=run")
    assert result.code == 0, result.err
    assert load_checkpoint(tmp_path / "run")["global_step"] == 12


def test_second_start_in_a_run_folder_is_refused(train, tmp_path):
    process = forks.start(tmp_path, *SMALL, "trainer.max_steps=100000", "hydra.run.dir=run", "data.num_workers=1")
    run = tmp_path / "run"
    end = time.monotonic() + 600
    while not (run / "metrics.csv").exists() or len((run / "metrics.csv").read_text().splitlines()) < 2:
        assert time.monotonic() < end and process.is_alive()
        time.sleep(0.05)
    before = (run / ".hydra" / "config.yaml").read_bytes()
    for arguments in (("resume=run",), ("resume=run", "optim.lr=1e-4")):
        result = train(*arguments)
        assert (result.code, result.err.count("\n")) == (2, 1)
        # On Windows, a locked file cannot be read, so the process is not named.
        assert f"{run} is in use by {'' if WINDOWS else f'process {process.pid} on '}" in result.err
    assert (run / ".hydra" / "config.yaml").read_bytes() == before
    assert not (run / ".hydra" / "resumes.yaml").exists()
    workers = psutil.Process(process.pid).children()
    assert workers
    for worker in workers:
        worker.suspend()
    process.kill()
    process.join()
    with locked(run):  # although the worker processes are still alive
        for worker in workers:
            assert worker.is_running()
            worker.kill()
        holder = "" if WINDOWS else f"process {os.getpid()}"
        with pytest.raises(UserError, match=f"in use by {holder}"), locked(run):
            pass
    (run / "left.partial").write_bytes(b"half")
    (run / "checkpoints").mkdir(exist_ok=True)
    (run / "checkpoints" / "last.ckpt.partial").write_bytes(b"half")
    assert train("resume=run", "trainer.max_steps=1").code == 0
    assert not list(run.rglob("*.partial"))


def test_resume_latest_picks_the_newest_unfinished_run(train, run_of_eight_steps, tmp_path):
    result = train("resume=latest")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert f"resume=latest: no runs in {tmp_path / 'outputs'}; name one elsewhere with resume=FOLDER" in result.err
    for name in "abcd":
        run = tmp_path / "outputs" / "2026-01-01" / name
        run.parent.mkdir(parents=True, exist_ok=True)
        copy_run(run_of_eight_steps, tmp_path).rename(run)
        last = run / "checkpoints" / "last.ckpt"
        if name in "ad":
            last.with_name("last.prev.ckpt").replace(last)  # like a run killed before its end
        elif name == "b":
            shutil.rmtree(run / "checkpoints")  # like a run killed before its first checkpoint
        if name in "abd":
            (run / "result.json").unlink()
    outputs = tmp_path / "outputs" / "2026-01-01"
    with locked(outputs / "d"):
        # c is finished, d is in use
        result = train("resume=latest")
        assert result.code == 0, result.err
        assert f"{outputs / 'b'} has no checkpoint yet: it starts at step 0" in result.out
    assert train("resume=latest").code == 0
    assert load_checkpoint(outputs / "d")["global_step"] == 8
    assert train("resume=latest").code == 0
    assert load_checkpoint(outputs / "a")["global_step"] == 8
    result = train("resume=latest")
    assert result.code == 2
    assert f"resume=latest: all 4 runs in {tmp_path / 'outputs'} are finished or in use; name one with" in result.err


def test_finished_run_says_so_although_its_schedule_does_not_fit(train, run):
    result = train("resume=run", "trainer.max_steps=3", "schedule=cosine", "schedule.warmup_steps=3")
    assert (result.code, "is finished, after 8 steps; a larger trainer.max_steps extends it" in result.out) == (0, True)


@pytest.mark.parametrize("callback", ["ema", "early_stopping"])
def test_finished_run_without_a_checkpoint_is_not_resumed(train, tmp_path, callback):
    result = train(*SMALL, f"callbacks=[{callback}]", "hydra.run.dir=outputs/run")
    assert result.code == 0, result.err
    assert f"warning: this run saves no checkpoint: add default, as in 'callbacks=[default,{callback}]'" in result.out
    before = (tmp_path / "outputs" / "run" / "metrics.csv").read_bytes()
    result = train("resume=outputs/run")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "is finished and has no checkpoint to resume from" in result.err
    result = train("resume=latest")
    assert result.code == 2 and "the only run" in result.err, result.err
    assert (tmp_path / "outputs" / "run" / "metrics.csv").read_bytes() == before


@pytest.mark.parametrize("reason", ["length", "time", "early stop"])
def test_checkpoint_stores_why_the_run_finished(train, tmp_path, reason):
    more = {
        "length": (),
        "time": ("trainer.max_steps=-1", "trainer.max_time=00:00:00:01"),
        "early stop": (
            "callbacks=[default,early_stopping]",
            "callbacks.early_stopping.patience=1",
            "optim.lr=1e-30",
            "trainer.val_check_interval=1",
            "trainer.max_steps=50",
        ),
    }[reason]
    assert train(*SMALL, *more, "hydra.run.dir=run").code == 0
    assert load_checkpoint(tmp_path / "run")["rwkv_pl"]["finished"] == reason
    result = train("resume=run")
    assert (result.code, "is finished" in result.out) == (0, True)


@pytest.fixture(scope="module")
def run_stopped_early(tmp_path_factory) -> Path:
    """No validation improves, so it ends after the first one and `patience` further ones."""
    early = ("callbacks=[default,early_stopping]", "optim.lr=1e-30", "trainer.val_check_interval=1")
    patience = "callbacks.early_stopping.patience=2"
    return make_run(tmp_path_factory.mktemp("early"), *early, patience, "trainer.max_steps=7")


@pytest.mark.parametrize(("patience", "steps"), [(4, 5), (50, 7), (1, 4)])
def test_patience_of_a_resume_counts(train, run_stopped_early, tmp_path, patience, steps):
    run = copy_run(run_stopped_early, tmp_path)
    assert load_checkpoint(run)["global_step"] == 3
    result = train("resume=run", f"callbacks.early_stopping.patience={patience}")
    assert result.code == 0, result.err
    assert load_checkpoint(run)["global_step"] == steps


def test_patience_of_an_earlier_resume_counts(train, run_stopped_early, tmp_path):
    """The checkpoint is older than the resume that changed the setting."""
    run = copy_run(run_stopped_early, tmp_path)
    before = (run / "checkpoints" / "last.ckpt").read_bytes()
    assert train("resume=run", "callbacks.early_stopping.patience=3").code == 0
    (run / "checkpoints" / "last.ckpt").write_bytes(before)
    assert train("resume=run", "callbacks.early_stopping.min_delta=0.1").code == 0
    assert load_checkpoint(run)["global_step"] == 4


def test_settings_of_every_callback_are_those_of_the_resume(train, tmp_path, monkeypatch):
    """Lightning could restore any of them from a checkpoint."""
    callbacks = "callbacks=[best,early_stopping,last,ema,sample_text]"
    assert train(*SMALL, callbacks, "trainer.max_steps=2", "hydra.run.dir=run").code == 0
    changed = {
        "callbacks.early_stopping.patience=9": ("EarlyStopping", "patience", 9),
        "callbacks.early_stopping.min_delta=0.5": ("EarlyStopping", "min_delta", -0.5),  # the sign is Lightning's
        "callbacks.best.save_top_k=2": ("BestCheckpoint", "save_top_k", 2),
        "callbacks.last.every_n_train_steps=7": ("LastCheckpoint", "_every_n_train_steps", 7),
        "callbacks.sample_text.n_tokens=4": ("SampleText", "n_tokens", 4),
    }
    used, before = {}, load_checkpoint(tmp_path / "run")["state_dict"]

    def keep(self, trainer, *_):
        used.update({type(callback).__name__: callback for callback in trainer.callbacks})

    monkeypatch.setattr(PendingValidation, "on_train_start", keep)
    result = train("resume=run", "trainer.max_steps=3", "callbacks.ema.decay=0.25", *changed)
    assert result.code == 0, result.err
    for name, attribute, value in changed.values():
        assert getattr(used[name], attribute) == value, name
    average, weights = (load_checkpoint(tmp_path / "run")[key] for key in ("state_dict", "current_model_state"))
    for name, value in average.items():
        torch.testing.assert_close(value, 0.25 * before[name] + 0.75 * weights[name])


def test_best_score_is_read_from_the_checkpoint(train, tmp_path, caplog):
    every = ("trainer.val_check_interval=2", "trainer.max_steps=6", "hydra.run.dir=run")
    assert train(*SMALL, *EVERY, *every).code == 0
    checkpoints = tmp_path / "run" / "checkpoints"
    best = torch.load(checkpoints / "best.ckpt", weights_only=True)
    key = next(name for name in best["callbacks"] if name.startswith("BestCheckpoint"))

    def score_of_last():
        return load_checkpoint(tmp_path / "run")["callbacks"][key]["best_model_score"]

    # A better score than the one in last.ckpt, like in a run that was killed between the two writes.
    best["callbacks"][key]["current_score"] = torch.tensor(0.5, dtype=torch.float64)
    torch.save(best, checkpoints / "best.ckpt")
    assert train("resume=run", "trainer.max_steps=8").code == 0
    assert score_of_last() == 0.5
    assert load_checkpoint(tmp_path / "run", "best.ckpt")["global_step"] == 6
    # Truncated, then missing: the next validation writes it again.
    for steps in (10, 12):
        if steps == 10:
            (checkpoints / "best.ckpt").write_bytes((checkpoints / "best.ckpt").read_bytes()[:-50])
        else:
            (checkpoints / "best.ckpt").unlink()
        result = train("resume=run", f"trainer.max_steps={steps}")
        assert result.code == 0, result.err
        assert ("is corrupt, or has another monitor" in result.out) == (steps == 10)
        assert load_checkpoint(tmp_path / "run", "best.ckpt")["global_step"] in (steps - 1, steps)


class Hostile:
    def __reduce__(self):
        return os.system, (f"touch {Path.cwd()}/executed",)


@pytest.mark.parametrize("name", ["last.ckpt", "best.ckpt", "both"])
def test_untrusted_checkpoint_executes_no_code(train, run, tmp_path, name):
    checkpoints = tmp_path / "run" / "checkpoints"
    content = torch.load(checkpoints / "last.ckpt", weights_only=True)
    for file in ("last.ckpt", "best.ckpt") if name == "both" else (name,):
        (checkpoints / file).unlink()
        torch.save(content | {"hostile": Hostile()}, checkpoints / file)
    (checkpoints / "last.prev.ckpt").unlink()
    result = train("resume=run", "trainer.max_steps=9")
    assert result.code == (2 if name == "both" else 0)
    assert (name == "last.ckpt") == ("last.ckpt is not a checkpoint that can be read safely" in result.out)
    assert train(*SMALL, f"weights=run/checkpoints/{'last.ckpt' if name == 'both' else name}").code in (0, 2)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"callbacks": {"x": {"_target_": "os.system", "command": "touch executed"}}},
        {"callbacks": {"x": {"_target_": "lightning.pytorch.callbacks.model_checkpoint.os.system", "command": "x"}}},
        {"optim": {"_target_": "torch.optim.optimizer.torch.hub.load", "lr": 1.0}},
        {"data": {"_target_": "os.system", "name": "text", "path": "corpus.txt"}},
        {"trainer": {"profiler": {"_target_": "os.system", "command": "touch executed"}}},
        {"logger": {"x": {"_target_": "subprocess.run", "args": "touch executed"}}},
        {"seed": "${oc.decode:'!!python/object/apply:os.system [touch executed]'}"},
    ],
)
def test_untrusted_settings_execute_no_code(train, run, tmp_path, change):
    path = tmp_path / "run" / ".hydra" / "config.yaml"
    config = yaml.safe_load(path.read_text())
    for group, values in change.items():
        config[group] = config[group] | values if isinstance(values, dict) else values
    path.write_text(yaml.safe_dump(config))
    result = train("resume=run", "trainer.max_steps=9")
    assert (result.code, result.err.count("\n")) == (2, 1), result.err
    assert not (tmp_path / "executed").exists()


def test_untrusted_yaml_is_plain_data(train, run, tmp_path):
    for name in ("config.yaml", "hydra.yaml", "overrides.yaml", "resumes.yaml"):
        path = tmp_path / "run" / ".hydra" / name
        before = path.read_bytes() if path.exists() else None
        path.write_text(f"x: !!python/object/apply:os.system ['touch {tmp_path}/executed']\n")
        result = train("resume=run", "trainer.max_steps=9")
        assert (result.code, result.err.count("\n")) == (2, 1), (name, result.err)
        path.unlink() if before is None else path.write_bytes(before)
    assert not (tmp_path / "executed").exists()


def test_metrics_rows_have_no_gaps_after_resume(train, tmp_path):
    assert train(*SMALL, *EVERY, "trainer.max_steps=4", "hydra.run.dir=run").code == 0
    assert train("resume=run", "trainer.max_steps=8").code == 0
    assert [int(row["step"]) for row in read_metrics(tmp_path / "run")] == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8]


def test_files_of_a_run_may_have_other_line_endings(train, run, tmp_path):
    names = ("metrics.csv", ".hydra/overrides.yaml", ".hydra/config.yaml")
    for path in (run / name for name in names):
        path.write_bytes(path.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r").rstrip(b"\r"))
    (run / "result.json").write_bytes(codecs.BOM_UTF8 + (run / "result.json").read_bytes())
    assert read_run(run).status == "finished"
    assert train("resume=run", "trainer.max_steps=9").code == 0
    assert [int(row["step"]) for row in read_metrics(run)] == [*range(1, 9), 8, 9, 9]


def test_checkpoints_written_by_a_thread_are_the_same(train, tmp_path, monkeypatch):
    """A thread writes checkpoints, like on a GPU: same run; a full disk is reported at the next step or at the end."""
    assert train(*SMALL, *EVERY, "hydra.run.dir=whole").code == 0
    monkeypatch.setattr(checkpoint_io, "writes_in_background", lambda checkpoint: True)
    assert train(*SMALL, *EVERY, "hydra.run.dir=run").code == 0
    for name in ("last.ckpt", "best.ckpt"):
        expected, found = (
            load_checkpoint(tmp_path / "whole", name)["state_dict"],
            load_checkpoint(tmp_path / "run", name),
        )
        assert all(torch.equal(value, found["state_dict"][key]) for key, value in expected.items())
    whole = torch.save
    for last in (False, True):
        steps = []

        def save(content, file, last=last, steps=steps):
            steps.append(content["global_step"])
            if content["global_step"] == (8 if last else 2):
                raise OSError(errno.ENOSPC, "No space left on device")
            whole(content, file)

        monkeypatch.setattr(torch, "save", save)
        result = train(*SMALL, *EVERY, f"hydra.run.dir=full{last}")
        assert (result.code, result.err.count("\n")) == (1, 1), result.err
        assert "disk full" in result.err and steps[-1] == (8 if last else 2)


def test_run_identity_in_the_checkpoint_is_checked(train, run, tmp_path):
    """Settings edited in the stored config."""
    path = tmp_path / "run" / ".hydra" / "config.yaml"
    text = path.read_text()
    for change in ("seed: 42", "batch_size: 6", "ctx_len: 16", "- 0.9\n", "n_embd: 16", "n_layer: 2"):
        assert change in text
        path.write_text(text.replace(change, "- 0.8\n  - 0.1\n" if "0.9" in change else change.replace("6", "8") + "1"))
        result = train("resume=run", "trainer.max_steps=9")
        assert (result.code, result.err.count("\n")) == (2, 1), (change, result.err)


def test_early_checkpoint_format_is_read(train, run, tmp_path):
    """Early checkpoints stored only the corpus, not the run identity."""
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    content = torch.load(last, weights_only=True)
    about = content["rwkv_pl"]
    about["corpus"] = about.pop("past")["corpus"]
    del about["skipped"]
    content["callbacks"]["StopOnSignal"] = {"validation_due": False}
    last.unlink()
    torch.save(content, last)
    assert train("resume=run", "trainer.max_steps=9").code == 0
    about["format"] = 2
    torch.save(content, last)
    (last.with_name("last.prev.ckpt")).unlink()
    for arguments in (("resume=run", "trainer.max_steps=10"), (*SMALL, f"weights={last}")):
        result = train(*arguments)
        assert (result.code, result.err.count("\n")) == (2, 1)
        assert "has checkpoint format 2, this rwkv_pl reads 1: install a newer rwkv_pl" in result.err


def test_run_with_the_old_names_of_callback_classes_resumes_to_the_same_bits(train, tmp_path):
    every = (*SMALL, "callbacks=[default,sample_text,ema]", "callbacks.sample_text.every_n_steps=1")
    assert train(*every, "hydra.run.dir=whole").code == 0
    assert train(*every, "hydra.run.dir=old", "trainer.max_steps=2").code == 0
    config = tmp_path / "old" / ".hydra" / "config.yaml"
    text = config.read_text()
    for old, new in MOVED.items():
        assert new in text or new.endswith(".WeightAveraging")
        text = text.replace(new, old)
    config.write_text(text)
    assert "History" in load_checkpoint(tmp_path / "old")["callbacks"]  # a stored name, which later versions must read
    assert train("resume=old", "trainer.max_steps=4").code == 0
    ends = [load_checkpoint(tmp_path / run) for run in ("whole", "old")]
    assert all(torch.equal(a, b) for a, b in zip(*(end["state_dict"].values() for end in ends), strict=True))
