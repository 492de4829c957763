"""Run rwkv-train in separate processes that tests can kill, forked from a server that has all imports loaded.

The imports of a command take five seconds, a fork takes none. Never fork from the tests' own process: after a torch
operation with two threads, a forked child hangs.
"""

import functools
import importlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from brief import shorten_run_end, skip_disk_sync
from command import Result
from systems import WINDOWS

CAN_FORK = "forkserver" in multiprocessing.get_all_start_methods()
context = multiprocessing.get_context("forkserver" if CAN_FORK else "spawn")
context.set_forkserver_preload(["preloaded"])


@functools.cache
def _serve() -> None:
    """Start the server. It imports the preloaded modules from its own import path."""
    if not CAN_FORK:
        return
    from multiprocessing.forkserver import ensure_running

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        ensure_running()


@dataclass
class Strike:
    """Act at the n-th call of a function, before or after the call. place: "module:Class.name"."""

    place: str
    call: int
    act: Callable[[], Any]
    after: bool = False
    calls: int = field(default=0, init=False)

    def install(self) -> None:
        module, _, path = self.place.partition(":")
        owner: Any = importlib.import_module(module)
        *parents, name = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        original = getattr(owner, name)

        def struck(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls == self.call and not self.after:
                self.act()
            result = original(*args, **kwargs)
            if self.calls == self.call and self.after:
                self.act()
            return result

        setattr(owner, name, struck)


# Windows has no SIGKILL: os.kill ends a process there, with the number as its exit code. Ctrl-Break stands for SIGTERM.
KILL = signal.SIGTERM if WINDOWS else signal.SIGKILL
KILLED = KILL if WINDOWS else -KILL
TERMINATION: signal.Signals = getattr(signal, "SIGBREAK", signal.SIGTERM)


def kill() -> None:
    os.kill(os.getpid(), KILL)


def terminate() -> None:
    signal.raise_signal(TERMINATION)


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def _command(
    main: str,
    code: str | None,
    folder: Path,
    arguments: Sequence[str],
    strikes: Sequence[Strike],
    environment: dict[str, str],
) -> None:
    os.chdir(folder)
    os.environ.update(environment)
    skip_disk_sync()
    multiprocessing.set_start_method(None, force=True)  # the default, as in a command: workers are forked again
    # Windows' C library would add a \r to the one that Python writes.
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | getattr(os, "O_BINARY", 0)
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / name, flags), stream)
    if code is not None:
        exec(code, {})
        return
    shorten_run_end()
    for strike in strikes:
        strike.install()
    sys.argv = [f"rwkv-{main.rpartition('.')[2]}", *arguments]
    importlib.import_module(main).main()


def start(
    folder: Path,
    *arguments: str,
    strikes: Sequence[Strike] = (),
    main: str = "rwkv_pl.cli.train",
    code: str | None = None,
    **environment: str,
) -> BaseProcess:
    """Start the command in `folder`. main: the module whose main() runs. code: Python to run instead of a command."""
    _serve()
    process = context.Process(target=_command, args=(main, code, folder, arguments, strikes, environment))
    process.start()
    return process


def finish(process: BaseProcess, folder: Path, seconds: float = 600) -> Result:
    """Wait for the command. The exit code is the negated signal number if a signal killed it."""
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        raise AssertionError(f"the command hangs: {(folder / 'err').read_text()}")
    err = (folder / "err").read_text().splitlines(keepends=True)
    # A message of torch in wine.
    err = [line for line in err if not line.startswith("Error in cpuinfo: failed to query size")]
    return Result(process.exitcode, (folder / "out").read_text(), "".join(err))


def run(folder: Path, *arguments: str, **how: Any) -> Result:
    """Run the command to its end. how: passed to `start`."""
    return finish(start(folder, *arguments, **how), folder)
