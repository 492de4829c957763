"""Printing of one-line errors and tables."""

import io
import json
import os
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rwkv_pl.errors import one_line

if TYPE_CHECKING:
    from rich.console import Console

# Set in the environment of a sweep's job, which prints neither its sample of text nor a command to resume it alone.
SWEEP_JOB_ENV = "RWKV_PL_OF_A_SWEEP"

# Exit codes.
BAD_INPUT, FAILED = 2, 1
# Of a process that saved and ended on a signal.
SIGNAL_CODES: dict[int, int] = {signal.SIGINT: 130, signal.SIGTERM: 143}
if hasattr(signal, "SIGBREAK"):  # on Windows, SIGTERM does not reach a console program; Ctrl-Break takes its place
    SIGNAL_CODES[signal.SIGBREAK] = 143
if hasattr(signal, "SIGHUP"):  # sent when the terminal is closed
    SIGNAL_CODES[signal.SIGHUP] = 129


def print_error(error: BaseException | str, code: int = BAD_INPUT) -> int:
    """Print one line on stderr, with the command's name. Returns the exit code."""
    print(f"{Path(sys.argv[0]).name}: {one_line(error)}", file=sys.stderr)
    return code


# The messages of a signal while a run starts, and after its training.
STOPPED_AT_START = "stopped before the first step: nothing to save"
STOPPED_AT_END = "stopped after the last step: the checkpoints are complete"

_overrides_from_python: Sequence[str] | None = None


@contextmanager
def called_from_python(overrides: Sequence[str]) -> Iterator[None]:
    """Mark this process as one that trains in a call of `rwkv_pl.train`, with these overrides, and not as a command.

    A signal then raises an exception, and messages name a call of `rwkv_pl.train` instead of a command.
    """
    global _overrides_from_python
    _overrides_from_python = overrides
    try:
        yield
    finally:
        _overrides_from_python = None


def is_called_from_python() -> bool:
    """Whether `rwkv_pl.train` is running in this process."""
    return _overrides_from_python is not None


def print_loading() -> None:
    """Print in a terminal that torch is being loaded, which takes seconds."""
    if sys.stderr.isatty() and "lightning" not in sys.modules:
        print("loading torch and lightning ...", file=sys.stderr, flush=True)


def exit_at_once(message: str, code: int) -> NoReturn:
    """Print one line on stderr and end the process without cleaning up. A signal handler can call it at any time."""
    with suppress(OSError):
        os.write(2, f"{Path(sys.argv[0]).name}: {message}\n".encode())
    os._exit(code)


_skips_cleanup = False


def skip_cleanup() -> None:
    """Let `exit_command` end this process at once: torch.distributed would wait for processes that have ended."""
    global _skips_cleanup
    _skips_cleanup = True


def exit_command(code: int) -> NoReturn:
    """End a command with this exit code, after its error was printed."""
    if _skips_cleanup:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


def quote_override(value: str | Path) -> str:
    """A text as the value of a Hydra override, whatever characters it has."""
    # A backslash is doubled only before a quote: elsewhere, Hydra keeps both.
    return "'" + re.sub(r"(\\*)('|$)", lambda end: 2 * end[1] + ("\\'" if end[2] else ""), str(value)) + "'"


def resume_command(folder: Path, *flags: str) -> str:
    """The command that resumes a run, or with -m a sweep, to be typed in this shell, or the call in Python.

    It has the program's path if the shell would not find it, and the plug-ins that were typed.
    """
    if _overrides_from_python is not None:
        return resume_call(folder, _overrides_from_python)
    program = shutil.which("rwkv-train")
    own = Path(sys.executable).with_name("rwkv-train.exe" if os.name == "nt" else "rwkv-train")
    if own.exists() and not (program and own.samefile(program)):
        program = str(own.relative_to(Path.cwd()) if own.is_relative_to(Path.cwd()) else own)
    else:
        program = "rwkv-train"
    words = (program, *flags, _resume_override(folder), *_plugins(sys.argv[1:]))
    if os.name == "nt":
        # For PowerShell and cmd: both take double quotes. PowerShell splits at a comma, and removes single quotes.
        return " ".join(word if re.fullmatch(r"[\w./:\\=-]+", word) else f'"{word}"' for word in words)
    return shlex.join(words)


def resume_call(folder: Path, overrides: Sequence[str]) -> str:
    """The call that resumes a run from Python, with the plug-ins among `overrides`."""
    words = (_resume_override(folder), *_plugins(overrides))
    return f"rwkv_pl.train({', '.join(json.dumps(word, ensure_ascii=False) for word in words)})"


def _resume_override(folder: Path) -> str:
    plain = re.fullmatch(r"[\w./:\\-]+", str(folder), re.ASCII)
    return f"resume={folder if plain else quote_override(folder)}"


def _plugins(words: Sequence[str]) -> list[str]:
    return [word for word in words if word.startswith("plugins=")]


def console() -> "Console":
    """Return a rich console for tables."""
    import rich
    from rich.console import Console

    there = rich.get_console()
    return there if there.is_terminal else Console(width=200)  # a file or a pipe has no width to fold at


class IgnoreUnwritable(io.TextIOBase):
    """A stdout or stderr that drops what it can't write."""

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
        return self._stream.encoding or "utf-8"


def ignore_unwritable_screen() -> None:
    """Let this process continue if its stdout or stderr is closed, its reader has gone, or its disk is full."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or Path(os.devnull).open("w")  # noqa: SIM115
        if not isinstance(stream, IgnoreUnwritable):
            setattr(sys, name, IgnoreUnwritable(stream))
