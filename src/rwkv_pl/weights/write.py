"""Writes weights as a checkpoint, an official `.pth` or a Hugging Face folder."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkv_pl.errors import RunError
from rwkv_pl.files import atomic_write, atomic_write_folder
from rwkv_pl.weights import huggingface
from rwkv_pl.weights.checkpoint import read_checkpoint
from rwkv_pl.weights.layouts import layout_of
from rwkv_pl.weights.metadata import KEY, Metadata
from rwkv_pl.weights.read import read_weights
from rwkv_pl.weights.tensors import Weights


def write_weights(weights: Weights, target: Path, with_unread: bool = False) -> Weights:
    """Write weights in the format of the target's name: `.pth`, `.ckpt`, else a Hugging Face folder.

    Before the file or folder gets its final name, it is read back and compared bit for bit. Returns the weights that
    were read. A `.pth` has no vocabulary. The parent folder of `target` must exist, `target` must not, unless it is an
    empty folder. with_unread: add `weights.unread` to a `.pth`; the `form` of the result names them.

    Raises OSError if the write fails, and then leaves nothing behind.
    """
    # Every tensor gets its own storage: torch.save writes the whole storage of a view.
    weights = replace(weights, tensors={name: _pack(value) for name, value in weights.tensors.items()})
    if target.suffix.lower() in (".pth", ".ckpt"):
        is_official = target.suffix.lower() == ".pth"
        unread = weights.unread if with_unread and is_official else {}
        with atomic_write(target) as file:
            torch.save(weights.tensors | unread if is_official else _checkpoint(weights), file)
            file.flush()
            written = _verify(Path(file.name), weights, unread)
        if unread:
            written = replace(written, form=f"official .pth plus zeros for {', '.join(unread)}, which nothing reads")
    else:
        with atomic_write_folder(target) as folder:
            layout = layout_of(weights.version)
            _write_json(layout.config_of(weights.config, weights.dtype), folder / huggingface.CONFIG)
            if weights.vocabulary:
                _write_json(weights.vocabulary.to_dict(), folder / huggingface.VOCABULARY)
                if tokenizer := weights.vocabulary.to_tokenizer():
                    _write_json(tokenizer, folder / huggingface.TOKENIZER)
                    # Without it, transformers selects a class for this model whose settings override tokenizer.json.
                    _write_json({"tokenizer_class": "PreTrainedTokenizerFast"}, folder / "tokenizer_config.json")
            huggingface.write_tensors(layout.from_official(weights.tensors), folder / huggingface.TENSORS)
            written = _verify(folder, weights)
    return replace(written, path=target)


def _checkpoint(weights: Weights) -> dict[str, Any]:
    """The content of a checkpoint without a run, which can be loaded but not resumed."""
    vocabulary = weights.vocabulary.to_dict() if weights.vocabulary else None
    return {
        KEY: Metadata(weights.version, asdict(weights.config), vocabulary, finished=None).to_dict(),
        "state_dict": {f"model.{name}": value for name, value in weights.tensors.items()},
    }


def _verify(path: Path, weights: Weights, unread: dict[str, Tensor] | None = None) -> Weights:
    """Read `path` back and compare it with the weights. unread: what else is in the file, which reading drops."""
    written, expected = read_weights(path), weights.tensors
    there = written.tensors
    if unread:
        content, expected = read_checkpoint(path), expected | unread
        there = there | {name: content[name] for name in unread}
    differing = [name for name, value in expected.items() if not _has_same_bits(there[name], value)]
    # Take the same values in memory: those that were read back keep the file open, and Windows would not rename it.
    written = replace(written, tensors=weights.tensors)
    if differing:
        raise RunError(f"{differing[0]} in {path} differs from the value that was written: the disk may be failing")
    return written


def _has_same_bits(there: Tensor, value: Tensor) -> bool:
    return there.dtype == value.dtype and torch.equal(_view_bits(there), _view_bits(value))


def _write_json(content: dict[str, Any], path: Path) -> None:
    with atomic_write(path) as file:
        file.write(json.dumps(content, indent=2).encode() + b"\n")


def _pack(value: Tensor) -> Tensor:
    is_packed = value.is_contiguous() and value.untyped_storage().nbytes() == value.nbytes
    return value if is_packed else value.clone(memory_format=torch.contiguous_format)


def _view_bits(value: Tensor) -> Tensor:
    """View the values as integers, for a comparison that includes the sign of zeros."""
    return value.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[value.element_size()])
