"""-m: every job is a process of its own, and at the end there is an answer.

A sweeper (hydra_plugins/rwkv_pl) makes the jobs, a launcher runs them: ours here, or another of Hydra's, whose workers
then start the same processes by `run_job`. A job that was begun before goes on, and one that is finished is not run
again, so that `-m resume=SWEEP` is the same sweep once more.
"""

import io
import itertools
import math
import os
import secrets
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import yaml
from hydra.core.config_loader import ConfigLoader
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from omegaconf import DictConfig, open_dict
from omegaconf.errors import OmegaConfBaseException

from rwkv_pl.cli import app
from rwkv_pl.cli.folder import DONE, begun, in_use, locked, read_result, take_folder, write_result
from rwkv_pl.config import CORPORA, RunError, UserError
from rwkv_pl.data.documents import exists
from rwkv_pl.files import publish, require_own_files
from rwkv_pl.limits import THREADS, usable_cores

MULTIRUN = "multirun.yaml"

# In the environment of a job: what it would show of its text is left to its folder.
OF_A_SWEEP = "RWKV_PL_OF_A_SWEEP"

# In the environment of a resumed sweep's jobs: their settings come from its folder, and are not trusted.
RESUMED = "RWKV_PL_RESUMED_SWEEP"

# Hydra's own part of a stored sweep that is used again: not what could start a stranger's program.
STORED = ("hydra/sweeper", "hydra.sweeper.", "hydra.sweep.subdir", "hydra.launcher.jobs=")


@dataclass
class Job:
    """overrides: the job's settings, with hydra.sweep.subdir. config_dir: the command's --config-dir."""

    overrides: list[str]
    folder: Path
    config_dir: str | None = None

    @property
    def name(self) -> str:
        return f"job {self.folder.name}"

    @property
    def settings(self) -> list[str]:
        """The overrides but for Hydra's own."""
        return [text for text in self.overrides if not text.startswith(("hydra.", "hydra/"))]


# The command


def start(argv: Sequence[str], overrides: list[Override], config_dir: str | None) -> None:
    """`rwkv-train -m`. Raises UserError, with no folder made, for what is wrong in every job."""
    fixed = [o for o in overrides if not o.is_sweep_override()]
    composed = app.compose([str(o.input_line) for o in fixed], config_dir)
    told = with_params(
        composed.hydra.sweeper.get("params") or {}, [str(o.input_line) for o in overrides if not o.is_hydra_override()]
    )
    _require_one_good([str(o.input_line) for o in fixed if o.is_hydra_override()], told, config_dir)
    _check_plugins(composed, told)
    typed = any(o.key_or_group == "hydra.sweep.dir" for o in overrides)
    _run(take_folder(Path(composed.hydra.sweep.dir).absolute(), typed), argv, composed.hydra.launcher)


def go_on(sweep: Path, later: list[Override], config_dir: str | None) -> None:
    """`rwkv-train -m resume=SWEEP`: finishes what is missing of it. Raises UserError where it is no sweep.

    Nothing that the sweep's folder says decides what is run: the settings of its jobs are taken from it, and of Hydra's
    own part no more than STORED. A config folder can have Hydra run anything, so it is typed again.
    """
    if any(not o.is_hydra_override() for o in later):
        raise UserError("-m resume= goes on with a sweep as it was: leave out other settings than hydra's")
    path = sweep / MULTIRUN
    if not path.is_file():
        hint = ": to go on with a run leave out -m" if begun(sweep) else f": it holds no {MULTIRUN}"
        raise UserError(f"resume={sweep} is no folder of a sweep{hint}")
    try:
        stored = yaml.safe_load(path.read_text(encoding="utf-8"))["hydra"]
        told, own = ([str(text) for text in stored["overrides"][part]] for part in ("task", "hydra"))
        cwd = Path(stored["runtime"]["cwd"])
        config_dir_then = app.typed_config_dir(stored["runtime"]["config_sources"])
        app.parse_overrides([*told, *own], sweep=True)
    except Exception as error:  # what is not what was written can fail in any way
        raise UserError(f"{path} is damaged: {app.one_line(error)[:200]}") from error
    if not cwd.is_absolute() or not cwd.is_dir():
        raise UserError(f"the sweep was started in {cwd}, which is gone")
    if config_dir_then and not config_dir:
        raise UserError(f"the sweep used --config-dir {config_dir_then}: give it again if you trust its files")
    require_own_files(sweep)
    os.chdir(cwd)
    told = [text for text in told if not text.startswith(("hydra.", "hydra/"))]
    own = [text for text in own if text.startswith(STORED) and "_target_" not in text]
    if any(o.key_or_group == "hydra/launcher" for o in later):
        own = [text for text in own if not text.startswith("hydra.launcher.")]
    given = [str(o.input_line) for o in later]
    launcher = app.compose([*own, *given], config_dir).hydra.launcher
    where = ["--config-dir", config_dir] if config_dir else []
    os.environ[RESUMED] = "1"
    try:
        _run(sweep, ["-m", *where, *own, *given, *told], launcher)
    finally:
        del os.environ[RESUMED]


def _run(sweep: Path, argv: Sequence[str], launcher: DictConfig) -> None:
    """Hands over to Hydra; prints what came of the sweep, whatever happens. Exits 1 where a job failed."""
    from rwkv_pl.cli.report import report

    # Hydra describes a run of its own in the job's folder, which the job's process does itself.
    ours = [f"hydra.sweep.dir={app.quoted(sweep)}", "hydra.output_subdir=null", "hydra/job_logging=none"]
    if "submitit_folder" in launcher and not any(text.startswith("hydra.launcher.submitit_folder=") for text in argv):
        # It holds pickles, which are loaded: no name that a stranger could have put his own under.
        private = sweep / f".submitit-{secrets.token_hex(8)}" / "%j"
        ours.append(f"hydra.launcher.submitit_folder={app.quoted(private)}")
    with locked(sweep):
        try:
            app.hand_over(run_job, [*argv, *ours], multirun=True)
        finally:
            done = report([sweep], sweep)
            if not done:
                print(f"what is missing is tried again by rwkv-train -m resume={sweep}")
    if not done:
        sys.exit(app.FAILED)


# The jobs


def with_params(params: Mapping[Any, Any], overrides: Sequence[str]) -> list[Override]:
    """The swept values of a config file and those of the command line, which replace them."""
    told = app.parse_overrides(overrides, sweep=True)
    keys = {override.key_or_group for override in told}
    brought = [f"{key}={value}" for key, value in params.items() if key not in keys]
    return app.parse_overrides(brought, sweep=True) + told


def product(overrides: Sequence[Override]) -> Iterator[list[str]]:
    """Every combination of the swept values, the last key's changing fastest. Intervals have none, and are left out."""
    choices = [
        [f"{o.key_or_group}={value}" for value in o.sweep_string_iterator()]
        if o.is_sweep_override()
        else [str(o.input_line)]
        for o in overrides
        if not o.is_interval_sweep()
    ]
    return (list(job) for job in itertools.product(*choices))


def _check_plugins(composed: DictConfig, told: Sequence[Override]) -> None:
    """Raises UserError where our launcher or sweeper refuses its settings."""
    ours = app.plugins()
    for part in ("launcher", "sweeper"):
        arguments = dict(composed.hydra[part])
        if plugin := ours.get(arguments.pop("_target_")):
            try:
                made = plugin(**arguments)
            except TypeError as error:
                raise UserError(f"hydra.{part} refuses its settings: {app.one_line(error)}") from error
            if part == "sweeper":
                made.check(told)


class Unbroken(io.TextIOBase):
    """A job's stdout or stderr: that the sweep which reads it was killed is no reason to end."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()

    def isatty(self) -> bool:
        return bool(self._stream.isatty())

    def fileno(self) -> int:
        return int(self._stream.fileno())

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return str(self._stream.encoding)


def foresee(job: Job) -> None:
    """Leaves in its folder what a job will be told, so that one that is never begun is not forgotten."""
    if not begun(job.folder) and not read_result(job.folder):
        job.folder.mkdir(parents=True, exist_ok=True)
        write_result(job.folder, status="waiting", overrides=job.settings)


def _require_one_good(own: list[str], told: Sequence[Override], config_dir: str | None) -> None:
    """Raises the first job's UserError where no job's settings hold."""
    first = None
    for job in product(told):
        try:
            config = app.check(app.compose([*own, *job], config_dir), app.parse_overrides(job), config_dir)
            texts = {"data.path": config.data.path, "data.val_path": config.data.val_path}
            for key, path in texts.items() if CORPORA[config.data.name].path else ():
                if path and not exists(Path(path)):
                    raise UserError(f"{key}={path}: no such file")
            for key, path in {"data.vocab_path": config.data.vocab_path, "weights": config.weights}.items():
                if path and not Path(path).exists():
                    raise UserError(f"{key}={path}: no such file")
            return
        except UserError as error:
            first = first or error
    raise first or UserError("-m has no job: a key has no value")


def composed_job(loader: ConfigLoader, config: DictConfig, overrides: list[str], number: int) -> tuple[Job, DictConfig]:
    """A job, whose folder is the one that its settings name, and its config."""
    composed = loader.load_sweep_config(config, overrides)
    with open_dict(composed):
        composed.hydra.job.num = composed.hydra.job.id = number
    sweep = Path(str(composed.hydra.sweep.dir))
    folder = sweep / str(composed.hydra.sweep.subdir)
    if not folder.resolve().is_relative_to(sweep.resolve()):
        raise UserError(f"hydra.sweep.subdir={composed.hydra.sweep.subdir} leads out of the sweep's folder")
    return Job(overrides, folder, app.typed_config_dir(composed.hydra.runtime.config_sources)), composed


def checked(loader: ConfigLoader, config: DictConfig, overrides: list[str], number: int) -> Job | JobReturn:
    """A job to launch; or its failure, where its settings do not hold, with the reason in its folder."""
    try:
        app.parse_overrides(overrides)
        job, composed = composed_job(loader, config, overrides, number)
        app.check(composed)
    except (UserError, HydraException, OmegaConfBaseException) as error:
        told = app.one_line(error)
        return _failed(Job(overrides, Path(str(config.hydra.sweep.dir), str(number))), told)
    # With it the folder is the same under every launcher, and where others before it are left out.
    subdir = job.folder.relative_to(str(config.hydra.sweep.dir))
    job.overrides.append(f"hydra.sweep.subdir={app.quoted(subdir.as_posix())}")
    return job


def run_job(config: DictConfig) -> float:
    """What another launcher than ours runs, on its machine: the job's process. Returns its objective."""
    hydra = HydraConfig.get()
    config_dir = app.typed_config_dir(hydra.runtime.config_sources)
    job = Job(list(hydra.overrides.task), Path(hydra.runtime.output_dir), config_dir)
    (ended,) = run_jobs([job], at_once=1, forward=threading.current_thread() is threading.main_thread())
    return float(ended.return_value)


def command(job: Job) -> list[str]:
    """The job's: `rwkv-train` with its settings, or resume= where it was begun before."""
    python = [sys.executable, "-m", "rwkv_pl.cli.train"]
    if begun(job.folder):
        return [*python, f"resume={app.quoted(job.folder)}"]
    where = ["--config-dir", job.config_dir] if job.config_dir else []
    return [*python, *where, *job.settings, f"hydra.run.dir={app.quoted(job.folder)}"]


@dataclass
class _Running:
    job: Job
    process: "subprocess.Popen[str]"
    signals: int = 0
    pumps: list[threading.Thread] = field(default_factory=list)
    last_line: deque[str] = field(default_factory=lambda: deque(maxlen=1))


def run_jobs(
    jobs: Sequence[Job], at_once: int, forward: bool = True, environment: Mapping[str, str] | None = None
) -> list[JobReturn]:
    """Runs the jobs, `at_once` at a time, and returns what became of each, in their order.

    environment: of the jobs, besides this process's own.

    A signal goes on to the jobs that run, which save and end, and no other is begun; then the process exits by it.
    """
    outcomes: dict[Path, JobReturn] = {}
    waiting = list(jobs)
    running: list[_Running] = []
    told: set[Path] = set()
    common = set.intersection(*(set(job.settings) for job in jobs)) if len(jobs) > 1 else set()
    with _told(forward) as signals:
        while running or (waiting and not signals):
            # A sweep that was killed leaves its jobs at work.
            at_work = [job for job in waiting if in_use(job.folder)]
            for job in at_work:
                if job.folder not in told:
                    print(f"{job.name} is still at work: waits for it to end", flush=True)
                told.add(job.folder)
            free = [job for job in waiting if job not in at_work]
            while free and len(running) + len(at_work) < at_once and not signals:
                job = free.pop(0)
                waiting.remove(job)
                result = read_result(job.folder)
                if result.get("status") in DONE:
                    outcomes[job.folder] = _outcome(job, result)
                    print(f"{job.name} was {result['status']} before", flush=True)
                else:
                    own = shlex.join(text for text in job.settings if text not in common)
                    follow = f", {len(waiting)} to follow" if waiting else ""
                    print(f"{job.name} begins{follow}: {own}", flush=True)
                    running.append(_begin(job, at_once, environment or {}))
            for entry in list(running):
                for number in signals[entry.signals :]:
                    _pass_on(entry.process, number)
                entry.signals = len(signals)
                if entry.process.poll() is not None:
                    running.remove(entry)
                    outcomes[entry.job.folder] = _ended(entry)
            time.sleep(0.05)
    if signals:
        sys.exit(128 + signals[0])
    return [outcomes[job.folder] for job in jobs]


def _begin(job: Job, at_once: int, more: Mapping[str, str]) -> _Running:
    environment = {**os.environ, OF_A_SWEEP: "1", **more}
    if at_once > 1 and not THREADS & environment.keys():
        environment["OMP_NUM_THREADS"] = str(max(1, usable_cores() // at_once))
    # Ctrl-C in a terminal is for all of its group at once: ours alone gets it, and passes it on.
    own_group: dict[str, Any] = (
        {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}  # type: ignore[attr-defined]
        if os.name == "nt"
        else {"start_new_session": True}
    )
    process = subprocess.Popen(
        command(job),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if at_once > 1 else None,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        errors="replace",
        env=environment,
        **own_group,
    )
    entry = _Running(job, process)
    prefix = f"[{job.folder.name}] " if at_once > 1 else ""
    for source, target in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
        if source:
            kept = entry.last_line if source is process.stderr else deque(maxlen=0)
            entry.pumps.append(threading.Thread(target=_pump, args=(source, target, prefix, kept), daemon=True))
            entry.pumps[-1].start()
    return entry


def _pump(source: IO[str], target: IO[str], prefix: str, kept: deque[str]) -> None:
    for line in source:
        if line.strip():
            kept.append(line.strip())
        with suppress(OSError, ValueError):  # a terminal that was closed is no reason to end a run
            target.write(prefix + line)
            target.flush()


def _ended(entry: _Running) -> JobReturn:
    for pump in entry.pumps:
        pump.join(timeout=5)  # a child of it may hold the pipe
    job, code = entry.job, entry.process.returncode
    result = read_result(job.folder)
    status = result.get("status")
    if code == 0 and status in DONE:
        print(f"{job.name} {status}: {result['objective'] or math.nan:.4f} bits per byte", flush=True)
        return _outcome(job, result)
    if status == "stopped" or (entry.signals and code in (130, 143, -signal.SIGINT, -signal.SIGTERM)):
        return _failed(job, "stopped by a signal", "stopped")
    if code < 0:
        return _failed(job, f"killed by {signal.Signals(-code).name}")
    last_line = next(iter(entry.last_line), "").removeprefix("rwkv-train: ")
    told = str(result.get("error") or last_line or f"exit code {code}")
    return _failed(job, told, shown=told == last_line)


def _outcome(job: Job, result: dict[str, Any]) -> JobReturn:
    return JobReturn(overrides=job.overrides, _return_value=result.get("objective"), status=JobStatus.COMPLETED)


def _failed(job: Job, told: str, status: str = "failed", shown: bool = False) -> JobReturn:
    """told: why. shown: has the job said so itself?"""
    print(f"{job.name} {status if shown else told if status in told else f'{status}: {told}'}", flush=True)
    # A folder in which another process is at work is that one's.
    with suppress(UserError, OSError):
        job.folder.mkdir(parents=True, exist_ok=True)
        with locked(job.folder):
            with publish(job.folder / "error.txt") as file:
                file.write(f"{told}\n".encode())
            write_result(job.folder, status=status, error=told, overrides=job.settings)
    return JobReturn(overrides=job.overrides, _return_value=RunError(told), status=JobStatus.FAILED)


def _pass_on(process: "subprocess.Popen[str]", number: int) -> None:
    with suppress(OSError):  # it has ended meanwhile
        if os.name == "nt":
            process.send_signal(signal.CTRL_BREAK_EVENT)  # type: ignore[attr-defined]
        else:
            process.send_signal(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)


@contextmanager
def _told(forward: bool) -> Iterator[list[int]]:
    """The signals that this process has received inside, as they come."""
    received: list[int] = []
    names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK") if forward else ()
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    # Under nohup a closed terminal is nothing.
    numbers = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, lambda number, _: received.append(number)) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
