"""What a checkpoint says of its run."""

from pathlib import Path
from typing import Any

from rwkv_pl.config import DamagedError, UserError
from rwkv_pl.model import VERSIONS

CHECKPOINT_FORMAT = 1


def check_about(about: dict[str, Any], path: Path) -> None:
    """Raises UserError for a checkpoint of a later format, or of a model version that is not known here."""
    if not isinstance(about, dict) or not isinstance(about.get("format"), int):
        raise DamagedError(f"{path} is not a whole checkpoint: it does not say what it holds")
    if about["format"] != CHECKPOINT_FORMAT:
        raise UserError(
            f"{path} has checkpoint format {about['format']}, this rwkv_pl reads {CHECKPOINT_FORMAT}: "
            "install a newer one"
        )
    kinds = {"model": str, "config": dict, "vocabulary": dict | None, "finished": str | None}
    later = {"past": dict, "skipped": int, "accumulate": int, "precision": str}
    optional = {name: kind for name, kind in later.items() if name in about}
    if not all(isinstance(about.get(name, ...), kind) for name, kind in (kinds | optional).items()):
        raise DamagedError(f"{path} is not a whole checkpoint: it does not say what it holds")
    if about["model"] not in VERSIONS:
        raise UserError(f"{path} holds a {about['model']} model; known here: {', '.join(VERSIONS)}")
