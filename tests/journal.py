"""An Optuna study's journal, as a sweep opens it."""

from pathlib import Path
from typing import Any


def open_journal(path: Path) -> Any:
    """Open it with the lock that needs no symbolic link."""
    import optuna
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    return optuna.storages.JournalStorage(JournalFileBackend(str(path), JournalFileOpenLock(str(path))))
