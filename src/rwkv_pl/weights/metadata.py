"""The metadata of a checkpoint: its model and its run."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rwkv_pl.errors import CorruptFileError, UserError
from rwkv_pl.model import MODELS

KEY = "rwkv_pl"
"""The key of the metadata in a checkpoint's dictionary."""

FORMAT = 1

_KINDS = {"model": str, "config": dict, "vocabulary": dict | None, "finished": str | None}
_OPTIONAL_KINDS = {
    "past": dict,
    "skipped": int,
    "accumulate": int,
    "precision": str,
    "val_check_interval": int,
    "threads": int,
    "optim": dict,
    "schedule": dict,
}


@dataclass(frozen=True)
class Metadata:
    """The model and the run of a checkpoint. The optional fields describe the run; in converted weights they are None.

    model:      the version's name in MODELS.
    config:     the fields of the version's config class.
    vocabulary: the result of Vocabulary.to_dict; None if not known.
    finished:   why the run ended: length, time, pruned or early stop; None if it can continue.
    past:       the run's identity, which must match on resume: corpus, seed, batch size, model size.
    skipped:    the number of batches skipped because of a NaN or Inf.
    accumulate: micro-batches per optimizer step.
    precision:  Lightning's name of the precision.
    val_check_interval: optimizer steps between validations.
    threads:    torch's threads for CPU operators.
    optim, schedule: the fields of config.Optim and config.Schedule.
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
    optim: dict[str, Any] | None = None
    schedule: dict[str, Any] | None = None

    @classmethod
    def from_checkpoint(cls, checkpoint: dict[str, Any], path: Path) -> "Metadata":
        """Restore the metadata that `to_dict` stored under KEY.

        Raises UserError for a newer format or an unknown model version, CorruptFileError if anything else is wrong.
        """
        stored = checkpoint[KEY]
        damaged = CorruptFileError(f"{path} is not a whole checkpoint: its metadata is missing or corrupt")
        if not isinstance(stored, dict) or not isinstance(stored.get("format"), int):
            raise damaged
        if stored["format"] != FORMAT:
            raise UserError(
                f"{path} has checkpoint format {stored['format']}, this rwkv_pl reads {FORMAT}: install a newer rwkv_pl"
            )
        kinds = _KINDS | {key: kind for key, kind in _OPTIONAL_KINDS.items() if key in stored}
        if not all(isinstance(stored.get(key, ...), kind) for key, kind in kinds.items()):
            raise damaged
        if stored["model"] not in MODELS:
            raise UserError(f"{path} holds a {stored['model']} model; supported: {', '.join(MODELS)}")
        fields = {key: stored[key] for key in kinds}
        if "past" not in stored and "corpus" in stored:  # early checkpoints have only the corpus
            fields["past"] = {"corpus": stored["corpus"]}
        return cls(**fields)

    @property
    def corpora(self) -> dict[str, str]:
        """The digests of the run's corpora by their names in a mix; that of the only corpus has the name ""."""
        past = self.past or {}
        return {key.partition(".")[2]: digest for key, digest in past.items() if key.partition(".")[0] == "corpus"}

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain types, for the entry KEY of a checkpoint."""
        optional = {key for key in _OPTIONAL_KINDS if getattr(self, key) is None}
        return {"format": FORMAT} | {key: value for key, value in asdict(self).items() if key not in optional}
