"""The errors that a command prints as one line, and the exception with which a signal ends a run."""


class UserError(Exception):
    """An error the user can fix: one line with the problem, its place and the fix."""


class CorruptFileError(UserError):
    """A file of rwkv_pl whose content was changed or damaged after it was written."""


class RunError(UserError):
    """An error that ended a run after its start."""


class StoppedBySignal(SystemExit):
    """A signal ended a run. A command exits with `code`; `rwkv_pl.train` raises another exception with `message`."""

    def __init__(self, number: int, code: int, message: str = "") -> None:
        super().__init__(code)
        self.number, self.message = number, message


def one_line(error: BaseException | str) -> str:
    """Return an error's message without line breaks."""
    return " ".join(str(error).split())
