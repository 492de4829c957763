"""rwkv-train -m: its jobs in separate processes, and their files."""

import codecs
import csv
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace

import forks
import psutil
import pytest
import yaml
from command import SMALL, TEXT
from forked_jobs import FORK_THE_JOBS
from forks import KILL, Strike
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.types import RunMode
from journal import open_journal
from omegaconf import OmegaConf
from systems import WINDOWS, needs_signals
from versions import VERSIONS

from hydra_plugins.rwkv_pl.study import StudySweeper, _is_drawn_from, _repair_lines, to_distribution
from rwkv_pl.cli.sweep import sweep_with_choices
from rwkv_pl.compose import CONFIG_MODULE, check_config, compose
from rwkv_pl.errors import UserError
from rwkv_pl.overrides import parse_overrides
from rwkv_pl.runs.folder import has_started
from rwkv_pl.runs.outcome import read_result
from rwkv_pl.sweeps import pool
from rwkv_pl.sweeps.jobs import Job, expand_grid, merge_params, record_failure, require_own_run
from rwkv_pl.terminal import SWEEP_JOB_ENV

QUICK = (*SMALL, "trainer.max_steps=6", "trainer.val_check_interval=3", "hydra.sweep.dir=sweep")


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "corpus.txt").write_bytes(TEXT)
    return tmp_path


@dataclass
class Sweep:
    """A running sweep, forked like its jobs. It prints into the folder where it was started."""

    folder: Path
    process: BaseProcess

    def send_signal(self, number: int) -> None:
        os.kill(self.process.pid, number)


def start(folder: Path, *arguments: str, strikes: Sequence[Strike] = ()) -> Sweep:
    return Sweep(folder, forks.start(folder, "-m", *arguments, strikes=[FORK_THE_JOBS, *strikes]))


def wait_for_end(sweep: Sweep) -> tuple[int, str]:
    result = forks.finish(sweep.process, sweep.folder)
    return result.code, result.out + result.err


def read_table(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "sweep" / "sweep.csv").open(newline="", encoding="utf-8") as file:
        return {row["run"]: row for row in csv.DictReader(file)}


def wait_for(what, seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.05)


def job_has_started(job: Path) -> bool:
    return (job / "metrics.csv").exists() and len((job / "metrics.csv").read_text().splitlines()) > 1


def find_process_id(job: Path) -> int:
    if not WINDOWS:
        return int((job / ".lock").read_text().split()[1])
    # There, nobody can read a locked file.
    return next(process.pid for process in psutil.process_iter() if str(job) in " ".join(process.cmdline()))


def test_grid_with_a_failing_job_finishes_the_others(folder):
    """Two jobs at a time: a table, a picture, failed jobs with a reason; finished jobs are not run again."""
    swept = (f"model={','.join(VERSIONS)}", "model.n_embd=0,64")
    code, out = wait_for_end(start(folder, *QUICK, *swept, "hydra.launcher.jobs=2"))
    assert code == 1, out
    found = read_table(folder)
    assert [(row["model"], row["model.n_embd"]) for row in found.values()] == [
        ("rwkv4", "0"),
        ("rwkv4", "64"),
        ("rwkv7", "0"),
        ("rwkv7", "64"),
    ]
    assert [row["status"] for row in found.values()] == ["failed", "finished", "failed", "finished"]
    assert all((row["val/bits_per_byte"] != "") == (row["status"] == "finished") for row in found.values())
    assert (folder / "sweep" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "sweep" / "0" / "error.txt").read_text() == "model.n_embd must be at least 1, got 0\n"
    for shown in ("n_embd", "bits/byte", "tokens/s", "finished", "failed", "0: model.n_embd must be at least 1, got 0"):
        assert shown in out
    job = folder / "sweep" / "1"
    assert has_started(job) and read_result(job)["objective"] == pytest.approx(float(found["1"]["val/bits_per_byte"]))
    before = (job / "metrics.csv").stat().st_mtime_ns
    code, out = wait_for_end(start(folder.parent, f"resume={folder / 'sweep'}"))
    assert (code, "job 1 is already finished" in out) == (1, True), out
    assert (job / "metrics.csv").stat().st_mtime_ns == before


def test_swept_paths_are_taken_as_typed(folder):
    names = ("1e5", "语料.txt")
    for name in names:
        (folder / name).write_bytes(TEXT)
    process = start(folder, *SMALL, f"data.path={','.join(names)}", "trainer.max_steps=1", "hydra.sweep.dir=2_0")
    code, out = wait_for_end(process)
    assert code == 0, out
    (folder / "2_0").rename(folder / "sweep")
    assert [row["data.path"] for row in read_table(folder).values()] == list(names)


def test_killed_job_does_not_affect_the_others(folder):
    process = start(folder, *QUICK, "trainer.max_steps=500", "trainer.val_check_interval=500", "model.n_embd=16,8",
                    "optim.lr=1e-2", "hydra.launcher.jobs=2", "callbacks.last.every_n_train_steps=100")  # fmt: skip
    jobs = [folder / "sweep" / name for name in "01"]
    wait_for(lambda: (jobs[0] / "checkpoints" / "last.ckpt").exists())
    os.kill(find_process_id(jobs[0]), KILL)
    code, out = wait_for_end(process)
    assert code == 1, out
    reason = "exit code 15" if WINDOWS else "killed by SIGKILL"
    assert f"job 0 failed: {reason}" in out
    assert [row["status"] for row in read_table(folder).values()] == ["failed", "finished"]
    written = (jobs[0] / "error.txt").read_text()
    assert written == f"{reason}\n" or (WINDOWS and written.startswith(f"{reason}, after the line: "))
    code, out = wait_for_end(start(folder, "resume=sweep"))
    assert code == 0, out
    assert [row["status"] for row in read_table(folder).values()] == ["finished", "finished"]
    assert not (jobs[0] / "error.txt").exists()
    assert "of which" in out, "it started again at step 0"


@pytest.mark.parametrize(
    ("code", "line", "reason"),
    [
        (7, "", "exit code 7"),
        (7, "a warning", "exit code 7, after the line: a warning"),  # a crash, or a kill on Windows
        (1, "rwkv-train: disk full", "disk full"),
        (1, "", "exit code 1"),
    ],
)
def test_reason_of_a_failed_job(tmp_path, capsys, code, line, reason):
    entry = pool._Running(Job(["seed=1"], tmp_path / "0"), SimpleNamespace(returncode=code), {})
    entry.last_line.append(line)
    assert str(pool._finish_job(entry)._return_value) == reason
    assert (tmp_path / "0" / "error.txt").read_text() == f"{reason}\n"


@needs_signals
def test_signal_stops_the_jobs_and_prints_the_table(folder):
    process = start(folder, *QUICK, "trainer.max_steps=100000", "optim.lr=1e-2,1e-3")
    wait_for(lambda: job_has_started(folder / "sweep" / "0"))
    process.send_signal(signal.SIGTERM)
    code, out = wait_for_end(process)
    assert code == 143, out
    assert "stopped by SIGTERM after step" in out and "bits/byte" in out
    assert "to finish the sweep: " in out and out.endswith(f"rwkv-train -m resume={folder / 'sweep'}\n")
    assert out.count("resume=") == 1  # no command for the job alone
    assert (folder / "sweep" / "0" / "checkpoints" / "last.ckpt").exists()
    assert [(row["optim.lr"], row["status"]) for row in read_table(folder).values()] == [
        ("0.01", "stopped"),
        ("0.001", "not started"),
    ]
    assert [path.name for path in (folder / "sweep" / "1").iterdir()] == ["result.json"]


def ignore_hang_up() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


@needs_signals
def test_closed_terminal_under_nohup_is_ignored(folder):
    process = start(folder, *QUICK, "trainer.max_steps=300", "trainer.val_check_interval=300", "optim.lr=1e-2,0",
                    strikes=[Strike("rwkv_pl.cli.train:main", 1, ignore_hang_up)])  # fmt: skip
    wait_for(lambda: job_has_started(folder / "sweep" / "0"))
    process.send_signal(signal.SIGHUP)
    code, out = wait_for_end(process)
    assert code == 1, out
    assert [row["status"] for row in read_table(folder).values()] == ["finished", "failed"]


@needs_signals
def test_study_continues_after_a_stop(folder):
    """Stop a study in its second trial and continue: no trial runs twice, the stopped one resumes in its folder."""
    study = (*QUICK, "hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "optim.lr=tag(log,interval(1e-4,3e-2))",
             "model.n_embd=8,16", "trainer.max_steps=40", "callbacks.last.every_n_train_steps=10")  # fmt: skip
    process = start(folder, *study)
    second = folder / "sweep" / "1"
    wait_for(lambda: (second / "checkpoints" / "last.ckpt").exists())
    os.kill(find_process_id(second), signal.SIGSTOP)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    os.kill(find_process_id(second), signal.SIGCONT)
    code, out = wait_for_end(process)
    assert code == 143, out
    assert [row["status"] for row in read_table(folder).values()] == ["finished", "stopped"]
    tried = read_table(folder)["1"]["optim.lr"]
    code, out = wait_for_end(start(folder, "resume=sweep", "hydra.sweeper.n_trials=3"))
    assert code == 0, out
    rows = read_table(folder)
    assert rows["1"]["optim.lr"] == tried
    assert len({(row["optim.lr"], row["model.n_embd"]) for row in rows.values()}) == 3
    # The first trial uses the config's values.
    assert (float(rows["0"]["optim.lr"]), rows["0"]["model.n_embd"]) == (6e-4, "16")
    assert {row["status"] for row in rows.values()} <= {"finished", "pruned"}

    import optuna

    storage = open_journal(folder / "sweep" / "study.journal")
    trials = optuna.load_study(study_name=None, storage=storage).get_trials()
    assert [trial.state.name for trial in trials if trial.state.name not in ("COMPLETE", "PRUNED")] == []
    for trial in trials:
        if trial.state.name == "COMPLETE":
            assert trial.value == read_result(folder / "sweep" / str(trial.number))["objective"]
            assert len(trial.intermediate_values) > 1


@pytest.mark.parametrize(
    ("space", "expected"),
    [
        (("optim.lr=tag(log,interval(1e-3,1e-1))", "seed=1,2"), {"optim.lr": 1e-2, "seed": "2"}),
        (("schedule.final_lr=0.0001,1e-3", "optim.betas=[0.8,0.9],[0.9,0.99]"),
         {"schedule.final_lr": "0.0001", "optim.betas": "[0.9,0.99]"}),
        (("optim.weight_decay=tag(log,interval(0.01,1.0))",), None),
        (("optim.weight_decay=0.1,x",), None),
        (("optim.lr=interval(0.1,0.2)",), None),
        (("model.dropout=0,0.1", "compile=true,false"), {"model.dropout": "0", "compile": "False"}),
        (("tf32=1,true", "loss_chunk_len=64,null"), {"tf32": "True", "loss_chunk_len": "null"}),
        (("schedule=constant,cosine", "logger=[none],tensorboard"), {"schedule": "cosine", "logger": "tensorboard"}),
        (("callbacks=[default,ema],[default]", "optim=adam,rwkv"), {"callbacks": "[default]", "optim": "rwkv"}),
        (("optim=adam,sgd",), None),
        (("seed=range(1,5)", "model.n_layer=range(0,13,4)"), {"seed": 2, "model.n_layer": 12}),
        (("schedule.final_lr=range(0.00002,0.0002,0.00002)",), {"schedule.final_lr": "0.0001"}),
        (("schedule.final_lr=range(1e-5,3e-4,3e-5)",), {"schedule.final_lr": "0.0001"}),
        (("optim.lr=tag(log,interval(1e-2,1))", "model.n_layer=tag(log,int(interval(1,20)))"),
         {"optim.lr": 0.01, "model.n_layer": 12}),
    ],
)  # fmt: skip
def test_first_trial_uses_the_config_values(space, expected):
    fixed = ["optim=rwkv", "schedule=cosine", "optim.lr=1e-2", "seed=2", "schedule.final_lr=1e-4"]
    sweeper = StudySweeper(n_trials=1, sampler="tpe", pruner="none", seed=1)
    loader = ConfigLoaderImpl(create_config_search_path(f"pkg://{CONFIG_MODULE}"))
    sweeper.hydra_context = SimpleNamespace(config_loader=loader)  # type: ignore[assignment]
    sweeper.config = loader.load_configuration("train", [*fixed, *space], RunMode.MULTIRUN)
    distributions = {o.key_or_group: to_distribution(o) for o in parse_overrides(space, sweep=True)}
    assert sweeper._default_params(distributions, fixed) == expected


@pytest.mark.parametrize(
    ("params", "drawn"),
    [
        ({"optim.lr": 0.02, "seed": "1"}, True),
        ({"optim.lr": 0.02}, True),
        ({"optim.lr": 0.0}, False),
        ({"optim.lr": "x"}, False),
        ({"seed": "3"}, False),
        ({"seed": None}, False),
        ({"model.n_layer": 2}, False),
    ],
)
def test_trial_parameters_are_checked_against_the_search_space(params, drawn):
    overrides = parse_overrides(["optim.lr=tag(log,interval(1e-3,1e-1))", "seed=1,2"], sweep=True)
    assert _is_drawn_from({o.key_or_group: to_distribution(o) for o in overrides}, params) == drawn


def close_stdout() -> None:
    read, write = os.pipe()
    os.close(read)
    os.dup2(write, 1)
    os.dup2(write, 2)


def test_job_survives_a_closed_stdout(folder):
    nobody = Strike("rwkv_pl.cli.train:main", 1, close_stdout)
    arguments = (*SMALL, "trainer.max_steps=3", "hydra.run.dir=run")
    result = forks.run(folder, *arguments, strikes=[nobody], **{SWEEP_JOB_ENV: "1"})
    assert (result.code, result.out + result.err) == (0, "")
    assert read_result(folder / "run")["status"] == "finished"


@pytest.mark.parametrize("change", [
    lambda text: text.replace(b"\n", b"\r"),
    lambda text: codecs.BOM_UTF8 + text.replace(b"\n", b"\r\r\n"),
    lambda text: text.rstrip(b"\n"),
    lambda text: text + b'{"op_code": 4, "user_attr": {}',
], ids=["CR", "BOM", "last line", "cut"])  # fmt: skip
def test_study_with_other_line_endings_is_kept(tmp_path, change):
    text = b'{"op_code": 0, "study_name": "sweep"}\n{"op_code": 4}\n'
    journal = tmp_path / "study.journal"
    journal.write_bytes(change(text))
    _repair_lines(journal)
    assert journal.read_bytes() == text


@pytest.mark.skipif(WINDOWS, reason="there, the jobs of a killed sweep end with it")
@pytest.mark.slow
def test_study_survives_a_killed_sweeper_and_a_partial_journal_line(folder):
    """The sweep waits for a job that the killed sweeper left running, and retries a killed trial."""
    process = start(folder, *QUICK, "hydra/sweeper=optuna", "hydra.sweeper.n_trials=2", "trainer.max_steps=400",
                    "trainer.val_check_interval=400", "optim.lr=tag(log,interval(1e-4,1e-2))",
                    "callbacks.last.every_n_train_steps=50")  # fmt: skip
    first, second = (folder / "sweep" / name for name in "01")
    wait_for(lambda: job_has_started(first))
    process.send_signal(signal.SIGKILL)
    assert wait_for_end(process)[0] == -signal.SIGKILL
    with (folder / "sweep" / "study.journal").open("a") as journal:
        journal.write('{"op_code": 4, "worker')
    process = start(folder, "resume=sweep")
    wait_for(lambda: (second / "checkpoints" / "last.ckpt").exists())
    os.kill(find_process_id(second), signal.SIGKILL)
    code, out = wait_for_end(process)
    assert code == 1, out
    assert "job 0 is still running" in out and "study.journal: removed an incomplete last line" in out
    assert [row["status"] for row in read_table(folder).values()] == ["finished", "failed"]
    tried = read_table(folder)["1"]["optim.lr"]
    code, out = wait_for_end(start(folder, "resume=sweep"))
    assert code == 0, out
    assert [row["status"] for row in read_table(folder).values()] == ["finished", "finished"]
    assert read_table(folder)["1"]["optim.lr"] == tried


@pytest.mark.skipif(not WINDOWS, reason="elsewhere they continue, and resuming waits for them")
def test_jobs_of_a_killed_sweep_end_with_it(folder):
    sweep = start(folder, *QUICK, "trainer.max_steps=100000", "seed=1,2", "hydra.launcher.jobs=2")
    wait_for(lambda: job_has_started(folder / "sweep" / "0"))
    jobs = psutil.Process(sweep.process.pid).children(recursive=True)
    sweep.process.kill()
    assert jobs and not psutil.wait_procs(jobs, timeout=60)[1]


def test_bad_trial_is_pruned(train, tmp_path, monkeypatch):
    """After three good trials, a bad one ends at its first validation; resuming reports that it was pruned."""
    import optuna

    sweep = tmp_path / "sweep"
    (sweep / "3").mkdir(parents=True)
    storage = open_journal(sweep / "study.journal")
    study = optuna.create_study(study_name="sweep", storage=storage)
    for bits in (1.0, 1.1, 1.2):
        trial = study.ask()
        trial.report(bits, step=2)
        study.tell(trial, bits)
    trial = study.ask()
    trial_info = {"number": trial.number, "id": trial._trial_id, "pruner": "median"}
    (sweep / "3" / "trial.json").write_text(json.dumps(trial_info))
    monkeypatch.setenv(SWEEP_JOB_ENV, "1")
    result = train(*SMALL, "trainer.max_steps=8", "trainer.val_check_interval=2", "hydra.run.dir=sweep/3")
    assert result.code == 0, result.err
    ended = read_result(sweep / "3")
    assert (ended["status"], ended["step"]) == ("pruned", 2)
    assert list(study.get_trials()[3].intermediate_values) == [2]
    assert study.get_trials()[3].state.name == "RUNNING"  # only the sweeper prints it
    result = train("resume=sweep/3")
    assert (result.code, "is finished, pruned" in result.out) == (0, True), result.out


@pytest.mark.parametrize(
    ("place", "has_optuna"), [("sweep/0", True), ("sweep/0", False), ("copy/0", True), ("copy", False)]
)
def test_trial_resumed_by_its_user_is_an_ordinary_run(train, tmp_path, monkeypatch, place, has_optuna):
    """Longer training of a trial, in its sweep or in a copy, leaves the study as it is and does not need optuna."""
    study, journal = StudySweeper(n_trials=1, pruner="median"), tmp_path / "sweep" / "study.journal"
    study.config = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path / "sweep")}}})
    journal.parent.mkdir()
    study.launch = lambda jobs, first: train(*SMALL, "hydra.run.dir=sweep/0")  # type: ignore[method-assign]
    study.write_multirun_yaml = lambda: None  # type: ignore[method-assign]
    study.launcher = None  # type: ignore[assignment]
    study.hydra_context = SimpleNamespace(config_loader=None)  # type: ignore[assignment]
    study.sweep(["optim.lr=1e-2,1e-3"])
    told = journal.read_bytes()
    assert b"trial_id" in told and (tmp_path / "sweep" / "0" / "trial.json").exists()
    if place != "sweep/0":
        shutil.copytree(tmp_path / "sweep" / "0", tmp_path / place)
    if not has_optuna:
        monkeypatch.setitem(sys.modules, "optuna", None)
    result = train(f"resume={place}", "trainer.max_steps=8")
    assert result.code == 0, result.err
    ended = read_result(tmp_path / place)
    assert (ended["status"], ended["step"]) == ("finished", 8)
    assert [path.read_bytes() for path in tmp_path.rglob("study.journal")] == [told]


@pytest.mark.parametrize("launcher", ["basic", pytest.param("submitit_local", marks=pytest.mark.slow)])
def test_other_launchers_run_the_same_jobs(folder, launcher):
    """Hydra's own launcher, and submitit on this machine: its workers start the same processes."""
    code, out = wait_for_end(start(folder, *QUICK, f"hydra/launcher={launcher}", "optim.lr=1e-2,0"))
    assert code == 1, out
    assert [row["status"] for row in read_table(folder).values()] == ["finished", "failed"]
    assert has_started(folder / "sweep" / "0")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("model.n_layr=2,4", "did you mean n_layer?"),
        ("+foo=1,2", "cannot add a key"),
        ("model.n_embd=0,-1", "model.n_embd must be at least 1, got 0"),
        ("model.n_embd=a,b", "model.n_embd"),
        ("optim.lr=interval(1e-4,1e-2)", "hydra/sweeper=optuna"),
        ("optim.lr=1e-3,1e-4 hydra.launcher.jobs=0", "hydra.launcher.jobs must be"),
        ("optim.lr=1e-3 hydra/sweeper=optuna", "nothing to search"),
        ("optim.lr=1e-3,1e-4 hydra/sweeper=optuna hydra.sweeper.sampler=x", "hydra.sweeper.sampler must be one of"),
        ("model=glob(*)", "list the names"),
        ("data=text data.path=nosuch optim.lr=1,2", "data.path=nosuch: no such file"),
        ("data.val_path='*.md' optim.lr=1,2", "data.val_path=*.md: no such file"),
        ("weights=nosuch seed=1,2", "weights=nosuch: no such file"),
        ("seed=1,2 --cfg job", "leave out -m"),
        ("resume=nosuch", "is not the folder of a sweep"),
        ("resume=nosuch optim.lr=1", "cannot change a sweep's settings"),
    ],
)
def test_setting_invalid_in_every_job_rejects_the_sweep(train, tmp_path, arguments, message):
    before = sorted(tmp_path.rglob("*"))
    own = () if "resume" in arguments else SMALL
    result = train("-m", *own, *arguments.split())
    assert (result.code, result.err.count("\n")) == (2, 1), result.err
    assert message in result.err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ("hydra.sweep.subdir=L${model.n_layer}", "model.n_layer=1", "seed=1,2"),
        (
            "hydra.sweep.subdir='${hydra.job.override_dirname}'",
            "hydra.job.config.override_dirname.exclude_keys=[seed]",
            "model.n_layer=1,2",
            "seed=1,2",
        ),
        ("hydra.sweep.subdir=all", "optim.lr=1e-3", "seed=1,2"),
        ("hydra.sweep.subdir='${model.n_layer}/../x'", "model.n_layer=1,2", "seed=1,2"),
    ],
)
def test_two_jobs_with_one_folder_reject_the_sweep(train, tmp_path, arguments):
    before = sorted(tmp_path.rglob("*"))
    result = train("-m", *SMALL, "hydra.sweep.dir=sweep", *arguments)
    assert (result.code, result.err.count("\n")) == (2, 1), result.err
    assert "seed=1, one with" in result.err and "seed=2: add the settings that differ to hydra.sweep" in result.err
    assert sorted(tmp_path.rglob("*")) == before


def test_setting_that_only_swept_files_have_is_part_of_every_job():
    texts = ["schedule=cosine,linear", "schedule.final_lr=1e-6", "schedule.warmup_steps=2", "optim.betas=[0.9,0.95]"]
    tied = sweep_with_choices(parse_overrides(texts, sweep=True), None)
    assert tied == [texts[0], "schedule.final_lr=choice(1e-6)", *texts[2:]]
    jobs = list(expand_grid(parse_overrides(tied, sweep=True)))
    assert [check_config(compose(job)).schedule.final_lr for job in jobs] == [1e-6, 1e-6]


def write_sweep(folder: Path, *task: str, own: Sequence[str] = ()) -> None:
    """Write multirun.yaml into folder/sweep."""
    (folder / "sweep").mkdir(exist_ok=True)
    stored = {
        "overrides": {"task": list(task), "hydra": list(own)},
        "runtime": {"cwd": str(folder), "config_sources": []},
    }
    (folder / "sweep" / "multirun.yaml").write_text(yaml.safe_dump({"hydra": stored}))


@pytest.mark.parametrize("own", [(), ("hydra/sweeper=optuna", "hydra.sweeper.n_trials=1")])
def test_run_of_other_settings_is_not_taken_for_a_job(train, run, tmp_path, own):
    """The fixture's run has finished, with other settings than the sweep's first job."""
    write_sweep(tmp_path, *SMALL, "seed=1,2", own=own)
    run.rename(tmp_path / "sweep" / "0")
    before = read_result(tmp_path / "sweep" / "0")
    result = train("-m", "resume=sweep")
    assert result.code == 2
    assert f"{tmp_path / 'sweep' / '0'} holds another run, which differs in seed: move" in result.err
    assert read_result(tmp_path / "sweep" / "0") == before
    assert not (tmp_path / "sweep" / "1").exists()


def test_failure_of_a_job_is_not_written_into_the_folder_of_another(run, tmp_path):
    record_failure(Job([*SMALL, "seed=3"], run), "model.n_embd must be at least 1, got 0")
    assert read_result(run)["status"] == "finished" and not (run / "error.txt").exists()
    record_failure(Job(list(SMALL), run), "killed")
    assert read_result(run)["status"] == "failed"


def test_finished_job_is_recognised_with_other_quotes(run):
    require_own_run(Job(["data.path='corpus.txt'" if "data.path" in text else text for text in SMALL], run))
    require_own_run(Job([*SMALL, "plugins=[json]", "hydra.sweep.subdir=0"], run))


def test_jobs_are_the_product_of_swept_values():
    overrides = parse_overrides(["a=1,2", "b='x,y'", "c=choice(3,4)", "d=range(0,2)"], sweep=True)
    jobs = list(expand_grid(overrides))
    assert len(jobs) == 8
    assert jobs[1] == ["a=1", "b='x,y'", "c=3", "d=1"]


def test_typed_values_replace_swept_values_of_a_file():
    overrides = merge_params({"a": "1,2", "b": "3,4"}, ["b=5"])
    assert list(expand_grid(overrides)) == [["a=1", "b=5"], ["a=2", "b=5"]]


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("x=int(interval(1,8))", "IntDistribution(high=8, log=False, low=1, step=1)"),
        ("x=tag(log,interval(1e-4,1e-2))", "FloatDistribution(high=0.01, log=True, low=0.0001, step=None)"),
        ("x=interval(0.5,1)", "FloatDistribution(high=1.0, log=False, low=0.5, step=None)"),
        ("x=range(2,9,3)", "IntDistribution(high=8, log=False, low=2, step=3)"),
        ("x=a,b", "CategoricalDistribution(choices=('a', 'b'))"),
        ("x=1e-3,3e-4", "CategoricalDistribution(choices=('0.001', '0.0003'))"),
    ],
)
def test_optuna_search_space_is_parsed(typed, expected):
    from hydra_plugins.rwkv_pl.study import to_distribution

    (override,) = parse_overrides([typed], sweep=True)
    assert repr(to_distribution(override)) == expected


def test_invalid_search_space_gives_an_error():
    from hydra_plugins.rwkv_pl.study import to_distribution

    (override,) = parse_overrides(["optim.lr=tag(log,interval(0.0,1.0))"], sweep=True)
    with pytest.raises(UserError, match="invalid search space"):
        to_distribution(override)


@pytest.mark.parametrize(
    "change",
    [
        {"sweeper": ["++hydra.callbacks.x._target_=os.system"]},
        {"sweeper": ["hydra.callbacks={x:{_target_:os.mkdir,path:executed}}"]},
        {"sweeper": ["hydra.sweeper._target_=os.mkdir"]},
        {"sweeper": ["hydra/launcher=submitit_local", "hydra.launcher.setup=['touch executed']"]},
        {"sweeper": ["hydra.sweep.subdir=../../executed"]},
        {"task": ["callbacks.x={_target_:os.mkdir,path:executed}", "optim.lr=1,2"]},
        {"task": [*SMALL, "trainer.max_steps=1", "hydra.run.dir=executed"]},
        {"task": 3},
    ],
)
def test_untrusted_sweep_executes_no_code(folder, change):
    stored = {
        "overrides": {"task": [*SMALL, "trainer.max_steps=0"], "hydra": []},
        "runtime": {"cwd": str(folder), "config_sources": []},
    }
    stored["overrides"]["hydra"] = change.get("sweeper", [])
    stored["overrides"]["task"] = change.get("task", stored["overrides"]["task"])
    (folder / "sweep").mkdir()
    (folder / "sweep" / "multirun.yaml").write_text(yaml.safe_dump({"hydra": stored}))
    code, out = wait_for_end(start(folder, "resume=sweep"))
    # A setting of the run folder would be mistaken for the job's own.
    assert code in ((0,) if "hydra.run.dir=executed" in str(change) else (1, 2)), out
    assert "Traceback" not in out
    assert not (folder / "executed").exists() and not (folder.parent / "executed").exists()


def test_second_sweep_in_a_folder_is_refused(train, tmp_path):
    from rwkv_pl.runs.folder import locked

    (tmp_path / "sweep").mkdir()
    stored = {
        "overrides": {"task": ["optim.lr=1"], "hydra": []},
        "runtime": {"cwd": str(tmp_path), "config_sources": []},
    }
    (tmp_path / "sweep" / "multirun.yaml").write_text(yaml.safe_dump({"hydra": stored}))
    with locked(tmp_path / "sweep"):
        result = train("-m", "resume=sweep")
    assert (result.code, "is in use by process" in result.err) == (2, True), result.err


def test_run_and_sweep_folders_are_not_interchangeable(train, tmp_path):
    assert train(*SMALL, "trainer.max_steps=1", "hydra.run.dir=run").code == 0
    result = train("-m", "resume=run")
    assert (result.code, "it is a run; leave out -m" in result.err) == (2, True)
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "multirun.yaml").write_text("{}")
    result = train("resume=sweep")
    assert (result.code, "-m resume=" in result.err) == (2, True)


def test_result_of_a_single_run_is_stored(train, tmp_path):
    assert train(*SMALL, "hydra.run.dir=run").code == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["status"], result["ended"], result["step"]) == ("finished", "length", 4)
    assert train(*SMALL, "hydra.run.dir=next", "optim.lr=1e30").code == 1
    result = json.loads((tmp_path / "next" / "result.json").read_text())
    assert result["status"] == "failed" and "is not finite" in result["error"]
