"""The errors that a command prints as one line."""


class UserError(Exception):
    """An error the user can fix: one line that says what is wrong, where, and what to do."""


class CorruptFileError(UserError):
    """A file that rwkv_pl wrote, and whose content has changed since."""


class RunError(UserError):
    """What ended a run after it had started."""


def one_line(error: BaseException | str) -> str:
    """An error's message without its line breaks."""
    return " ".join(str(error).split())
