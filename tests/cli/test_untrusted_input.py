"""A folder from somebody else: none of its content is executed, and it cannot cause writes outside of it.

The folder is a sweep's, a run's, or the one in which a command or its jobs start. Hostile code creates `executed`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import forks
import pytest
import torch
import yaml
from command import SMALL, TEXT
from forked_jobs import FORK_THE_JOBS
from journal import open_journal
from systems import needs_links, needs_pipes, needs_scripts

from rwkv_pl.environment import safe_import_path
from rwkv_pl.errors import UserError
from rwkv_pl.files import atomic_write, require_own_files
from rwkv_pl.overrides import parse_overrides
from rwkv_pl.runs import build
from rwkv_pl.runs.outcome import read_result
from rwkv_pl.training.checkpoint_io import DurableCheckpointIO
from rwkv_pl.training.curve import draw_curve


def command_line(name: str, *arguments: str) -> list[str]:
    """The command line of rwkv-NAME. -P: like the installed program, it imports nothing from the current folder."""
    return [sys.executable, "-P", "-m", f"rwkv_pl.cli.{name}", *arguments]


# Any Python process that looks for modules in the folder imports these, at the latest with rwkv_pl itself.
MODULES = ("sitecustomize", "usercustomize", "yaml", "torch", "numpy", "rwkv_pl", "lightning", "submitit")


@pytest.fixture
def hostile(tmp_path) -> Path:
    """A folder of modules; each adds its name to executed."""
    folder = tmp_path / "hostile"
    folder.mkdir()
    for name in MODULES:
        (folder / f"{name}.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'a').write('{name} ')\n")
    (folder / "corpus.txt").write_bytes(TEXT)
    return folder


def write_sweep(folder: Path, cwd: Path, task=(), own=(), config_dir: Path | None = None) -> Path:
    sources = [{"path": str(config_dir), "provider": "command-line", "schema": "file"}] if config_dir else []
    stored = {
        "overrides": {"task": [*SMALL, "trainer.max_steps=1", *task], "hydra": list(own)},
        "runtime": {"cwd": str(cwd), "config_sources": sources},
    }
    folder.mkdir()
    (folder / "multirun.yaml").write_text(yaml.safe_dump({"hydra": stored}))
    return folder


def resume_sweep(sweep: Path, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command_line("train", "-m", f"resume={sweep}", *arguments),
        cwd=sweep.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=6000,
    )


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_jobs_and_their_child_processes_import_nothing_from_the_start_folder(hostile, tmp_path, devices):
    """Relative and empty entries of PYTHONPATH still mean the folder of the command, not that of its jobs."""
    sweep = write_sweep(tmp_path / "sweep", hostile, ["trainer=ddp", "trainer.devices=2"] if devices == 2 else [])
    (tmp_path / "mine").mkdir()
    before = os.environ["PYTHONPATH"].split(os.pathsep) if "PYTHONPATH" in os.environ else []
    done = resume_sweep(sweep, PYTHONPATH=os.pathsep.join(("mine", "", *before)))
    assert done.returncode == 0, done.stdout + done.stderr
    # A job with two devices starts a child process.
    assert [path.name for path in sweep.iterdir() if path.is_dir()] == ["0"]
    assert read_result(sweep / "0")["status"] == "finished"
    assert not (tmp_path / "executed").exists(), (tmp_path / "executed").read_text()


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.slow
def test_submitit_workers_load_no_planted_pickles(hostile, tmp_path):
    """submitit would load a pickled result that somebody planted for the job."""
    import pickle

    sweep = write_sweep(tmp_path / "sweep", hostile)
    planted = pickle.dumps(("success", Payload(tmp_path / "executed")))
    for number in range(os.getpid(), os.getpid() + 500):
        folder = sweep / ".submitit" / str(number)
        folder.mkdir(parents=True)
        (folder / f"{number}_0_result.pkl").write_bytes(planted)
        (folder / f"{number}_0_result.pkl.save_tmp").write_bytes(planted)
    done = resume_sweep(sweep, "hydra/launcher=submitit_local")
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (tmp_path / "executed").exists()


EVIL = "# @package _global_\nhydra: {callbacks: {x: {_target_: os.mkdir, path: executed}}}\n"


@pytest.fixture
def evil(tmp_path) -> Path:
    """A config folder whose experiment, sweeper and data files make Hydra create the folder executed."""
    for group in ("experiment", "hydra/sweeper", "data"):
        (tmp_path / "evil" / group).mkdir(parents=True)
        (tmp_path / "evil" / group / "evil.yaml").write_text(EVIL)
    return tmp_path / "evil"


def relative_path_to(path: Path) -> str:
    """Hydra resolves the path from its own config folder."""
    return "/".join([*[".."] * 30, *path.parts[1:]])


@pytest.mark.parametrize("where", ["task", "own"])
@pytest.mark.parametrize("how", ["upwards", "absolute", "by scheme", "of a list", "of a sweep"])
def test_group_choice_must_be_a_name_not_a_path(train, tmp_path, evil, how, where):
    file = evil / ("experiment" if where == "task" else "hydra/sweeper") / "evil"
    choice = {
        "upwards": relative_path_to(file),
        "absolute": str(file),
        "by scheme": f"'file:{file}'",
        "of a list": f"[{relative_path_to(file)}]",
        "of a sweep": f"{relative_path_to(file)},x",
    }[how]
    key = "experiment" if where == "task" else "hydra/sweeper"
    write_sweep(tmp_path / "sweep", tmp_path, **{where: [f"{key}={choice}"]})
    for command in (["-m", "resume=sweep"], ["-m", *SMALL, f"{key}={choice}"]):
        result = train(*command)
        assert (result.code, result.err.count("\n")) == (2, 1), result.err
        # A swept setting of Hydra is refused before its names are looked at; a long message is cut.
        is_swept = (how, where) == ("of a sweep", "own")
        words = key if is_swept else f"{key} takes the name of a file, not a path"
        assert words in result.err
    assert not (tmp_path / "executed").exists()


def test_evaluation_takes_no_path_from_a_run(evaluate, train, tmp_path, evil):
    assert train(*SMALL, "trainer.max_steps=1", "hydra.run.dir=run").code == 0
    config = tmp_path / "run" / ".hydra" / "config.yaml"
    stored = yaml.safe_load(config.read_text())
    for name in (relative_path_to(evil / "data" / "evil"), None):
        stored["data"].pop("name", None)
        config.write_text(yaml.safe_dump(stored | {"data": stored["data"] | ({"name": name} if name else {})}))
        result = evaluate("weights=run")
        assert result.code in (0, 2) and "Traceback" not in result.err
    assert not (tmp_path / "executed").exists()


def test_resumed_sweep_needs_its_config_dir_typed_again(train, tmp_path, evil):
    """The files can do anything, so the user must type the folder to trust it."""
    write_sweep(tmp_path / "sweep", tmp_path, ["experiment=evil"], config_dir=evil)
    result = train("-m", "resume=sweep")
    assert (result.code, result.err.count("\n")) == (2, 1), result.err
    assert f"--config-dir {evil}: give it again if you trust its files" in result.err
    assert not (tmp_path / "executed").exists()


def test_study_journal_can_only_set_searched_settings(train, tmp_path, evil):
    import optuna

    own = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=2"]
    sweep = write_sweep(tmp_path / "sweep", tmp_path, ["optim.lr=interval(1e-4,1e-2)"], own)
    storage = open_journal(sweep / "study.journal")
    study = optuna.create_study(study_name="sweep", storage=storage)
    study.ask(
        {"experiment": optuna.distributions.CategoricalDistribution([relative_path_to(evil / "experiment" / "evil")])}
    )
    result = train("-m", "resume=sweep")
    assert result.code == 2 and "is from another search" in result.err, result.err
    assert not (tmp_path / "executed").exists() and not (sweep / "0").exists()


@pytest.mark.parametrize(
    "task",
    [
        "callbacks.best.filename=../../../elsewhere",
        "logger.tensorboard.save_dir='{elsewhere}',x",
        "logger.tensorboard.save_dir=${{oc.env:NONE_OF_THESE,{elsewhere}}}",
        "callbacks.best={{dirpath:{elsewhere}}}",
        "logger=mlflow logger.mlflow.tracking_uri=mlruns",
    ],
)
def test_jobs_of_a_resumed_sweep_write_only_into_their_folders(tmp_path, task):
    """Only the resolved setting counts, not how it is written."""
    elsewhere = tmp_path / "elsewhere"
    (tmp_path / "corpus.txt").write_bytes(TEXT)
    sweep = write_sweep(tmp_path / "sweep", tmp_path, task.format(elsewhere=elsewhere).split())
    before = {path.name for path in tmp_path.iterdir()} | {"out", "err"}
    result = forks.run(tmp_path, "-m", "resume=sweep", strikes=[FORK_THE_JOBS])
    assert result.code == 1, result.out + result.err
    assert "is outside of" in (sweep / "0" / "error.txt").read_text()
    assert {path.name for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("task", "own", "words"),
    [
        ([], ["hydra.sweeper.params={logger.tensorboard.save_dir: '/tmp/elsewhere'}"], "Could not override"),
        ([], ["hydra.sweeper.params={hydra.callbacks: '{}'}"], "Could not override"),
        (["experiment@hydra.callbacks=quickstart"], [], "leave out the @"),
    ],
)
def test_stored_sweep_cannot_change_hydra_settings(train, tmp_path, task, own, words):
    sweep = write_sweep(tmp_path / "sweep", tmp_path, task, own)
    result = train("-m", "resume=sweep")
    assert (result.code, result.err.count("\n"), words in result.err) == (2, 1, True), result.err
    assert [path.name for path in sweep.iterdir()] == ["multirun.yaml"]


def test_sweep_with_a_relative_start_folder_is_refused(train, tmp_path):
    write_sweep(tmp_path / "sweep", Path("sweep"))
    result = train("-m", "resume=sweep")
    assert (result.code, "the sweep was started in sweep, which no longer exists" in result.err) == (2, True), (
        result.err
    )


@needs_links
def test_links_out_of_a_run_folder_are_refused(train, tmp_path, run):
    target, outside = tmp_path / "precious", tmp_path / "outside"
    target.write_text("precious\n")
    outside.mkdir()
    for name in ("train.log", "fit-profile.txt", "metrics.csv", ".lock", "checkpoints"):
        path, aside = run / name, run / "aside"
        if path.exists():
            path.rename(aside)
        path.symlink_to(outside if name == "checkpoints" else target)
        result = train("resume=run", "trainer.max_steps=6")
        assert (result.code, result.err.count("\n")) == (2, 1), result.err
        assert f"{path} is a link out of {run}" in result.err
        path.unlink()
        if aside.exists():
            aside.rename(path)
    assert target.read_text() == "precious\n" and not list(outside.iterdir())
    (run / "inside").symlink_to(run / "train.log")
    assert train("resume=run", "trainer.max_steps=6").code == 0


@needs_links
@needs_pipes
def test_linked_job_folder_and_pipe_as_result_are_refused(train, tmp_path):
    sweep, outside = write_sweep(tmp_path / "sweep", tmp_path), tmp_path / "outside"
    outside.mkdir()
    (sweep / "0").symlink_to(outside)
    result = train("-m", "resume=sweep")
    assert (result.code, f"{sweep / '0'} is a link out of {sweep}" in result.err) == (2, True), result.err
    assert not list(outside.iterdir())
    (sweep / "0").unlink()
    (sweep / "0").mkdir()
    os.mkfifo(sweep / "0" / "result.json")
    result = train("-m", "resume=sweep")
    assert (result.code, "is neither a file nor a folder" in result.err) == (2, True), result.err
    done = subprocess.run(command_line("report", "sweep"), cwd=tmp_path, capture_output=True, timeout=600)
    assert done.returncode in (0, 2)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("logger.tensorboard.save_dir", "{outside}"),
        ("logger.tensorboard.name", "../../x"),
        ("callbacks.best.filename", "../../x"),
        ("logger.tensorboard.version", "sqlite:////{outside}"),
        ("logger.tensorboard.version", "file:{outside}"),
        ("callbacks.best.dirpath", ["{outside}"]),
    ],
)
def test_callbacks_and_loggers_of_a_stored_run_write_only_into_its_folder(train, tmp_path, run, key, value):
    outside = tmp_path / "outside"
    text = "".join(value).format(outside=outside)
    value = text if isinstance(value, str) else [text]
    config = run / ".hydra" / "config.yaml"
    stored = yaml.safe_load(config.read_text())
    group, name, argument = key.split(".")
    stored[group][name][argument] = value
    config.write_text(yaml.safe_dump(stored))
    result = train("resume=run", "trainer.max_steps=6")
    assert (result.code, result.err.count("\n")) == (2, 1), result.err
    assert f"{key}={text} is outside of {run}: type it again" in result.err
    if argument == "save_dir":
        assert train("resume=run", "trainer.max_steps=6", f"{key}={value}").code == 0
        assert list(outside.iterdir())


@needs_links
def test_no_file_is_written_through_a_link(tmp_path):
    """A link to any other file may have the name of the temporary file."""
    precious = tmp_path / "precious"
    precious.write_text("precious\n")
    (tmp_path / "sweep.csv.partial").symlink_to(precious)
    with atomic_write(tmp_path / "sweep.csv") as file:
        file.write(b"new\n")
    assert precious.read_text() == "precious\n"
    assert (tmp_path / "sweep.csv").read_text() == "new\n" and not (tmp_path / "sweep.csv").is_symlink()


@needs_links
def test_resume_latest_does_not_touch_link_targets(train, tmp_path, run):
    """Taking a run's folder removes the temporary files of a killed process."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "precious.partial").touch()
    (run / "checkpoints").rename(run / "aside")
    (run / "checkpoints").symlink_to(tmp_path / "outside")
    (run / "result.json").unlink()  # like a killed run
    (tmp_path / "outputs").mkdir()
    run.rename(tmp_path / "outputs" / "run")
    result = train("resume=latest")
    assert (result.code, "is a link out of" in result.err) == (2, True), result.err
    assert (tmp_path / "outside" / "precious.partial").exists()


def test_quoted_file_names_are_accepted_and_paths_refused():
    (chosen,) = parse_overrides(["schedule='cosine','constant'"], sweep=True)
    assert chosen.is_sweep_override()
    with pytest.raises(UserError, match="takes the name of a file"):
        parse_overrides(["schedule='../x','constant'"], sweep=True)


@needs_links
def test_wandb_link_to_its_own_log_is_allowed(tmp_path):
    (tmp_path / "wandb" / "logs").mkdir(parents=True)
    (tmp_path / "wandb" / "logs" / "debug-core.log").symlink_to("/nowhere/else")
    require_own_files(tmp_path)
    (tmp_path / "wandb" / "logs" / "other.txt").symlink_to("/nowhere/else")
    with pytest.raises(UserError, match="is a link out of"):
        require_own_files(tmp_path)


def test_checkpoint_cannot_name_files_of_another_folder(tmp_path):
    """ModelCheckpoint would delete these files as its worse checkpoints."""
    models = {str(tmp_path / "run" / "a.ckpt"): torch.tensor(1.0), str(tmp_path / "precious"): torch.tensor(2.0)}
    state = {"dirpath": str(tmp_path / "run"), "best_k_models": models}
    torch.save({"callbacks": {"ModelCheckpoint": state, "other": None}}, tmp_path / "last.ckpt")
    loaded = DurableCheckpointIO().load_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert list(loaded["callbacks"]["ModelCheckpoint"]["best_k_models"]) == [str(tmp_path / "run" / "a.ckpt")]


@needs_scripts
def test_git_is_not_run_in_the_current_folder(tmp_path, monkeypatch):
    """git runs the programs that a repository's config names."""
    script = tmp_path / "monitor"
    script.write_text(f"#!/bin/sh\ntouch {tmp_path / 'executed'}\n")
    script.chmod(0o755)
    for words in (
        "init -q",
        f"config core.fsmonitor {script}",
        "-c user.name=x -c user.email=x commit -q --allow-empty -m x",
    ):
        subprocess.run(["git", *words.split()], cwd=tmp_path, check=True)
    (tmp_path / "executed").unlink(missing_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(build, "__file__", "/usr/lib/python3/dist-packages/rwkv_pl/runs/build.py")
    assert "git" not in build.describe_code()
    assert not (tmp_path / "executed").exists()


def test_pictures_ignore_a_local_matplotlibrc(tmp_path):
    """A matplotlibrc in the current folder can enable LaTeX."""
    import matplotlib

    with matplotlib.rc_context({"text.usetex": True}):
        draw_curve([{"step": 1.0, "tokens": 1.0, "train/bits_per_byte": 2.0}], tmp_path / "loss.png", {})
    assert (tmp_path / "loss.png").exists()


def test_import_path_of_a_process_and_its_children_excludes_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(("mine", "", "/abs")))
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    monkeypatch.syspath_prepend("relative")
    with safe_import_path():
        assert os.environ["PYTHONSAFEPATH"] == "1"
        absolute = [str(path) for path in (tmp_path / "mine", tmp_path, Path("/abs").absolute())]
        assert os.environ["PYTHONPATH"].split(os.pathsep) == absolute
        assert all(Path(entry).is_absolute() for entry in sys.path)
    assert "PYTHONSAFEPATH" not in os.environ and "relative" in sys.path


def test_entry_points_below_the_current_folder_are_ignored(tmp_path):
    """An editable install leaves a relative name on sys.path; torch calls every entry point of torch.backends."""
    finder = next((name for name in sys.path if name.startswith("__editable__")), None)
    if finder is None:
        pytest.skip("not an editable install")
    info = tmp_path / finder / "evil-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: evil\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[torch.backends]\nx = antigravity:fly\n")
    code = (
        "import os, sys; from rwkv_pl.environment import safe_import_path\n"
        "with safe_import_path():\n import torch, antigravity"
    )
    (tmp_path / "antigravity.py").write_text("def fly(): open('executed', 'w')")
    for safe, found in (("", True), ("1", False)):
        lines = code if safe else "import torch"
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        subprocess.run([sys.executable, "-P", "-c", lines], cwd=tmp_path, env=environment, check=True, timeout=600)
        assert (tmp_path / "executed").exists() == found
        (tmp_path / "executed").unlink(missing_ok=True)


@needs_links
def test_report_does_not_write_through_a_planted_link(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("precious\n")
    sweep = write_sweep(tmp_path / "sweep", tmp_path)
    (sweep / "0").mkdir()
    (sweep / "0" / "result.json").write_text(json.dumps({"status": "failed", "error": "x"}))
    (sweep / "sweep.csv.partial").symlink_to(precious)
    done = subprocess.run(command_line("report", "sweep"), cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and (sweep / "sweep.csv").exists(), done.stderr
    assert precious.read_text() == "precious\n"


def test_stored_run_downloads_only_from_and_to_typed_places(train, evaluate, tmp_path):
    """A stored run could name any folder, and a URL that sends environment variables away."""
    assert train(*SMALL, "hydra.run.dir=run").code == 0
    path = tmp_path / "run" / ".hydra" / "config.yaml"
    stored = yaml.safe_load(path.read_text())
    elsewhere = tmp_path / "elsewhere"
    stored["data"] |= {"name": "enwik8", "path": str(elsewhere), "url": "http://127.0.0.1:1/${oc.env:PATH}"}
    path.write_text(yaml.safe_dump(stored))
    for result in (train("resume=run", "trainer.max_steps=9"), evaluate("weights=run")):
        assert (result.code, result.err.count("\n")) == (2, 1), result.err
        assert "has no enwik8; to download it, if you trust this run, type data.path=" in result.err
    assert not elsewhere.exists()
    result = train("resume=run", "trainer.max_steps=9", f"data.path={elsewhere}")
    assert (result.code, "type data.url=" in result.err) == (2, True), result.err
    result = train("resume=run", "trainer.max_steps=9", f"data.path={elsewhere}", "data.url=http://127.0.0.1:1/zip")
    assert (result.code, "cannot download http://127.0.0.1:1/zip" in result.err) == (2, True), result.err


@pytest.mark.parametrize("task", ["hydra={job:{name:'../../VICTIM'}}", "hydra={sweep:{dir:elsewhere}}"])
def test_stored_sweep_cannot_set_a_whole_hydra_group(train, tmp_path, task):
    sweep = write_sweep(tmp_path / "sweep", tmp_path, [task])
    before = {path.name for path in tmp_path.rglob("*")}
    result = train("-m", f"resume={sweep}")
    assert (result.code, result.err.count("\n"), "one by one" in result.err) == (2, 1, True), result.err
    assert {path.name for path in tmp_path.rglob("*")} == before


def test_callbacks_of_hydra_in_a_stored_run_execute_nothing(train, tmp_path, run):
    path = run / ".hydra" / "hydra.yaml"
    stored = yaml.safe_load(path.read_text())
    stored["hydra"]["callbacks"] = {"x": {"_target_": "os.mkdir", "path": str(tmp_path / "executed")}}
    path.write_text(yaml.safe_dump(stored))
    result = train("resume=run", "trainer.max_steps=5")
    assert result.code == 0, result.err
    assert not (tmp_path / "executed").exists()
