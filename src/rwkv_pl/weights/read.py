"""Reads weights from a run folder, a `.ckpt` of rwkv_pl, an official RWKV-4 `.pth` or a Hugging Face folder."""

import contextlib
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from rwkv_pl.data.vocabulary import Vocabulary, read_vocabulary, vocabulary_from_dict
from rwkv_pl.errors import CorruptFileError, UserError
from rwkv_pl.weights import huggingface
from rwkv_pl.weights.checkpoint import find_best, first_sentence, read_checkpoint
from rwkv_pl.weights.metadata import KEY, Metadata
from rwkv_pl.weights.tensors import Weights, detect_version, validate_tensors


def load_weights(source: str | Path) -> tuple[nn.Module, Vocabulary | None]:
    """Load the model of `source`, on the CPU in float32 and in eval mode (no dropout), and its vocabulary.

    source: as for `read_weights`. The vocabulary is None if it is not known: a `.pth` has none.

    Raises UserError, with a one-line message, if there are no weights or they cannot be read.
    """
    weights = read_weights(source)
    return weights.model().eval(), weights.vocabulary


def read_weights(source: str | Path) -> Weights:
    """Read the weights of `source` and validate every tensor.

    source: a run folder (its best.ckpt, else last.ckpt), a `.ckpt` of rwkv_pl, an official RWKV-4 `.pth`, or a Hugging
    Face folder. The format is detected from the content, the model's version and size from the tensors.

    Raises UserError, with a one-line message, if a tensor is missing, unexpected, of a wrong shape, or not finite.
    """
    path = weights_path(Path(source))
    try:
        return _read_folder(path) if path.is_dir() else _read_file(path)
    except UserError as error:
        if str(path) in str(error):
            raise
        raise CorruptFileError(f"{path}: {error}") from error
    except Exception as error:  # a corrupt or hand-made file can fail in any way
        raise CorruptFileError(f"{path} does not hold a whole model ({first_sentence(error)})") from error


def _read_file(path: Path) -> Weights:
    content = read_checkpoint(path)
    if KEY not in content:
        return validate_tensors(content, detect_version(content, path), path, "official .pth")
    run = Metadata.from_checkpoint(content, path)
    vocabulary = vocabulary_from_dict(run.vocabulary) if run.vocabulary else None
    weights = validate_tensors(
        _select_model_tensors(content["state_dict"]), run.model, path, "checkpoint of rwkv_pl", run.config, vocabulary
    )
    return replace(weights, step=content.get("global_step"), trained_on=(run.past or {}).get("corpus"))


def _read_folder(folder: Path) -> Weights:
    config = huggingface.read_json(folder / huggingface.CONFIG)
    layout = huggingface.find_layout(config, folder)
    tensors: dict[str, Tensor] = {}
    for path in huggingface.tensor_files(folder):
        safe = path.suffix == ".safetensors"
        tensors |= huggingface.read_tensors(path) if safe else read_checkpoint(path)
    tensors = layout.to_official(tensors, config, folder)
    stored, tokenizer = folder / huggingface.VOCABULARY, folder / huggingface.TOKENIZER
    vocabulary = vocabulary_from_dict(huggingface.read_json(stored)) if stored.exists() else None
    if vocabulary is None and tokenizer.exists():
        # The 20B tokenizer is recognised. Any other is ignored: the weights can be used without it.
        with contextlib.suppress(UserError):
            known = read_vocabulary(tokenizer)
            vocabulary = known if known.size == len(tensors.get("emb.weight", ())) else None
    return validate_tensors(tensors, layout.version, folder, "Hugging Face folder", vocabulary=vocabulary)


def _select_model_tensors(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix("model."): value for key, value in state_dict.items() if key.startswith("model.")}


def weights_path(source: Path) -> Path:
    """Return the best checkpoint of a run folder, else its last.ckpt; a file or Hugging Face folder as it is."""
    if source.is_file():
        return source
    if not source.exists():
        raise UserError(f"there are no weights at {source}: give a run folder, .ckpt, .pth or Hugging Face folder")
    for folder in (source / "checkpoints", source):
        if best := find_best(folder):
            return best
        if (folder / "last.ckpt").is_file():
            return folder / "last.ckpt"
    if (source / huggingface.CONFIG).is_file():
        return source
    raise UserError(
        f"{source} is not a run folder with weights: it has neither checkpoints/best.ckpt nor last.ckpt, "
        f"nor a {huggingface.CONFIG} of Hugging Face"
    )
