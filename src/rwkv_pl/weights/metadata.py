"""What a checkpoint says of its run."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rwkv_pl.errors import CorruptFileError, UserError
from rwkv_pl.model import MODELS

KEY = "rwkv_pl"
"""Of a checkpoint's dictionary, the entry with the metadata."""

FORMAT = 1

_KINDS = {"model": str, "config": dict, "vocabulary": dict | None, "finished": str | None}
_OPTIONAL_KINDS = {
    "past": dict,
    "skipped": int,
    "accumulate": int,
    "precision": str,
    "val_check_interval": int,
    "threads": int,
}


@dataclass(frozen=True)
class Metadata:
    """The model and the run of a checkpoint. The optional fields are those of a run, None in converted weights.

    model:      the version's name in MODELS.
    config:     the fields of the version's config class.
    vocabulary: as of Vocabulary.to_dict; None if not known.
    finished:   why the run ended: length, time, pruned or early stop; None if it can go on.
    past:       what a resumed run must have in common with the run: corpus, seed, batch size, model size.
    skipped:    batches left out because of a NaN or Inf.
    accumulate: micro-batches of an optimizer step.
    precision:  Lightning's name of it.
    val_check_interval: optimizer steps between validations.
    threads:    of torch's CPU operators.
    """

    model: str
    config: dict[str, Any]
    vocabulary: dict[str, Any] | None
    finished: str | None
    past: dict[str, Any] | None = None
    skipped: int | None = None
    accumulate: int | None = None
    precision: str | None = None
    val_check_interval: int | None = None
    threads: int | None = None

    @classmethod
    def from_checkpoint(cls, checkpoint: dict[str, Any], path: Path) -> "Metadata":
        """Reads what `to_dict` stored under KEY.

        Raises UserError for a later format and an unknown model version, CorruptFileError for anything else.
        """
        stored = checkpoint[KEY]
        damaged = CorruptFileError(f"{path} is not a whole checkpoint: it does not say what it holds")
        if not isinstance(stored, dict) or not isinstance(stored.get("format"), int):
            raise damaged
        if stored["format"] != FORMAT:
            raise UserError(
                f"{path} has checkpoint format {stored['format']}, this rwkv_pl reads {FORMAT}: install a newer one"
            )
        kinds = _KINDS | {key: kind for key, kind in _OPTIONAL_KINDS.items() if key in stored}
        if not all(isinstance(stored.get(key, ...), kind) for key, kind in kinds.items()):
            raise damaged
        if stored["model"] not in MODELS:
            raise UserError(f"{path} holds a {stored['model']} model; known here: {', '.join(MODELS)}")
        # Early checkpoints have the corpus alone.
        fields = {key: stored[key] for key in kinds}
        if "past" not in stored and "corpus" in stored:  # as early checkpoints have it
            fields["past"] = {"corpus": stored["corpus"]}
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        """Plain types for the entry KEY of a checkpoint."""
        optional = {key for key in _OPTIONAL_KINDS if getattr(self, key) is None}
        return {"format": FORMAT} | {key: value for key, value in asdict(self).items() if key not in optional}
