"""Printing of one-line errors and tables."""

import io
import os
import re
import shlex
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rwkv_pl.errors import one_line

if TYPE_CHECKING:
    from rich.console import Console

# Set in the environment of a sweep's job, which prints neither its sample of text nor a command to resume it alone.
SWEEP_JOB_ENV = "RWKV_PL_OF_A_SWEEP"

# Exit codes.
BAD_INPUT, FAILED = 2, 1


def print_error(error: BaseException | str, code: int = BAD_INPUT) -> int:
    """Print one line on stderr, with the command's name. Returns the exit code."""
    print(f"{Path(sys.argv[0]).name}: {one_line(error)}", file=sys.stderr)
    return code


# The message of a signal while a run starts.
STOPPED_AT_START = "stopped before the first step: nothing to save"


def exit_at_once(message: str, code: int) -> NoReturn:
    """Print one line on stderr and end the process without cleaning up. A signal handler can call it at any time."""
    with suppress(OSError):
        os.write(2, f"{Path(sys.argv[0]).name}: {message}\n".encode())
    os._exit(code)


def quote_override(value: str | Path) -> str:
    """A text as the value of a Hydra override, whatever characters it has."""
    return "'" + str(value).replace("\\", "\\\\").replace("'", "\\'") + "'"


def resume_command(folder: Path, *flags: str) -> str:
    """The command that resumes a run, or with -m a sweep, to be typed in this shell.

    It has the program's path if the shell would not find it, and the plug-ins that were typed.
    """
    program = shutil.which("rwkv-train")
    own = Path(sys.executable).with_name("rwkv-train.exe" if os.name == "nt" else "rwkv-train")
    if own.exists() and not (program and own.samefile(program)):
        program = str(own.relative_to(Path.cwd()) if own.is_relative_to(Path.cwd()) else own)
    else:
        program = "rwkv-train"
    plain = re.fullmatch(r"[\w./:\\-]+", str(folder), re.ASCII)
    plugins = [word for word in sys.argv[1:] if word.startswith("plugins=")]
    words = (program, *flags, f"resume={folder if plain else quote_override(folder)}", *plugins)
    if os.name == "nt":
        return " ".join(f'"{word}"' if " " in word else word for word in words)
    return shlex.join(words)


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
