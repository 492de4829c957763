"""Stopped or killed runs resume to the same bits as an uninterrupted run."""

import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import forks
import pytest
import torch
from command import SMALL, TEXT, Result
from forks import KILL, KILLED, TERMINATION, Strike, interrupt, kill, terminate
from quick_compiler import quick_compiler
from scheduler import run_ranks
from systems import CAN_LINK, WINDOWS, needs_gloo, needs_links, needs_pipes, needs_scripts, needs_signals
from versions import RUN_SETTINGS

from rwkv_pl.files import cache_folder
from rwkv_pl.terminal import SIGNAL_CODES

CORPUS = "Fünf größere Bären äßen Öl. ".encode() * 100 + TEXT

RUN = (
    *SMALL,
    "data.vocab=char",
    "model.dropout=0.2",
    "trainer.max_steps=10",
    "trainer.accumulate_grad_batches=3",
    "trainer.val_check_interval=4",
    "trainer.limit_val_batches=3",
    "trainer.log_every_n_steps=1",
    "callbacks.last.every_n_train_steps=3",
    "hydra.run.dir=run",
)

TRAINING_STEP = "rwkv_pl.training.module:LitRWKV.training_step"
VALIDATION_STEP = "rwkv_pl.training.module:LitRWKV.validation_step"


def nth_training_step(step: int, micro_batch: int) -> int:
    """The number of a training_step call; calls, steps and micro-batches count from 1."""
    return (step - 1) * 3 + micro_batch


def nth_validation_step(validation: int, batch: int) -> int:
    """The number of a validation_step call, counted likewise. RUN validates after steps 4, 8 and 10."""
    return (validation - 1) * 3 + batch


def load_state(run: Path, name: str) -> dict[str, torch.Tensor]:
    content = torch.load(run / "checkpoints" / name, weights_only=True)
    moments = content["optimizer_states"][0]["state"]
    weights = content["state_dict"] | {f"trained.{k}": v for k, v in content.get("current_model_state", {}).items()}
    return weights | {f"{n}.{k}": v for n, of in moments.items() for k, v in of.items()}


SPEEDS = ("tokens_per_second", "model_flops_per_second", "mfu")


def read_figures(run: Path) -> list[list[str]]:
    """metrics.csv without the columns measured by the clock, which must only increase."""
    lines = [line.split(",") for line in (run / "metrics.csv").read_text().splitlines()]
    clock = lines[0].index("seconds")
    seconds = [float(line[clock]) for line in lines[1:]]
    assert seconds == sorted(seconds)
    timed = {clock, *(lines[0].index(name) for name in SPEEDS)}
    return [[cell for i, cell in enumerate(line) if i not in timed] for line in lines]


def read_tensorboard(run: Path) -> list[tuple[str, int, float]]:
    """The scalars of a run in TensorBoard, without those measured by the clock."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # TensorBoard reads files in the order of their names: of one second, in that of the process ids, which wrap around.
    files = sorted(run.glob("events.out.tfevents.*"), key=lambda file: file.stat().st_mtime_ns)
    with tempfile.TemporaryDirectory() as folder:
        for number, file in enumerate(files):
            shutil.copy(file, Path(folder, f"events.out.tfevents.{number:04}"))
        events = EventAccumulator(folder, size_guidance={"scalars": 0})
        events.Reload()
    names = [name for name in events.Tags()["scalars"] if name not in ("seconds", *SPEEDS, "epoch")]
    return [(name, event.step, event.value) for name in names for event in events.Scalars(name)]


def read_best(run: Path) -> dict[str, object]:
    callbacks = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]
    best = next(of for name, of in callbacks.items() if name.startswith("BestCheckpoint"))
    return {"score": best["best_model_score"], "path": Path(best["best_model_path"]).name}


def assert_same_run(run: Path, reference: Path) -> None:
    assert read_figures(run) == read_figures(reference)
    assert read_tensorboard(run) == read_tensorboard(reference)
    assert read_best(run) == read_best(reference)
    for name in ("last.ckpt", "best.ckpt"):
        expected, found = load_state(reference, name), load_state(run, name)
        assert expected.keys() == found.keys()
        assert all(torch.equal(value, found[key]) for key, value in expected.items()), name
    assert not list(run.rglob("*.partial"))


def finish_run(folder: Path, *arguments: str, **environment: str) -> Result:
    """Run a command that resumes or restarts a run and must finish it."""
    result = forks.run(folder, *arguments, **environment)
    assert result.code == 0, result.err
    return result


@pytest.fixture(scope="module")
def uninterrupted_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    (folder / "corpus.txt").write_bytes(CORPUS)
    finish_run(folder, *RUN)
    return folder / "run"


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "corpus.txt").write_bytes(CORPUS)
    return tmp_path


AGAIN, RESUME = RUN, ("resume=run",)
LONG = pytest.mark.slow  # a moment close to one that is always tested


@pytest.mark.parametrize(
    ("strike", "then"),
    [
        pytest.param(Strike("rwkv_pl.data.vocabulary:Vocabulary.encode_documents", 2, kill), AGAIN, id="tokenising"),
        pytest.param(Strike("rwkv_pl.runs.folder:create_run_dir", 1, kill, after=True), AGAIN, id="folder-made"),
        pytest.param(Strike("rwkv_pl.runs.folder:atomic_write", 2, kill), AGAIN, id="settings-half-written"),
        pytest.param(
            Strike("rwkv_pl.training.callbacks.metrics:_rewrite_csv", 1, kill), RESUME, id="starting", marks=LONG
        ),
        pytest.param(Strike(TRAINING_STEP, nth_training_step(2, 2), kill), RESUME, id="before-the-first-checkpoint"),
        pytest.param(Strike(TRAINING_STEP, nth_training_step(5, 3), kill), RESUME, id="stepping"),
        pytest.param(Strike("torch:save", 3, kill), RESUME, id="checkpoint-started", marks=LONG),
        pytest.param(Strike("torch:save", 2, kill, after=True), RESUME, id="checkpoint-not-renamed"),
        pytest.param(Strike("rwkv_pl.training.checkpoint_io:_link", 2, kill), RESUME, id="between-best-and-last"),
        pytest.param(Strike(VALIDATION_STEP, nth_validation_step(2, 2), kill), RESUME, id="validating", marks=LONG),
        pytest.param(Strike(VALIDATION_STEP, nth_validation_step(3, 2), kill), RESUME, id="the-last-validation"),
    ],
)
def test_killed_run_resumes_to_the_same_bits(folder, uninterrupted_run, strike, then):
    cache = {"RWKV_PL_CACHE": str(folder / "cache")} if "Vocab" in strike.place else {}
    if "Vocab" in strike.place:  # nothing is tokenised yet, but the kernel is built
        (folder / "cache").mkdir()
        if CAN_LINK:
            (folder / "cache" / "kernels").symlink_to(cache_folder() / "kernels")
    assert forks.run(folder, *RUN, strikes=[strike], **cache).code == KILLED
    finish_run(folder, *then, **cache)
    assert_same_run(folder / "run", uninterrupted_run)


def kill_soon() -> None:
    threading.Timer(0.8, kill).start()


@needs_scripts
def test_run_killed_while_compiling_resumes_to_the_same_bits(folder, uninterrupted_run):
    slow = folder / "slow-c++"
    slow.write_text('#!/bin/sh\ncase "$*" in *" -c "*) exec sleep 60;; *) echo fake 1.0;; esac\n')
    slow.chmod(0o755)
    cache = {"RWKV_PL_CACHE": str(folder / "cache")}
    compiling = Strike("rwkv_pl.ops.build:_compile_cpu", 1, kill_soon)
    assert forks.run(folder, *RUN, strikes=[compiling], CXX=str(slow), **cache).code == KILLED
    assert list((folder / "cache" / "kernels").glob("building-*"))
    result = finish_run(folder, *RUN, CXX=quick_compiler(folder), **cache)
    assert not list((folder / "cache" / "kernels").glob("building-*"))
    assert list((folder / "cache" / "kernels").glob("*.so")), result.out + result.err
    assert_same_run(folder / "run", uninterrupted_run)


@pytest.mark.parametrize(
    ("strike", "step"),
    [
        pytest.param(Strike(TRAINING_STEP, nth_training_step(5, 1), terminate), 4, id="first-micro-batch", marks=LONG),
        pytest.param(Strike(TRAINING_STEP, nth_training_step(5, 2), terminate), 4, id="inside-the-window"),
        pytest.param(Strike("torch:Tensor.backward", nth_training_step(6, 3), terminate), 6, id="backward"),
        pytest.param(Strike("torch.optim:AdamW.step", 6, terminate, after=True), 6, id="optimizer-step", marks=LONG),
        pytest.param(Strike("torch.optim:AdamW.step", 4, terminate), 4, id="a-validation-due"),
        pytest.param(Strike(VALIDATION_STEP, nth_validation_step(2, 2), terminate), 8, id="validation", marks=LONG),
        pytest.param(Strike(VALIDATION_STEP, nth_validation_step(3, 2), terminate), 10, id="the-last-validation"),
    ],
)
def test_stopped_run_resumes_to_the_same_bits(folder, uninterrupted_run, strike, step):
    result = forks.run(folder, *RUN, strikes=[strike])
    assert result.code == 143, result.err
    last_line = result.out.splitlines()[-1]
    assert last_line.startswith(f"stopped by {TERMINATION.name} after step {step}; to resume: ")
    assert last_line.endswith(f"rwkv-train resume={folder / 'run'}")
    finish_run(folder, "resume=run")
    assert_same_run(folder / "run", uninterrupted_run)


@pytest.mark.slow
def test_weight_averaging_resumes_to_the_same_bits(folder):
    """Validation uses the averaged weights: the run is stopped there, extended, and continued without averaging."""
    averaged = (*RUN, "callbacks=[default,ema]", "callbacks.ema.decay=0.9")
    result = forks.run(folder, *averaged, strikes=[Strike(VALIDATION_STEP, nth_validation_step(2, 2), terminate)])
    assert result.code == 143, result.err
    finish_run(folder, "resume=run")
    finish_run(folder, "resume=run", "trainer.max_steps=12")
    finish_run(folder, *averaged, "trainer.max_steps=12", "hydra.run.dir=long")
    expected, found = load_state(folder / "long", "last.ckpt"), load_state(folder / "run", "last.ckpt")
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    finish_run(folder, "resume=run", "callbacks=[default]", "trainer.max_steps=14")
    finish_run(folder, *RUN, "trainer.max_steps=14", "hydra.run.dir=plain")
    expected, found = load_state(folder / "plain", "last.ckpt"), load_state(folder / "run", "last.ckpt")
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_pending_last_validation_of_a_short_run_is_made_on_resume(folder, uninterrupted_run):
    """The only checkpoint is saved during the last validation, after all steps, so resuming only validates."""
    run = (*RUN, "callbacks.last.every_n_train_steps=1000", "trainer.val_check_interval=1000")
    assert forks.run(folder, *run, strikes=[Strike(VALIDATION_STEP, 2, terminate)]).code == 143
    assert len(read_figures(folder / "run")) == 1 + 10
    for _ in range(2):
        finish_run(folder, "resume=run")
        assert read_figures(folder / "run")[1:-1] == [row for row in read_figures(uninterrupted_run)[1:] if row[2]]
        assert len(read_figures(folder / "run")) == 1 + 10 + 1
    assert (folder / "run" / "checkpoints" / "best.ckpt").samefile(folder / "run" / "checkpoints" / "last.ckpt")


def read_step(run: Path) -> int:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]


def test_ctrl_c_saves_and_exits_with_130(folder):
    result = forks.run(folder, *RUN, strikes=[Strike(TRAINING_STEP, 14, interrupt)])
    assert result.code == 130
    assert "stopped by SIGINT after step 4" in result.out
    assert read_step(folder / "run") == 4


def test_curve_is_drawn_when_a_run_is_stopped(folder):
    """Before its first validation, and long before the next drawing by the clock."""
    assert forks.run(folder, *RUN, strikes=[Strike(TRAINING_STEP, 5, interrupt)]).code == 130
    assert (folder / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")


PREPARING = "rwkv_pl.data.datamodule:DataModule.prepare_data"
BEGINNING = "lightning.pytorch.trainer.trainer:Trainer._run_stage"
SAMPLING = "rwkv_pl.runs.train:sample_tokens"


@pytest.mark.parametrize(
    ("place", "act", "number"),
    [
        (PREPARING, interrupt, signal.SIGINT),
        (BEGINNING, terminate, TERMINATION),
        (SAMPLING, interrupt, signal.SIGINT),
        pytest.param(PREPARING, terminate, TERMINATION, marks=LONG),
        pytest.param(BEGINNING, interrupt, signal.SIGINT, marks=LONG),
        pytest.param(SAMPLING, terminate, TERMINATION, marks=LONG),
    ],
)
def test_signal_before_or_after_training_exits_at_once(folder, place, act, number):
    result = forks.run(folder, *RUN, strikes=[Strike(place, 1, act)])
    # On Windows, the default action of raise() exits with 3.
    assert result.code in (-number, 128 + number, SIGNAL_CODES[number], 3 if WINDOWS else -number)
    assert ("stopped before the first step: nothing to save" in result.err) == (
        place == BEGINNING or (place == PREPARING and act is interrupt)
    )
    assert ("stopped after the last step" in result.err) == (place == SAMPLING and act is interrupt)
    assert (folder / "run").exists() == ("prepare" not in place)
    if "sample" in place:
        assert not (folder / "run" / "sample.txt").exists()


def twice() -> None:
    interrupt()
    terminate()


def test_second_signal_exits_without_saving(folder, uninterrupted_run):
    assert forks.run(folder, *RUN, strikes=[Strike("torch:save", 2, twice)]).code in (130, 143)
    assert list((folder / "run").rglob("*.partial"))
    finish_run(folder, "resume=run")
    assert_same_run(folder / "run", uninterrupted_run)


@needs_signals
def test_data_loader_workers_ignore_signals(folder, uninterrupted_run):
    """Ctrl-C in a terminal, or a signal to the process group, also reaches the data loader workers."""
    run = (*RUN, "data.num_workers=2")
    result = forks.run(folder, *run, strikes=[Strike(TRAINING_STEP, 14, signal_all)])
    assert (result.code, result.err) == (143, "")
    finish_run(folder, "resume=run")
    assert_same_run(folder / "run", uninterrupted_run)


def signal_all() -> None:
    import multiprocessing

    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGTERM)
        os.kill(worker.pid, signal.SIGINT)
    time.sleep(0.2)
    terminate()


def requeue_signal() -> None:
    os.kill(os.getpid(), signal.SIGUSR1)


@needs_signals
@pytest.mark.parametrize("answer", [0, 1])
def test_slurm_signal_saves_and_requeues_the_job(folder, uninterrupted_run, answer):
    scontrol = folder / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f"#!/bin/sh\necho $* >> {folder}/asked\necho no such job >&2\nexit {answer}\n")
    scontrol.chmod(0o755)
    slurm = {"SLURM_JOB_ID": "17", "SLURM_NTASKS": "1", "SLURM_JOB_NAME": "rwkv", "SLURM_PROCID": "0"}
    slurm |= {"SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "here"}
    slurm["PATH"] = f"{scontrol.parent}:{os.environ['PATH']}"
    result = forks.run(folder, *RUN, strikes=[Strike(TRAINING_STEP, 14, requeue_signal)], **slurm)
    assert result.code == 0, result.err
    assert (folder / "asked").read_text() == "requeue 17\n"
    assert ("not requeued: scontrol: no such job" in result.out) == bool(answer)
    assert f"rwkv-train resume={folder / 'run'}" in result.out
    if answer == 0:
        finish_run(folder, "resume=run", **slurm)
        assert_same_run(folder / "run", uninterrupted_run)


# Multiple processes

DDP = (*RUN, "trainer=ddp", "trainer.devices=2", "trainer.max_steps=40", "trainer.accumulate_grad_batches=3")


def start_two(folder: Path, *arguments: str) -> subprocess.Popen:
    """Start a run whose second process is started by Lightning."""
    command = [str(Path(sys.executable).with_name("rwkv-train")), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=environment,
    )


@needs_signals
@pytest.mark.slow
def test_two_lightning_processes_stop_at_one_step(tmp_path):
    """The signal goes to the process that Lightning started, or to both."""
    (tmp_path / "corpus.txt").write_bytes(CORPUS)
    process = start_two(tmp_path, *DDP, "hydra.run.dir=whole")
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    for to in ("child", "group"):
        run = tmp_path / to
        process = start_two(tmp_path, *DDP, f"hydra.run.dir={to}")
        end = time.monotonic() + 600
        while not (run / "metrics.csv").exists() or len((run / "metrics.csv").read_text().splitlines()) < 12:
            assert time.monotonic() < end and process.poll() is None
            time.sleep(0.01)
        if to == "group":
            os.killpg(process.pid, signal.SIGTERM)
        else:
            (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[:1]
            os.kill(int(child), signal.SIGTERM)
        out, err = process.communicate(timeout=600)
        assert process.returncode == 143, err
        assert f"stopped by {TERMINATION.name}" in out
        process = start_two(tmp_path, f"resume={to}")
        _, err = process.communicate(timeout=600)
        assert process.returncode == 0, err
        assert_same_run(run, tmp_path / "whole")


@needs_gloo
@pytest.mark.slow
def test_resume_on_more_devices_reads_the_same_batches(folder):
    """The run stops after a few steps on one device and resumes on two, with another accumulation."""
    one = (*DDP, "trainer.devices=1", "trainer.strategy=auto", "trainer.accumulate_grad_batches=2", "model.dropout=0.0",
           "trainer.max_steps=12")  # fmt: skip
    stop = Strike(TRAINING_STEP, 10, terminate)
    assert forks.run(folder, *one, strikes=[stop]).code == 143
    two = ("trainer=ddp", "trainer.devices=2", "trainer.accumulate_grad_batches=1")
    for result in run_ranks(folder, "torchrun", f"resume={folder / 'run'}", *two):
        assert result.code == 0, result.err
    other = folder / "other"
    other.mkdir()
    (other / "corpus.txt").write_bytes(CORPUS)
    finish_run(other, *one)
    mixed, alone = read_figures(folder / "run"), read_figures(other / "run")
    assert [row[0] for row in mixed] == [row[0] for row in alone]
    loss = mixed[0].index("train/loss")
    for ours, theirs in zip(mixed[1:], alone[1:], strict=True):
        if ours[loss]:
            # float32 sums in another order, and Adam divides by small numbers.
            assert math.isclose(float(ours[loss]), float(theirs[loss]), rel_tol=1e-3)


# Random moments (slow)

RANDOM = (*RUN, "trainer.max_steps=200", "trainer.val_check_interval=40", "callbacks.last.every_n_train_steps=15")
KINDS = {
    "float32": (),
    "bf16": ("trainer.precision=bf16-mixed",),
    "averaged rwkv7": ("callbacks=[default,ema]", *RUN_SETTINGS["rwkv7"]),
}


@needs_signals
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_runs_interrupted_at_random_moments_resume_to_the_same_bits(tmp_path, kind):
    """Kill or stop the run at a random moment and resume it, again and again until it is finished."""
    draw = random.Random(kind)
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "corpus.txt").write_bytes(CORPUS)
    finish_run(tmp_path / "whole", *RANDOM, *KINDS[kind])
    moments, number = 0, 0
    while moments < 10:
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "corpus.txt").write_bytes(CORPUS)
        arguments = (*RANDOM, *KINDS[kind])
        while True:
            process = forks.start(folder, *arguments)
            process.join(draw.uniform(0.3, 2.5))
            if process.exitcode is not None:
                assert process.exitcode == 0, (folder / "err").read_text()
                break
            os.kill(process.pid, draw.choice([KILL, signal.SIGTERM, signal.SIGINT]))
            forks.finish(process, folder)
            moments += 1
            if (folder / "run" / ".hydra" / "overrides.yaml").exists():
                arguments = ("resume=run",)
        assert_same_run(folder / "run", tmp_path / "whole" / "run")
        number += 1
    print(f"{kind}: {moments} moments in {number} runs")


def resume_three_times(folder: Path, *run: str) -> None:
    """Stop in the last validation, resume, kill after its row is written, resume: it validates again."""
    assert forks.run(folder, *run, strikes=[Strike(VALIDATION_STEP, nth_validation_step(3, 2), terminate)]).code == 143
    after_its_row = Strike("rwkv_pl.training.callbacks.checkpoints:BestCheckpoint.on_validation_end", 1, kill)
    assert forks.run(folder, "resume=run", strikes=[after_its_row]).code == KILLED
    finish_run(folder, "resume=run")


def test_repeated_validation_has_one_row_in_metrics(folder, uninterrupted_run):
    resume_three_times(folder, *RUN)
    assert_same_run(folder / "run", uninterrupted_run)


def test_run_stopped_in_its_last_validation_after_max_time_validates_on_resume(folder):
    length = ("trainer.max_steps=-1", "trainer.max_time=00:00:00:02", "trainer.val_check_interval=100000")
    run = (*RUN, *length, "callbacks.last.every_n_train_steps=100000")
    assert forks.run(folder, *run, strikes=[Strike(VALIDATION_STEP, 2, terminate)]).code == 143
    finish_run(folder, "resume=run")
    last = torch.load(folder / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["rwkv_pl"]["finished"] == "time"
    assert [row[0] for row in read_figures(folder / "run")[1:] if row[-1]] == [str(last["global_step"])]
    assert (folder / "run" / "checkpoints" / "best.ckpt").exists()
    assert "is finished" in finish_run(folder, "resume=run").out


def hang_up() -> None:
    os.kill(os.getpid(), signal.SIGHUP)


@needs_signals
def test_closed_terminal_saves_and_exits_with_129(folder):
    result = forks.run(folder, *RUN, strikes=[Strike(TRAINING_STEP, 14, hang_up)])
    assert result.code == 129
    assert read_step(folder / "run") == 4


def ignore_hang_up() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


@needs_signals
def test_closed_terminal_under_nohup_is_ignored(folder, uninterrupted_run):
    ignore = Strike("rwkv_pl.runs.folder:create_run_dir", 1, ignore_hang_up)
    result = forks.run(folder, *RUN, strikes=[ignore, Strike(TRAINING_STEP, 14, hang_up)])
    assert result.code == 0, result.err
    assert_same_run(folder / "run", uninterrupted_run)


def test_best_checkpoint_is_used_if_last_is_missing(folder, uninterrupted_run):
    assert forks.run(folder, *RUN, strikes=[Strike(TRAINING_STEP, 29, kill)]).code == KILLED
    for name in ("last.ckpt", "last.prev.ckpt"):
        (folder / "run" / "checkpoints" / name).unlink()
    assert "there is no last.ckpt; resuming from" in finish_run(folder, "resume=run").out
    assert_same_run(folder / "run", uninterrupted_run)


@pytest.mark.parametrize(
    "kind",
    [pytest.param("dangling link", marks=needs_links), "folder", pytest.param("pipe", marks=needs_pipes)],
)
def test_non_file_with_a_checkpoint_name_gives_one_line_error(folder, uninterrupted_run, kind):
    shutil.copytree(uninterrupted_run, folder / "run")
    paths = [folder / "run" / "checkpoints" / name for name in ("last.ckpt", "last.prev.ckpt", "best.ckpt")]
    for path in paths:
        path.unlink()
        if kind == "dangling link":
            path.symlink_to("nowhere")
        elif kind == "folder":
            path.mkdir()
        else:
            os.mkfifo(path)
    before = (folder / "run" / "metrics.csv").read_bytes()
    result = forks.run(folder, "resume=run", "trainer.max_steps=12")
    assert (result.code, result.err.count("\n")) == (2, 1), result.err
    words = {
        "pipe": "is neither a file nor a folder",
        "folder": f"{paths[0]} is not a checkpoint in parts: rest.ckpt is missing",
    }.get(kind, f"{paths[0]} is not a file")
    assert words in result.err
    assert (folder / "run" / "metrics.csv").read_bytes() == before


def test_interrupted_start_can_be_repeated(folder, uninterrupted_run):
    """Like after a full disk: Hydra's last file exists but is empty."""
    settings = folder / "run" / ".hydra"
    settings.mkdir(parents=True)
    for name in ("config.yaml", "hydra.yaml", "overrides.yaml"):
        (settings / name).touch()
    result = forks.run(folder, "resume=run")
    assert (result.code, "repeat the command that started it" in result.err) == (2, True)
    finish_run(folder, *RUN)
    assert_same_run(folder / "run", uninterrupted_run)
