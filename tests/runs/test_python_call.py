"""rwkv_pl.train: the command's run in this process, which is afterwards as before."""

import asyncio
import json
import logging
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import forks
import numpy as np
import psutil
import pytest
import torch
from brief import shorten_run_end
from command import SMALL, TEXT, call
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from systems import needs_gloo

import rwkv_pl
from rwkv_pl.errors import RunError, StoppedBySignal, UserError
from rwkv_pl.ops.backend import current_kernel
from rwkv_pl.runs import launch, python_call, restore
from rwkv_pl.runs.restore import deferred_sigint, restored_process
from rwkv_pl.training.module import LitRWKV

TINY = (*SMALL, "trainer.limit_val_batches=1", "trainer.max_steps=3", "logger=none")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """The current folder, with a corpus.txt. Fixtures of pytest that also restore the process would hide faults."""
    shorten_run_end(monkeypatch.setattr)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus.txt").write_bytes(TEXT)
    return tmp_path


def read_weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def assert_same_weights(one: Path, other: Path) -> None:
    expected, found = read_weights(one), read_weights(other)
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def call_in_training_step(monkeypatch, number: int, act) -> None:
    """Call `act` at the start of the n-th micro-batch."""
    original, calls = LitRWKV.training_step, []

    def training_step(self, *arguments):
        calls.append(1)
        if len(calls) == number:
            act()
        return original(self, *arguments)

    monkeypatch.setattr(LitRWKV, "training_step", training_step)


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


# The run itself


def test_call_returns_the_run_and_prints_the_lines_of_the_command(folder, monkeypatch, capfd):
    run = rwkv_pl.train(*TINY)
    printed = capfd.readouterr()
    assert run.folder.parent.parent == folder / "outputs" and (run.folder / "checkpoints" / "last.ckpt").is_file()
    assert printed.err == ""
    from rwkv_pl.cli.train import main

    result = call(main, ["rwkv-train", *TINY], monkeypatch, capfd)
    # The sample of an untrained model has any characters.
    heads = [[line[:8] for line in text.split("sample", 1)[0].splitlines()] for text in (printed.out, result.out)]
    assert heads[0] == heads[1] and len(heads[0]) > 8
    assert "rwkv-train" not in printed.out


def test_first_and_second_call_have_the_bits_of_the_command(folder):
    settings = (*TINY, "model.dropout=0.2", "callbacks=[default,ema]")
    assert forks.run(folder, *settings, "hydra.run.dir=command").code == 0
    code = f"""
import brief, rwkv_pl, torch
brief.shorten_run_end()
torch.manual_seed(7)
for name in ("first", "second"):
    rwkv_pl.train(*{settings!r}, f"hydra.run.dir={{name}}")
    torch.rand(3)
"""
    result = forks.run(folder, code=code)
    assert result.code == 0, result.err
    assert_same_weights(folder / "command", folder / "first")
    assert_same_weights(folder / "command", folder / "second")


def test_resume_by_name_and_latest(folder, monkeypatch):
    call_in_training_step(monkeypatch, 2, interrupt)
    with pytest.raises(KeyboardInterrupt):
        rwkv_pl.train(*TINY)
    # Windows would not replace an open file.
    assert not [file.path for file in psutil.Process().open_files() if file.path.endswith("metrics.csv")]
    run = rwkv_pl.train("resume=latest")
    assert run.folder.is_relative_to(folder / "outputs") and run.metrics["step"][-1] == 3
    again = rwkv_pl.train(f"resume={run.folder}", "trainer.max_steps=4")
    assert again.folder == run.folder and again.metrics["step"][-1] == 4


def test_resume_of_a_finished_run_returns_it(folder, capfd):
    run = rwkv_pl.train(*TINY)
    capfd.readouterr()
    assert rwkv_pl.train(f"resume={run.folder}").folder == run.folder
    assert "is finished, after 3 steps" in capfd.readouterr().out


def test_config_dir_has_the_users_own_files(folder):
    (folder / "mine" / "model").mkdir(parents=True)
    (folder / "mine" / "model" / "nano.yaml").write_text("name: rwkv4\nn_layer: 1\nn_embd: 8\ndropout: 0.0\n")
    settings = [text for text in TINY if not text.startswith("model.")]
    run = rwkv_pl.train(*settings, "model=nano", config_dir="mine")
    assert run.model().config.n_embd == 8


def test_command_and_call_share_one_function(monkeypatch, capfd):
    from rwkv_pl.cli import train as command

    seen = []

    def record(overrides, config_dir, training):
        seen.append(([o.input_line for o in overrides], config_dir))
        raise UserError("no run")

    for place in (command, python_call):
        assert place.launch is launch.launch
        monkeypatch.setattr(place, "launch", record)
    call(command.main, ["rwkv-train", "seed=1", "weights=~/a"], monkeypatch, capfd)
    with pytest.raises(UserError, match="no run"):
        rwkv_pl.train("seed=1", "weights=~/a")
    assert seen[0] == seen[1]


# Bad input


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("-m", "seed=1,2"), "-m starts a sweep, a process for each run: use the command rwkv-train -m"),
        (("--multirun",), "--multirun starts a sweep"),
        (("--help",), "--help is a flag of the command: type rwkv-train --help"),
        (("--cfg=job",), "--cfg is a flag of the command"),
        (("--config-dir=mine",), r"write train\(..., config_dir=FOLDER\)"),
        (("seed=1,2",), "seed=1,2 has several values: to run them all, use the command rwkv-train -m"),
        ((50,), "train takes settings as text, got 50, a int"),
        ((None,), "got None"),
        ((["seed=1"],), r"unpack it, train\(\*settings\)"),
        (("sead=1",), "sead is not a setting; did you mean seed?"),
        (("seed",), "seed needs a value"),
        (("seed=abc",), "seed must be a whole number, got 'abc'"),
        (("data=nope",), "data=nope does not exist"),
        (("optim.lr=${nope}",), "nope"),
        (("resume=nowhere",), "is not a run folder"),
        (("resume=latest",), "resume=latest: no runs in"),
        ((*TINY, "trainer.devices=2"), "trainer.devices=2 needs several processes.*rwkv-train, or .* torchrun"),
        ((*TINY, "trainer.devices='2'"), "trainer.devices=2 needs"),
        ((*TINY, "trainer.devices=[0,1]"), "trainer.devices=2 needs"),
        ((*TINY, "trainer.num_nodes=2"), "trainer.num_nodes=2 needs"),
        ((*TINY, "data.path=missing.txt"), "missing.txt"),
    ],
)
def test_bad_input_raises_user_error_in_one_line(folder, overrides, message):
    with pytest.raises(UserError, match=message) as caught:
        rwkv_pl.train(*overrides)
    assert "\n" not in str(caught.value) and not isinstance(caught.value, RunError)
    assert caught.value.__cause__ is None and caught.value.__context__ is None
    assert not (folder / "outputs").exists()


@pytest.mark.parametrize(
    ("config_dir", "message"),
    [("missing", "missing is not a folder: give the one with your own files$"), (3, "must be a folder's path, got 3$")],
)
def test_wrong_config_dir_raises_user_error(config_dir, message):
    with pytest.raises(UserError, match=f"^config_dir.*{message}"):
        rwkv_pl.train(config_dir=config_dir)


def test_devices_found_by_lightning_are_refused_before_the_first_step(folder, monkeypatch):
    """trainer.devices=-1 on a machine with several GPUs."""
    monkeypatch.setattr(launch, "count_devices", lambda trainer: 2)
    with pytest.raises(UserError, match=r"trainer\.devices=2 needs several processes"):
        rwkv_pl.train(*TINY, "trainer=ddp", "trainer.devices=-1", "hydra.run.dir=run")
    assert not (folder / "run").exists()


def _refused(error: BaseException) -> SystemExit:
    exit = SystemExit(2)
    exit.__context__ = error
    return exit


@pytest.mark.parametrize(
    ("raised", "kind", "message"),
    [
        (HydraException("one\n  two"), UserError, "^one two$"),
        (OmegaConfBaseException("three"), UserError, "^three$"),
        (OSError(28, "No space left on device", "/full/file"), RunError, "^disk full: /full/file was not written$"),
        (BrokenPipeError(32, "Broken pipe"), RunError, "Broken pipe"),
        (KeyboardInterrupt(), KeyboardInterrupt, "stopped before the first step"),
        (_refused(UserError("of rank 0")), UserError, "^of rank 0$"),
        (_refused(ValueError()), UserError, "rank 0 refused"),
        (SystemExit(1), RunError, "exit code 1"),
    ],
)
def test_other_errors_become_the_line_that_the_command_prints(monkeypatch, raised, kind, message):
    def fail(*_):
        raise raised

    monkeypatch.setattr(python_call, "launch", fail)
    with pytest.raises(kind, match=message) as caught:
        rwkv_pl.train()
    assert type(caught.value) is kind


def test_failed_run_raises_run_error_with_the_call_that_resumes_it(folder, monkeypatch, capfd):
    def fail():
        raise ValueError("a fault")

    call_in_training_step(monkeypatch, 3, fail)
    with pytest.raises(RunError, match="ValueError: a fault") as caught:
        rwkv_pl.train(*TINY, "callbacks.last.every_n_train_steps=2", "hydra.run.dir=run")
    resume = json.dumps(f"resume={folder / 'run'}")
    assert f"at step 2; to resume: rwkv_pl.train({resume})" in str(caught.value)
    streams = capfd.readouterr()
    assert "Traceback" not in streams.out + streams.err
    assert "a fault" in (folder / "run" / "train.log").read_text()


def test_second_call_at_the_same_time_is_refused(monkeypatch):
    with python_call._running, pytest.raises(UserError, match="is running in this process already"):
        rwkv_pl.train(*TINY)


# Signals


def test_ctrl_c_saves_and_raises_keyboard_interrupt_with_the_call_that_resumes(folder, monkeypatch, capfd):
    call_in_training_step(monkeypatch, 2, interrupt)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt) as caught:
        rwkv_pl.train(*TINY, "hydra.run.dir=a b")
    assert signal.getsignal(signal.SIGINT) is before
    message, _, resume = str(caught.value).partition("; to resume: ")
    assert message == "stopped by SIGINT after step 2"
    assert str(caught.value) in capfd.readouterr().out
    assert eval(resume, {"rwkv_pl": rwkv_pl}).metrics["step"][-1] == 3
    rwkv_pl.train(*TINY, "hydra.run.dir=whole")
    assert_same_weights(folder / "whole", folder / "a b")


def test_resume_call_has_the_plugins_that_were_given(folder, monkeypatch):
    call_in_training_step(monkeypatch, 1, interrupt)
    with pytest.raises(KeyboardInterrupt, match=r'rwkv_pl.train\("resume=.*", "plugins=\[statistics\]"\)'):
        rwkv_pl.train(*TINY, "plugins=[statistics]")


def test_second_ctrl_c_raises_at_once(folder, monkeypatch):
    call_in_training_step(monkeypatch, 1, lambda: (interrupt(), interrupt()))
    with pytest.raises(KeyboardInterrupt, match=r"second signal, without saving; to resume: rwkv_pl\.train") as caught:
        rwkv_pl.train(*TINY, "hydra.run.dir=run")
    assert not (folder / "run" / "checkpoints").exists()
    assert eval(str(caught.value).partition("to resume: ")[2], {"rwkv_pl": rwkv_pl}).metrics["step"][-1] == 3


@pytest.mark.parametrize(
    ("place", "message", "is_kept"),
    [
        ("rwkv_pl.data.datamodule.DataModule.prepare_data", "stopped before the first step", False),
        ("lightning.pytorch.trainer.trainer.Trainer._run_stage", "stopped before the first step", False),
        ("rwkv_pl.runs.train.conclude", "stopped after the last step: the checkpoints are complete", True),
    ],
)
def test_ctrl_c_before_or_after_the_training(folder, monkeypatch, place, message, is_kept):
    monkeypatch.setattr(place, lambda *_, **__: interrupt())
    with pytest.raises(KeyboardInterrupt, match=message):
        rwkv_pl.train(*TINY, "hydra.run.dir=run")
    assert (folder / "run").exists() == is_kept


def test_sigterm_saves_then_calls_the_handler_of_before_then_exits(folder, monkeypatch):
    received = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    call_in_training_step(monkeypatch, 2, lambda: signal.raise_signal(signal.SIGTERM))
    try:
        with pytest.raises(SystemExit) as caught:
            rwkv_pl.train(*TINY, "hydra.run.dir=run")
        assert received == [signal.SIGTERM]
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        call_in_training_step(monkeypatch, 1, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(SystemExit):
            rwkv_pl.train("resume=run")
        assert received == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)
    assert caught.value.code == 143
    assert torch.load(folder / "run" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 3


def test_ctrl_c_during_an_import_waits_for_its_end():
    done = []
    with pytest.raises(KeyboardInterrupt), deferred_sigint():
        interrupt()
        done.append("import")
    assert done == ["import"]


def test_other_signal_exception_exits_with_the_code_of_the_command(monkeypatch):
    def fail(*_):
        raise StoppedBySignal(signal.SIGTERM, 143)

    monkeypatch.setattr(python_call, "launch", fail)
    with pytest.raises(SystemExit) as caught:
        rwkv_pl.train()
    assert caught.value.code == 143


def test_call_in_a_thread_and_in_a_running_event_loop(folder):
    async def in_loop(name: str):
        return rwkv_pl.train(*TINY, f"hydra.run.dir={name}")

    async def in_thread(name: str):
        return await asyncio.to_thread(rwkv_pl.train, *TINY, f"hydra.run.dir={name}")

    for call_train, name in ((in_loop, "loop"), (in_thread, "thread")):
        assert asyncio.run(call_train(name)).folder == folder / name
    assert_same_weights(folder / "loop", folder / "thread")


# The process afterwards


def describe_process() -> dict[str, object]:
    loggers = [logging.getLogger(), *map(logging.getLogger, ("lightning.pytorch", "lightning.fabric", "rwkv_pl"))]
    return {
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "argv": (id(sys.argv), list(sys.argv)),
        "path": (id(sys.path), list(sys.path)),
        "environment": dict(os.environ),
        "cwd": Path.cwd(),
        "hooks": (sys.excepthook, threading.excepthook, warnings.formatwarning, warnings.showwarning),
        "filters": list(warnings.filters),
        "loggers": [(each.level, each.propagate, each.disabled, list(each.handlers)) for each in loggers],
        "known handlers": list(logging._handlers),
        "hydra": HydraConfig.instance().cfg,
        "resolver": OmegaConf.create({"a": "${now:%Y}"}).a,
        "kernel": current_kernel(),
        "dtype": torch.get_default_dtype(),
        "deterministic": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.backends.cudnn.deterministic,
        ),
        "benchmark": torch.backends.cudnn.benchmark,
        "precision": (torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.fp32_precision),
        "tf32": (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32),
        "threads": torch.get_num_threads(),
        "gradients": torch.is_grad_enabled(),
        "process group": torch.distributed.is_initialized(),
        "random": random.getstate(),
        "numpy": [str(part) for part in np.random.get_state()],
        "torch": torch.get_rng_state().tolist(),
    }


@pytest.fixture
def unusual_process(folder, monkeypatch):
    """Settings that differ from the defaults and from those of a run."""
    handler = logging.FileHandler(folder / "own.log", mode="w")
    level = logging.getLogger().level
    logging.getLogger().addHandler(handler)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger().setLevel(logging.ERROR)
    signals = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(sys, "excepthook", lambda *_: None)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.setenv("MASTER_PORT", "12345")
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    OmegaConf.register_new_resolver("now", lambda pattern: "mine", replace=True)
    HydraConfig.instance().cfg = OmegaConf.create({"hydra": {"job": {"name": "mine"}}})
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    torch.set_default_dtype(torch.float64)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    with warnings.catch_warnings(), rwkv_pl.use_kernel("recurrence"), torch.no_grad():
        warnings.filterwarnings("error", message="mine")
        yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(False)
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(threads)
    HydraConfig.instance().cfg = None
    for number, before in signals.items():
        signal.signal(number, before)
    logging.getLogger().setLevel(level)
    logging.getLogger().removeHandler(handler)
    handler.close()


@pytest.mark.parametrize("end", ["success", "bad input", "failure", "interrupt", "DDP"])
def test_process_is_afterwards_as_before(unusual_process, folder, monkeypatch, end):
    def fail():
        raise ValueError("a fault")

    settings = [*TINY, "trainer.deterministic=true", "kernel=scan"]
    if end in ("failure", "interrupt"):
        call_in_training_step(monkeypatch, 2, fail if end == "failure" else interrupt)
    settings += ["nope=1"] if end == "bad input" else ["trainer.strategy=ddp"] if end == "DDP" else []
    expected = {"bad input": UserError, "failure": RunError, "interrupt": KeyboardInterrupt}.get(end)
    before = describe_process()
    caught: object = None
    try:
        rwkv_pl.train(*settings)
    except BaseException as error:
        caught = error
    after = describe_process()
    assert type(caught) is (expected or type(None)), caught
    assert {name: value for name, value in after.items() if value != before[name]} == {}
    logging.getLogger().error("still written")
    assert (folder / "own.log").read_text() == "still written\n"


def test_imports_that_draw_random_numbers_change_none_of_the_callers():
    before = random.getstate()
    with restored_process():
        random.random()
    assert random.getstate() == before


def test_run_starts_with_the_defaults_of_torch(unusual_process, monkeypatch):
    """Another precision, dtype or mode of the caller would change the bits, or fail."""
    seen = []
    call_in_training_step(
        monkeypatch, 1, lambda: seen.extend([torch.get_float32_matmul_precision(), torch.get_default_dtype()])
    )
    with torch.inference_mode():
        rwkv_pl.train(*TINY)
        assert torch.is_inference_mode_enabled()
    assert seen == ["highest", torch.float32]


@pytest.mark.slow
def test_first_call_in_a_process_checks_the_config_before_torch_and_leaves_the_environment_as_before(folder):
    """Importing torch and Lightning changes the environment and the warnings."""
    code = f"""
import os, sys, warnings
import rwkv_pl
from rwkv_pl.errors import UserError
before = dict(os.environ), list(warnings.filters), warnings.formatwarning, list(sys.path)
for wrong in (["sead=1"], ["-m"], ["trainer.devices=2"], ["resume=nowhere"]):
    try:
        rwkv_pl.train(*wrong)
    except UserError:
        pass
    else:
        sys.exit(f"{{wrong}} was accepted")
if {{"torch", "lightning", "matplotlib"}} & sys.modules.keys():
    sys.exit("torch was loaded")
run = rwkv_pl.train(*{TINY!r})
after = dict(os.environ), list(warnings.filters), warnings.formatwarning, list(sys.path)
sys.exit(None if before == after else f"{{before}} became {{after}}")
"""
    (folder / "script.py").write_text(code)
    done = subprocess.run([sys.executable, "script.py"], cwd=folder, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@needs_gloo
def test_script_under_torchrun_trains_twice_on_two_ranks(folder):
    settings = [text.replace("corpus.txt", str(folder / "corpus.txt")) for text in TINY]
    code = f"""
import brief, rwkv_pl
brief.shorten_run_end()
for steps in (2, 3):
    run = rwkv_pl.train(*{settings!r}, "trainer=ddp", "trainer.devices=2", f"trainer.max_steps={{steps}}")
    print(run.folder, flush=True)
"""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    places = [folder / "rank 0", folder / "rank 1"]
    for place in places:
        place.mkdir()
    ranks = [group | {"RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]
    processes = [forks.start(place, code=code, **rank) for place, rank in zip(places, ranks, strict=True)]
    results = [forks.finish(process, place) for process, place in zip(processes, places, strict=True)]
    assert [result.code for result in results] == [0, 0], results[0].err + results[1].err
    folders = [[line for line in result.out.splitlines() if line.startswith(str(folder))] for result in results]
    assert folders[0] == folders[1] and len(set(folders[0])) == 2


def test_filters_of_imports_apply_in_each_call_only(monkeypatch):
    """Importing Lightning adds some; the second call does not import it again."""
    monkeypatch.setattr(restore, "_filters_of_imports", [])
    with warnings.catch_warnings():
        before = list(warnings.filters)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="of an import")
            restore.keep_filters_of_imports(before)
            restore.keep_filters_of_imports(before)
        (added,) = restore._filters_of_imports
        seen = []
        call_in_training_step(monkeypatch, 1, lambda: seen.extend(warnings.filters))
        rwkv_pl.train(*TINY)
        assert added in seen and added not in warnings.filters
