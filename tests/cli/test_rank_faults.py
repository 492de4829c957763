"""A fault in one of two processes ends both, is explained in one line, and the run resumes to the same bits."""

import os
import signal
import time
from multiprocessing.connection import wait
from pathlib import Path

import forks
import pytest
from forks import KILLED, Strike
from scheduler import environment, free_port, run_ranks
from systems import needs_scripts, needs_signals
from test_faults import CORPUS, TRAINING_STEP, assert_same_run, nth_training_step
from test_faults import RUN as ONE

TIMEOUT = 20
RUN = (*ONE, "trainer.max_steps=8", "trainer.devices=2", f"trainer.timeout={TIMEOUT}")


def fail() -> None:
    raise ValueError("a planted fault")


def stall() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


FAULTS = {"exception": fail, "SIGTERM": forks.terminate, "SIGKILL": forks.kill, "SIGSTOP": stall}
# How a rank ends does not depend on the strategy, so with fsdp each fault hits one of them.
CASES = [("ddp", fault, rank) for fault in FAULTS for rank in (0, 1)]
CASES += [("fsdp", "exception", 1), ("fsdp", "SIGTERM", 0), ("fsdp", "SIGKILL", 1), ("fsdp", "SIGSTOP", 0)]
QUICK = [("ddp", "exception", 1), ("ddp", "SIGTERM", 1)]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """unbroken(strategy): a run of two processes without a fault, made once."""
    made: dict[str, Path] = {}

    def run(strategy: str) -> Path:
        if strategy not in made:
            folder = tmp_path_factory.mktemp(strategy)
            (folder / "corpus.txt").write_bytes(CORPUS)
            arguments = (*RUN, f"trainer.strategy={strategy}", f"hydra.run.dir={folder / 'run'}")
            for result in run_ranks(folder, "torchrun", *arguments):
                assert result.code == 0, result.err
            made[strategy] = folder / "run"
        return made[strategy]

    return run


@needs_signals
@pytest.mark.parametrize(
    ("strategy", "fault", "rank"),
    [case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in CASES],
)
def test_fault_in_one_process_ends_both(tmp_path, unbroken, strategy, fault, rank):
    (tmp_path / "corpus.txt").write_bytes(CORPUS)
    run, port = tmp_path / "run", free_port()
    settings = (*RUN, f"data.path={tmp_path}/corpus.txt", f"trainer.strategy={strategy}", f"hydra.run.dir={run}")
    places, processes = [tmp_path / "rank 0", tmp_path / "rank 1"], []
    struck = tmp_path / "struck"
    strikes = [
        Strike(TRAINING_STEP, nth_training_step(5, 2), struck.touch),
        Strike(TRAINING_STEP, nth_training_step(5, 2), FAULTS[fault]),
    ]
    for each, place in enumerate(places):
        place.mkdir()
        variables = environment("torchrun", each, port)
        # The strike that is installed last acts first.
        own = strikes[::-1] if each == rank else []
        processes.append(forks.start(place, *settings, strikes=own, **variables))
    waiting = {process.sentinel: each for each, process in enumerate(processes) if (fault, each) != ("SIGSTOP", rank)}
    ended: dict[int, float] = {}
    while waiting:
        for sentinel in wait(list(waiting), timeout=300):
            ended[waiting.pop(sentinel)] = time.time()
    seconds = {each: moment - struck.stat().st_mtime for each, moment in ended.items()}
    if fault == "SIGSTOP":
        processes[rank].kill()
    results = [forks.finish(*pair) for pair in zip(processes, places, strict=True)]
    print(f"{strategy} {fault} in process {rank}: {seconds}")

    assert max(seconds.values()) < {"SIGKILL": 30, "SIGSTOP": TIMEOUT + 5}.get(fault, 60)
    is_lost = fault in ("SIGKILL", "SIGSTOP")
    speaker = 1 if is_lost and rank == 0 else 0
    assert results[1 - speaker].err == ""
    line = {
        "exception": "process 1: ValueError: a planted fault" if rank else "ValueError: a planted fault",
        "SIGKILL": f"process {rank} ended without a word (killed?)",
        "SIGSTOP": f"process {rank} did not answer within trainer.timeout={TIMEOUT} seconds",
    }
    if fault == "SIGTERM":
        assert [result.code for result in results] == [143, 143]
        assert results[0].err == "" and "stopped by SIGTERM" in results[0].out and results[1].out == ""
    else:
        err = results[speaker].err
        assert err.count("\n") == 1 and err.startswith(f"rwkv-train: {line[fault]}"), err
        assert f"rwkv-train resume={run}" in err
        assert [result.code for result in results] == [KILLED if is_lost and each == rank else 1 for each in (0, 1)]
    assert {path.name for path in run.glob("*rank*")} <= {"error-rank-0.txt", "error-rank-1.txt"}
    for result in run_ranks(tmp_path, "torchrun", f"resume={run}"):
        assert result.code == 0, result.err
    assert not list(run.glob("*rank*"))
    assert_same_run(run, unbroken(strategy))


def requeue() -> None:
    os.kill(os.getpid(), signal.SIGUSR1)


@needs_signals
@needs_scripts
@pytest.mark.slow
def test_slurm_signal_to_one_task_saves_and_requeues_the_job_once(tmp_path, unbroken):
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f"#!/bin/sh\necho $* >> {tmp_path}/asked\n")
    scontrol.chmod(0o755)
    (tmp_path / "corpus.txt").write_bytes(CORPUS)
    run, port, slurm = tmp_path / "run", free_port(), {"PATH": f"{scontrol.parent}{os.pathsep}{os.environ['PATH']}"}
    settings = (*RUN, f"data.path={tmp_path}/corpus.txt", "trainer.strategy=fsdp", f"hydra.run.dir={run}")
    places, processes = [tmp_path / "rank 0", tmp_path / "rank 1"], []
    for each, place in enumerate(places):
        place.mkdir()
        strikes = [Strike(TRAINING_STEP, nth_training_step(5, 2), requeue)] if each == 1 else []
        variables = slurm | environment("SLURM", each, port)
        processes.append(forks.start(place, *settings, strikes=strikes, **variables))
    for result in [forks.finish(*pair) for pair in zip(processes, places, strict=True)]:
        assert (result.code, result.err) == (0, "")
    job = environment("SLURM", 0, port)["SLURM_JOB_ID"]
    assert (tmp_path / "asked").read_text() == f"requeue {job}\n"
    for result in run_ranks(tmp_path, "SLURM", f"resume={run}"):
        assert result.code == 0, result.err
    assert_same_run(run, unbroken("fsdp"))
