"""Printing of one-line errors and tables."""

import io
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rwkv_pl.errors import one_line

if TYPE_CHECKING:
    from rich.console import Console

# Exit codes.
BAD_INPUT, FAILED = 2, 1


def print_error(error: BaseException | str, code: int = BAD_INPUT) -> int:
    """Print one line on stderr, with the command's name. Returns the exit code."""
    print(f"{Path(sys.argv[0]).name}: {one_line(error)}", file=sys.stderr)
    return code


def console() -> "Console":
    """Return a rich console for tables."""
    import rich
    from rich.console import Console

    there = rich.get_console()
    return there if there.is_terminal else Console(width=200)  # a file or a pipe has no width to fold at


class IgnoreBrokenPipe(io.TextIOBase):
    """stdout or stderr of a sweep's job, so that the job continues if the sweep that reads it was killed."""

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
