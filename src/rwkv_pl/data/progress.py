"""Progress on stderr: bars in a terminal, for long work lines elsewhere."""

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

SECONDS_BETWEEN_LINES = 10


def make_bytes_progress() -> "Progress":
    """A progress bar that shows bytes, speed and the time left."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal)


def progress_bar(pieces: list[tuple[int, int]], what: str, begin: int = 0) -> Iterable[tuple[int, int]]:
    """Yield the pieces [lo, hi) of a whole that starts at 0, and show a bar labelled ``what``.

    If stderr is not a terminal, print a line every ten seconds. begin: the part that was done earlier.
    """
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return (
        track(pieces, what, console=console, transient=True)
        if console.is_terminal
        else _print_lines(pieces, what, begin)
    )


def _print_lines(pieces: list[tuple[int, int]], what: str, begin: int) -> Iterator[tuple[int, int]]:
    started = last = time.perf_counter()
    total, done = sum(hi - lo for lo, hi in pieces), 0
    for lo, hi in pieces:
        yield lo, hi
        done += hi - lo
        now = time.perf_counter()
        if now - last >= SECONDS_BETWEEN_LINES:
            last = now
            left = (total - done) * (now - started) / done
            time_left = f"{left / 60:,.0f} min" if left >= 120 else f"{left:.0f} s"
            with contextlib.suppress(OSError):  # a closed pipe must not end the work
                print(f"{what}: {(begin + done) / (begin + total):.0%}, {time_left} left", file=sys.stderr, flush=True)
