"""Saves the generation state to a file, to continue a text later from its last token."""

import os
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rwkv_pl.errors import CorruptFileError, UserError
from rwkv_pl.files import PARTIAL_SUFFIX, atomic_write
from rwkv_pl.inference.generate import read_tokens
from rwkv_pl.model.state import BlockState, State
from rwkv_pl.weights.checkpoint import read_checkpoint

FORMAT = 1


class GenerationState(NamedTuple):
    """The state of one text: logits (1, V) for the next token, the model's state (one row), the last tokens (n,).

    unfinished: the bytes of the text that were not shown yet, see `TextStream`.
    """

    logits: Tensor
    state: State
    recent: Tensor
    unfinished: bytes = b""


def save_state(path: Path, generation_state: GenerationState, digest: str) -> None:
    """Write the file atomically. digest: identifies the weights and the vocabulary."""
    content = {
        "rwkv_pl_memory": FORMAT,
        "digest": digest,
        "logits": _copy(generation_state.logits),
        "state": [{name: _copy(part) for name, part in block._asdict().items()} for block in generation_state.state],
        "recent": _copy(generation_state.recent),
        "unfinished": list(generation_state.unfinished),  # the safe loader refuses bytes
    }
    with atomic_write(path) as file:
        torch.save(content, file)


def _copy(part: Tensor) -> Tensor:
    # A view of a long prompt's tensor would be saved with the whole prompt.
    return part.cpu().clone(memory_format=torch.contiguous_format)


def load_state(path: Path, model: Any, digest: str) -> GenerationState:
    """Read a file of `save_state`. Raises UserError, one line, if it is corrupt or for other weights or vocabulary."""
    content = _read(path)
    if content.get("digest") != digest:
        raise UserError(f"{path} is the state of other weights or another vocabulary: give the weights that wrote it")
    device = next(model.parameters()).device
    like, like_state = read_tokens(model, torch.zeros(1, 1, dtype=torch.int64, device=device))
    try:
        # Copies, since the tensors of the file keep it open, and Windows would not replace it.
        logits, recent = content["logits"].to(device, copy=True), content["recent"].clone()
        state = tuple(
            BlockState(*(block[name].to(device, copy=True) for name in BlockState._fields))
            for block in content["state"]
        )
        for part, expected in zip([logits, *chain(*state)], [like, *chain(*like_state)], strict=True):
            alike = (part.shape, part.dtype, part.layout) == (expected.shape, torch.float32, torch.strided)
            if not alike or not part.isfinite().all():
                raise ValueError("a tensor has a wrong shape, a wrong dtype or values that are not finite")
        if recent.dim() != 1 or recent.dtype != torch.int64 or bool(((recent < 0) | (recent >= like.shape[1])).any()):
            raise ValueError("a token is outside of the vocabulary")
        unfinished = bytes(list(content.get("unfinished", [])))  # older files have none
    except Exception as error:  # a hand-made file can fail in any way
        raise CorruptFileError(f"{path} is a corrupt generation state ({error})") from error
    return GenerationState(logits, state, recent, unfinished)


def check_replaceable(path: Path) -> None:
    """Raise UserError if `path` cannot be written, or exists and is not a generation state."""
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}")
    if os.path.lexists(partial := path.with_name(path.name + PARTIAL_SUFFIX)):
        raise UserError(f"{partial} exists: another command is writing it, or was killed and left it; delete it")
    if path.exists():
        _read(path)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        reason = "a folder: give a file" if path.is_dir() else "missing: --state-out writes a state"
        raise UserError(f"{path} is {reason}")
    try:
        content = read_checkpoint(path)
        known = content.get("rwkv_pl_memory") == FORMAT
    except CorruptFileError:
        known = False
    if not known:
        raise UserError(f"{path} is not a state file of rwkv-generate, or is corrupt; it was not changed")
    return content
