"""Runs the jobs of a sweep, each as a separate `rwkv-train` process, several at a time."""

import math
import os
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

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig

from rwkv_pl import windows
from rwkv_pl.limits import THREAD_VARIABLES, usable_cores
from rwkv_pl.runs.folder import has_started, is_in_use
from rwkv_pl.runs.outcome import DONE_STATUSES, read_result
from rwkv_pl.sweeps.jobs import Job, record_failure, require_own_run
from rwkv_pl.terminal import BAD_INPUT, FAILED, SIGNAL_CODES, SWEEP_JOB_ENV, quote_override
from rwkv_pl.user_files import typed_config_dir

# Of a job that a signal ended, also before it could save. The last one is Windows' STATUS_CONTROL_C_EXIT.
STOPPED_CODES = {*SIGNAL_CODES.values(), -signal.SIGINT, -signal.SIGTERM, 0xC000013A}


def run_job(config: DictConfig) -> float:
    """Run one job's process and return its objective. Other launchers than ours call it on their machines."""
    hydra = HydraConfig.get()
    config_dir = typed_config_dir(hydra.runtime.config_sources)
    job = Job(list(hydra.overrides.task), Path(hydra.runtime.output_dir), config_dir)
    (ended,) = run_jobs([job], at_once=1, forward=threading.current_thread() is threading.main_thread())
    return float(ended.return_value)


def job_command(job: Job) -> list[str]:
    """Return the command line of a job: `rwkv-train` with its settings, or with resume= if it has started before."""
    python = [sys.executable, "-m", "rwkv_pl.cli.train"]
    if has_started(job.folder):
        return [*python, f"resume={quote_override(job.folder)}", *job.plugins]
    where = ["--config-dir", job.config_dir] if job.config_dir else []
    return [*python, *where, *job.settings, f"hydra.run.dir={quote_override(job.folder)}"]


@dataclass
class _Running:
    job: Job
    process: "subprocess.Popen[str]"
    result_before: dict[str, Any]
    signals: int = 0
    pumps: list[threading.Thread] = field(default_factory=list)
    last_line: deque[str] = field(default_factory=lambda: deque(maxlen=1))


def run_jobs(
    jobs: Sequence[Job], at_once: int, forward: bool = True, environment: Mapping[str, str] | None = None
) -> list[JobReturn]:
    """Run the jobs, `at_once` at a time, and return their outcomes in the same order.

    environment: variables that the jobs get in addition to this process's.

    A signal is forwarded to the running jobs, which save and exit. No other job starts, and then this process exits
    with the signal's exit code.
    """
    for job in jobs:
        require_own_run(job)
    outcomes: dict[Path, JobReturn] = {}
    waiting = list(jobs)
    running: list[_Running] = []
    announced: set[Path] = set()
    common = set.intersection(*(set(job.settings) for job in jobs)) if len(jobs) > 1 else set()
    with _received_signals(forward) as signals:
        while running or (waiting and not signals):
            # A killed sweep leaves its jobs running.
            at_work = [job for job in waiting if is_in_use(job.folder)]
            for job in at_work:
                if job.folder not in announced:
                    print(f"{job.name} is still running: waiting for it to end", flush=True)
                announced.add(job.folder)
            free = [job for job in waiting if job not in at_work]
            while free and len(running) + len(at_work) < at_once and not signals:
                job = free.pop(0)
                waiting.remove(job)
                result = read_result(job.folder)
                if result.get("status") in DONE_STATUSES:
                    outcomes[job.folder] = _to_job_return(job, result)
                    print(f"{job.name} is already {result['status']}", flush=True)
                else:
                    own = shlex.join(text for text in job.settings if text not in common)
                    follow = f", {len(waiting)} to follow" if waiting else ""
                    print(f"{job.name} starts{follow}: {own}", flush=True)
                    running.append(_start_job(job, at_once, environment or {}))
            for entry in list(running):
                for number in signals[entry.signals :]:
                    forward_signal(entry.process, number)
                entry.signals = len(signals)
                if entry.process.poll() is not None:
                    running.remove(entry)
                    outcomes[entry.job.folder] = _finish_job(entry)
            time.sleep(0.05)
    if signals:
        sys.exit(SIGNAL_CODES[signals[0]])
    return [outcomes[job.folder] for job in jobs]


def _start_job(job: Job, at_once: int, more: Mapping[str, str]) -> _Running:
    environment = {**os.environ, SWEEP_JOB_ENV: "1", **more}
    if at_once > 1 and not THREAD_VARIABLES & environment.keys():
        environment["OMP_NUM_THREADS"] = str(max(1, usable_cores() // at_once))
    if at_once > 1:
        environment["PYTHONIOENCODING"] = "utf-8"  # this process reads it
    # A terminal sends Ctrl-C to the whole process group. Jobs have their own group, so only this process gets it.
    own_group: dict[str, Any] = (
        {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}  # type: ignore[attr-defined]
        if os.name == "nt"
        else {"start_new_session": True}
    )
    result_before = read_result(job.folder)
    process = subprocess.Popen(
        job_command(job),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if at_once > 1 else None,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        errors="replace",
        env=environment,
        **own_group,
    )
    if sys.platform == "win32":  # elsewhere, the lock of a job's folder shows that it is still running
        windows.end_with_this_process(process)
    entry = _Running(job, process, result_before)
    prefix = f"[{job.folder.name}] " if at_once > 1 else ""
    for source, target in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
        if source:
            kept = entry.last_line if source is process.stderr else deque(maxlen=0)
            entry.pumps.append(threading.Thread(target=_copy_lines, args=(source, target, prefix, kept), daemon=True))
            entry.pumps[-1].start()
    return entry


def _copy_lines(source: IO[str], target: IO[str], prefix: str, kept: deque[str]) -> None:
    for line in source:
        if line.strip():
            kept.append(line.strip())
        with suppress(OSError, ValueError):  # a closed terminal must not end a run
            target.write(prefix + line)
            target.flush()


def _finish_job(entry: _Running) -> JobReturn:
    for pump in entry.pumps:
        pump.join(timeout=5)  # a child of the job may keep the pipe open
    job, code = entry.job, entry.process.returncode
    result = read_result(job.folder)
    if code and result == entry.result_before:
        result = {}  # an earlier process wrote it: this one failed before its training
    status = result.get("status")
    if code == 0 and status in DONE_STATUSES:
        unit = result.get("unit", "byte")
        print(f"{job.name} {status}: {result['objective'] or math.nan:.4f} bits per {unit}", flush=True)
        return _to_job_return(job, result)
    if status == "stopped" or (entry.signals and code in STOPPED_CODES):
        return record_failure(job, "stopped by a signal", "stopped")
    if code < 0:
        return record_failure(job, f"killed by {signal.Signals(-code).name}")
    last_line = next(iter(entry.last_line), "").removeprefix("rwkv-train: ")
    reason = str(result.get("error") or last_line)
    if not reason:
        reason = f"exit code {code}"
    elif code not in (FAILED, BAD_INPUT):  # not an error of rwkv-train: the line may be about something else
        reason = f"exit code {code}, after the line: {reason}"
    return record_failure(job, reason, is_shown=reason == last_line)


def _to_job_return(job: Job, result: dict[str, Any]) -> JobReturn:
    return JobReturn(overrides=job.overrides, _return_value=result.get("objective"), status=JobStatus.COMPLETED)


def forward_signal(process: "subprocess.Popen[str]", number: int) -> None:
    with suppress(OSError):  # the process may have ended
        if os.name == "nt":
            process.send_signal(signal.CTRL_BREAK_EVENT)  # type: ignore[attr-defined]
        else:
            process.send_signal(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)


@contextmanager
def _received_signals(forward: bool) -> Iterator[list[int]]:
    """Yield a list to which each signal is appended that this process receives inside the block."""
    received: list[int] = []
    # Under nohup, SIGHUP is ignored and must stay so.
    numbers = [number for number in SIGNAL_CODES if forward and signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, lambda number, _: received.append(number)) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
