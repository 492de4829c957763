"""Reads weights from a run folder, a `.ckpt` of rwkv_pl, an official `.pth` or a Hugging Face folder."""

import contextlib
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rwkv_pl.data.vocabulary import Vocabulary, read_vocabulary, vocabulary_from_dict
from rwkv_pl.errors import CorruptFileError, UserError
from rwkv_pl.weights import huggingface
from rwkv_pl.weights.checkpoint import find_best, first_sentence, is_checkpoint, read_checkpoint
from rwkv_pl.weights.layouts import find_layout
from rwkv_pl.weights.metadata import KEY, Metadata
from rwkv_pl.weights.parts import load_whole
from rwkv_pl.weights.tensors import Weights, detect_version, validate_tensors

# Entries under which training programs store the weights, and prefixes that torch.compile, DDP and Lightning add to all
# names; torch.compile of a part adds its own inside a name.
ENTRIES = ("state_dict", "model_state_dict", "model", "module")
PREFIXES = ("module.", "model.")
COMPILED = "_orig_mod."


def load_weights(source: str | Path) -> tuple[nn.Module, Vocabulary | None]:
    """Load the model of `source`, on the CPU in float32 and in eval mode (no dropout), and its vocabulary.

    source: as for `read_weights`. The vocabulary is None if it is not known: a `.pth` has none. Parameters of official
    files that nothing reads, such as v0 in block 0 of RWKV-7, are dropped without a message; rwkv-train, rwkv-eval and
    rwkv-convert print one.

    Raises UserError, with a one-line message, if there are no weights or they cannot be read.
    """
    weights = read_weights(source)
    return weights.model().eval(), weights.vocabulary


def read_weights(source: str | Path) -> Weights:
    """Read the weights of `source` and validate every tensor.

    source: a run folder (its best.ckpt, else last.ckpt), a `.ckpt` of rwkv_pl, an official `.pth`, or a Hugging Face
    folder. The format is detected from the content, the model's version and size from the tensors.

    Raises UserError, with a one-line message, if a tensor is missing, unexpected, of a wrong shape, or not finite.
    """
    path = weights_path(Path(source))
    try:
        return _read_file(path) if is_checkpoint(path) else _read_folder(path)
    except UserError as error:
        if str(path) in str(error):
            raise
        raise CorruptFileError(f"{path}: {error}") from error
    except Exception as error:  # a corrupt or hand-made file can fail in any way
        raise CorruptFileError(f"{path} does not hold a whole model ({first_sentence(error)})") from error


def _read_file(path: Path) -> Weights:
    content = read_checkpoint(path)
    if KEY not in content:
        tensors, note = _unwrap(content, path)
        return validate_tensors(tensors, detect_version(tensors, path), path, f"official .pth{note}")
    run = Metadata.from_checkpoint(content, path)
    vocabulary = vocabulary_from_dict(run.vocabulary) if run.vocabulary else None
    tensors, note = _unwrap(load_whole(_select_model_tensors(content["state_dict"])), path)
    weights = validate_tensors(tensors, run.model, path, f"checkpoint of rwkv_pl{note}", run.config, vocabulary)
    return replace(weights, step=content.get("global_step"), trained_on=run.corpora)


def _read_folder(folder: Path) -> Weights:
    config = huggingface.read_json(folder / huggingface.CONFIG)
    layout = find_layout(config, folder)
    tensors: dict[str, Tensor] = {}
    for path in huggingface.tensor_files(folder):
        safe = path.suffix == ".safetensors"
        tensors |= huggingface.read_tensors(path) if safe else read_checkpoint(path)
    tensors, note = _unwrap(tensors, folder)
    tensors = layout.to_official(tensors, config, folder)
    stored = folder / huggingface.VOCABULARY
    vocabulary = vocabulary_from_dict(huggingface.read_json(stored)) if stored.exists() else None
    for path in (folder / huggingface.TOKENIZER, *sorted(folder.glob("rwkv_vocab*.txt"))):
        # The tokenizers 20b and world are recognised. Any other is ignored: the weights can be used without it.
        if vocabulary is None and path.exists():
            with contextlib.suppress(UserError):
                known = read_vocabulary(path)
                vocabulary = known if known.size == len(tensors.get("emb.weight", ())) else None
    return validate_tensors(tensors, layout.version, folder, f"Hugging Face folder{note}", vocabulary=vocabulary)


def _unwrap(content: dict[str, Any], path: Path) -> tuple[dict[str, Any], str]:
    """Return the weights without the entry and the prefixes of other programs, and a note of what was left out.

    Raises UserError for a file of LoRA matrices alone.
    """
    notes = []
    for _ in range(len(ENTRIES)):  # a corrupt file can contain itself
        if entry := next((name for name in ENTRIES if isinstance(content.get(name), dict)), None):
            content = content[entry]
            notes.append(f"its entry {entry}")
    if any(COMPILED in str(name) for name in content):
        plain = {str(name).replace(COMPILED, ""): value for name, value in content.items()}
        if len(plain) == len(content):
            content = plain
            notes.append(f"names without {COMPILED}")
    while content and (prefix := next((p for p in PREFIXES if all(str(name).startswith(p) for name in content)), None)):
        content = {str(name).removeprefix(prefix): value for name, value in content.items()}
        notes.append(f"names without {prefix}")
    lora = next((name for name in content if re.search(r"lora_(embedding_)?[ab]\b", str(name), re.I)), None)
    if lora and not any(re.search(r"\bemb(eddings)?\.weight$", str(name)) for name in content):
        raise UserError(f"{path} holds only LoRA matrices, such as {lora}: merge them with their base weights first")
    return content, "".join(f", {note}" for note in notes)


def _select_model_tensors(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix("model."): value for key, value in state_dict.items() if key.startswith("model.")}


def weights_path(source: Path) -> Path:
    """Return the best checkpoint of a run folder, else its last.ckpt; a file or Hugging Face folder as it is."""
    if is_checkpoint(source):
        return source
    if not source.exists():
        raise UserError(f"there are no weights at {source}: give a run folder, .ckpt, .pth or Hugging Face folder")
    for folder in (source / "checkpoints", source):
        if best := find_best(folder):
            return best
        if is_checkpoint(folder / "last.ckpt"):
            return folder / "last.ckpt"
    if (source / huggingface.CONFIG).is_file():
        return source
    raise UserError(
        f"{source} is not a run folder with weights: it has neither checkpoints/best.ckpt nor last.ckpt, "
        f"nor a {huggingface.CONFIG} of Hugging Face"
    )
