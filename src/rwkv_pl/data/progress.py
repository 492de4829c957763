"""Progress bars on stderr, shown only in a terminal."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress


def make_bytes_progress() -> "Progress":
    """A progress bar that shows bytes, speed and the time left."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal)


def progress_bar(pieces: list[tuple[int, int]], what: str) -> Iterable[tuple[int, int]]:
    """Yield the pieces and show a bar labelled ``what``."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(pieces, what, console=console, transient=True, disable=not console.is_terminal)
