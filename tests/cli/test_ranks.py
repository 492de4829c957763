"""Runs started by torchrun or SLURM: one folder, nothing overwritten, and no rank waits for ever."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import forks
import psutil
import pytest
from command import SMALL, TEXT
from forks import KILLED, Strike, kill
from scheduler import environment, free_port, run_ranks, start_rank
from systems import needs_gloo, needs_scripts, needs_signals

from rwkv_pl.errors import UserError
from rwkv_pl.runs import agreement, ranks

TWO = (*SMALL, "trainer=ddp", "trainer.devices=2")
SCHEDULERS = ("torchrun", "SLURM", "one command a node")


def shorten_timeout() -> None:
    agreement.TIMEOUT = 3.0


def die_slowly() -> None:
    time.sleep(1)
    kill()


IMPATIENT = Strike("rwkv_pl.cli.train:main", 1, shorten_timeout)


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "corpus.txt").write_bytes(TEXT)
    return tmp_path


def read_content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


@needs_gloo
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_two_ranks_share_one_folder_and_a_second_start_is_refused(folder, scheduler):
    run = folder / "run"
    arguments = (*TWO, f"hydra.run.dir={run}")
    for result in run_ranks(folder, scheduler, *arguments):
        assert result.code == 0, result.err
    before = read_content(run)
    assert before[".hydra/overrides.yaml"] and before["checkpoints/last.ckpt"]
    first, second = run_ranks(folder, scheduler, *arguments, "optim.lr=1")
    assert (first.code, second.code) == (2, 2), first.err + second.err
    assert first.err.count("\n") == 1 and f"use resume={run}" in first.err
    assert second.err == ""
    assert read_content(run) == before


@needs_gloo
def test_ranks_use_the_dated_folder_of_rank_0(folder):
    """Rank 1 starts seconds later, so its own dated name would differ."""
    port = free_port()
    first = start_rank(folder, "torchrun", 0, port, *TWO)
    time.sleep(1.2)
    second = start_rank(folder, "torchrun", 1, port, *TWO)
    for result in (first(), second()):
        assert result.code == 0, result.err
    assert len(list((folder / "rank 0" / "outputs").glob("*/*"))) == 1
    assert not (folder / "rank 1" / "outputs").exists()


@needs_gloo
def test_resume_of_a_run_in_use_is_refused_on_all_ranks(folder):
    from rwkv_pl.runs.folder import locked

    run = folder / "run"
    assert forks.run(folder, *SMALL, f"hydra.run.dir={run}").code == 0
    before = read_content(run)
    more = ("trainer.max_steps=6", "trainer=ddp", "trainer.devices=2")
    with locked(run):
        first, second = run_ranks(folder, "torchrun", f"resume={run}", *more)
    assert (first.code, second.code) == (2, 2), first.err + second.err
    assert "is in use by " in first.err and second.err == ""
    assert read_content(run) == before
    for result in run_ranks(folder, "torchrun", f"resume={run}", *more):
        assert result.code == 0, result.err
    assert (run / "metrics.csv").read_text().splitlines()[-1].startswith("6,")


@needs_gloo
def test_resume_latest_uses_the_choice_of_rank_0(folder):
    """Rank 0 already uses the run when rank 1 looks, so rank 1 would choose another run, or none."""
    assert forks.run(folder, *SMALL).code == 0
    port, more = free_port(), ("resume=latest", "trainer.max_steps=6", "trainer=ddp", "trainer.devices=2")
    (run,) = (folder / "outputs").glob("*/*")
    (run / "result.json").unlink()
    (run / "checkpoints" / "last.ckpt").unlink()  # a finished run is skipped
    (folder / "rank 0").mkdir()
    (folder / "outputs").rename(folder / "rank 0" / "outputs")
    ends = [start_rank(folder, "torchrun", rank, port, *more) for rank in (0, 1)]
    first, second = (end() for end in ends)
    assert (first.code, second.code) == (0, 0), first.err + second.err


def test_missing_rank_0_gives_one_line_error(folder):
    result = start_rank(folder, "torchrun", 1, port := free_port(), *TWO, strikes=[IMPATIENT])()
    assert result.code == 1
    line = f"process 1 found no process 0 at 127.0.0.1:{port} within 3 seconds: see the output of process 0"
    assert result.err == f"rwkv-train: {line}\n"


def test_missing_rank_gives_one_line_error_and_leaves_no_folder(folder):
    result = start_rank(folder, "torchrun", 0, free_port(), *TWO, strikes=[IMPATIENT])()
    assert result.code == 1
    line = "process 1 of 2 did not start within 3 seconds: see its output, and whether all have the same MASTER_ADDR"
    assert result.err == f"rwkv-train: {line}\n"
    assert not (folder / "rank 0" / "outputs").exists()


@needs_gloo
def test_error_of_a_rank_before_the_training_ends_all_and_is_printed_once(folder):
    """For example a file that is missing on one machine."""
    port = free_port()
    first = start_rank(folder, "torchrun", 0, port, *TWO, "hydra.run.dir=run")
    result = start_rank(folder, "torchrun", 1, port, *TWO, "data.path=no/", "hydra.run.dir=run")()
    done = first()
    assert (done.code, result.code, result.err) == (2, 2, "")
    assert done.err.count("\n") == 1 and done.err.startswith("rwkv-train: process 1: "), done.err
    assert not (folder / "rank 0" / "run").exists()


def test_rank_0_dying_before_its_answer_gives_one_line_error(folder):
    port = free_port()
    dies = Strike("rwkv_pl.runs.folder:create_run_dir", 1, die_slowly)
    first = start_rank(folder, "torchrun", 0, port, *TWO, strikes=[dies])
    result = start_rank(folder, "torchrun", 1, port, *TWO, strikes=[IMPATIENT])()
    assert first().code == KILLED
    assert (result.code, result.err.count("\n")) == (1, 1), result.err
    assert "process 1 lost process 0, which ended without a word" in result.err


def test_port_in_use_gives_one_line_error(folder):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = str(listener.getsockname()[1])
        result = start_rank(folder, "torchrun", 0, port, *TWO)()
    assert (result.code, result.err.splitlines()[-1].split(":")[:2]) == (
        1,
        ["rwkv-train", " process 0 can't open the store at 127.0.0.1"],
    )


def test_ranks_that_would_train_separately_are_refused(folder):
    for result in run_ranks(folder, "torchrun", *SMALL, "hydra.run.dir=run"):
        assert result.code == 2
        assert "2 processes were started, but trainer.devices x trainer.num_nodes is 1" in result.err
    assert not (folder / "rank 0" / "run").exists()


def test_worker_restarted_by_torchrun_is_refused(train, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    result = train(*SMALL)
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "torchrun's restart 1 would start again at step 0" in result.err
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"WORLD_SIZE": "2", "RANK": "1"}, "WORLD_SIZE=2 needs MASTER_ADDR and MASTER_PORT too"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two, not a whole number"),
        ({"LOCAL_RANK": "1"}, "a rank above 0 but no WORLD_SIZE above 1"),
    ],
)
def test_inconsistent_rank_environment_is_refused(train, tmp_path, monkeypatch, variables, words):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    result = train(*SMALL)
    assert (result.code, result.err.count("\n"), words in result.err) == (2, 1, True), result.err
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize("name", ["SLURM_PROCID", "NODE_RANK"])
def test_first_process_is_the_one_that_torchrun_ranks_0(monkeypatch, name):
    """Its rendezvous can give rank 0 to another node than SLURM's first."""
    for rank, node in ((0, "1"), (1, "0")):
        for variable, value in {**environment("torchrun", rank, "29500"), name: node}.items():
            monkeypatch.setenv(variable, value)
        assert ranks.is_first_process() == (ranks.current_group().rank == 0) == (rank == 0)


@pytest.fixture
def in_slurm(monkeypatch):
    """The first of two tasks. Lightning writes derived values into the environment."""
    for name, value in environment("SLURM", 0, "19500").items():
        monkeypatch.setenv(name, value)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "restored later")
        monkeypatch.delenv(name)
    return monkeypatch


def test_interactive_shell_of_slurm_names_the_fix(in_slurm):
    in_slurm.setenv("SLURM_JOB_NAME", "interactive")
    assert ranks.current_group() is None
    in_slurm.setenv("SLURM_PROCID", "1")
    with pytest.raises(UserError, match="use `srun --job-name=train`"):
        ranks.current_group()


@pytest.mark.parametrize("devices", ["trainer.devices=2", "trainer.devices=[0,1]"])
def test_batch_that_devices_cannot_share_is_refused_before_they_start(train, tmp_path, monkeypatch, devices):
    monkeypatch.setattr("rwkv_pl.runs.launch.start_processes", None)
    result = train(*SMALL, "trainer=ddp", devices, "data.batch_size=5")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "data.batch_size=5 is not a multiple of 2 = 2 device(s) x 1 accumulated" in result.err
    assert not (tmp_path / "outputs").exists()


def test_single_slurm_task_is_an_ordinary_run(in_slurm):
    assert ranks.current_group() == ranks.Group(0, 2, "127.0.0.1", 19500, by_slurm=True)
    in_slurm.setenv("SLURM_NTASKS", "1")
    assert ranks.current_group() is None
    in_slurm.setenv("SLURM_NTASKS", "2")
    in_slurm.setenv("SLURM_JOB_NAME", "bash")
    assert ranks.current_group() is None


def test_batch_script_without_srun_trains_as_one_process(in_slurm):
    ranks.refuse_sweep()
    ranks.check_world_size(1)
    in_slurm.setenv("SLURM_PROCID", "1")
    with pytest.raises(UserError, match="-m starts the processes of its jobs itself"):
        ranks.refuse_sweep()
    with pytest.raises(UserError, match="2 processes were started"):
        ranks.check_world_size(1)


@pytest.mark.slow
def test_torchrun_runs_two_ranks_and_refuses_a_second_start(folder):
    """Two ranks, then a second start: torchrun kills the ranks when one has ended, yet both exit with code 2."""
    torchrun = [str(Path(sys.executable).with_name("torchrun")), "--nproc-per-node", "2", "--master-port", free_port()]
    rwkv_train = str(Path(sys.executable).with_name("rwkv-train"))
    command = [*torchrun, "--no-python", rwkv_train, *TWO, "hydra.run.dir=run"]

    def run() -> "subprocess.CompletedProcess[str]":
        quiet = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.run(command, cwd=folder, env=quiet, capture_output=True, text=True, timeout=600)

    done = run()
    assert done.returncode == 0, done.stderr
    before = read_content(folder / "run")
    done = run()
    assert done.returncode == 1
    assert done.stderr.count("is not empty: to resume its run") == 1
    assert done.stderr.count("exitcode  : 2") == 2
    assert read_content(folder / "run") == before


def guide_job(folder: Path, tasks: int) -> Path:
    """The guide's SLURM job, for one machine and a small run, with an srun that starts the tasks here."""
    guide = Path(__file__).parents[2] / "docs" / "guides" / "runs.md"
    job = guide.read_text().partition("```bash\n#!/bin/bash\n#SBATCH")[2].partition("```")[0]
    small = f"trainer.num_nodes=1 trainer.devices={tasks} {' '.join(SMALL)}"
    for old, new in (
        ("trainer.num_nodes=4 trainer.devices=8 data.batch_size=64", small),
        ("$HOME/runs/big", str(folder / "run")),
        ("rwkv-train", f"{sys.executable} -m rwkv_pl.cli.train"),
    ):
        assert old in job
        job = job.replace(old, new)
    variables = " ".join(f"{name}={value}" for name, value in environment("SLURM", 0, free_port()).items())
    starts = [f'env {variables} SLURM_PROCID={n} SLURM_LOCALID={n} "$@" & tasks="$tasks $!"' for n in range(tasks)]
    waits = "for task in $tasks; do wait $task || code=$?; done; exit ${code:-0}"
    srun = folder / "bin" / "srun"
    srun.parent.mkdir()
    srun.write_text("\n".join(["#!/bin/bash", *starts, waits]) + "\n")
    srun.chmod(0o755)
    path = folder / "job.sh"
    path.write_text(f"#!/bin/bash\n#SBATCH{job}")
    return path


@needs_gloo
@needs_scripts
@pytest.mark.slow
def test_slurm_job_of_the_guide_starts_a_run_and_then_resumes_it(folder):
    job = guide_job(folder, tasks=2)
    variables = os.environ | {"PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"}

    def submit() -> "subprocess.CompletedProcess[str]":
        return subprocess.run(["bash", job], cwd=folder, env=variables, capture_output=True, text=True, timeout=600)

    done = submit()
    assert done.returncode == 0, done.stderr
    assert (folder / "run" / "checkpoints" / "last.ckpt").exists()
    done = submit()
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("is finished, after 4 steps") == 1


def start_own(folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    """Start a run of two processes, of which the command starts the second one."""
    command = [str(Path(sys.executable).with_name("rwkv-train")), *TWO, *arguments]
    quiet = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=folder, env=quiet, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@needs_gloo
@needs_signals
@pytest.mark.slow
def test_processes_that_the_command_starts_use_one_folder_and_end_together(folder):
    process = start_own(folder, "hydra.run.dir=run")
    assert (process.communicate(timeout=600)[1], process.returncode) == ("", 0)
    before = read_content(folder / "run")
    process = start_own(folder, "hydra.run.dir=run")
    _, err = process.communicate(timeout=600)
    assert (process.returncode, err.count("\n")) == (2, 1), err
    assert "is not empty: to resume its run" in err
    assert read_content(folder / "run") == before
    for killed in ("parent", "child"):
        process = start_own(folder, "trainer.max_steps=1000000", f"hydra.run.dir={killed}")
        end = time.monotonic() + 600
        while not (folder / killed / "metrics.csv").exists():
            assert time.monotonic() < end and process.poll() is None
            time.sleep(0.05)
        parent = psutil.Process(process.pid)
        (child,) = parent.children()
        (parent if killed == "parent" else child).kill()
        _, alive = psutil.wait_procs([parent, child], timeout=30)
        assert not alive
        rank = 0 if killed == "parent" else 1
        assert f"process {rank} ended without a word (killed?)" in process.communicate()[1]
