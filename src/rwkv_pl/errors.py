"""The errors that a command prints as one line."""


class UserError(Exception):
    """An error the user can fix: one line with the problem, its place and the fix."""


class CorruptFileError(UserError):
    """A file of rwkv_pl whose content was changed or damaged after it was written."""


class RunError(UserError):
    """An error that ended a run after its start."""


def one_line(error: BaseException | str) -> str:
    """Return an error's message without line breaks."""
    return " ".join(str(error).split())
