"""Checkpoints in parts: a folder with the rows of the tensors that each process of a sharded run has written.

    last.ckpt/rest.ckpt                          the checkpoint; its sharded tensors have a shape, but no values
    last.ckpt/part-00001-of-00003.safetensors    rows of these tensors

A tensor's name is its place in the checkpoint, as in state_dict/model.emb.weight. A part's metadata has the first row
of each of its tensors, rest.ckpt the CRC-32 of each part.
"""

import json
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from rwkv_pl.errors import CorruptFileError, one_line
from rwkv_pl.files import atomic_write
from rwkv_pl.weights.huggingface import write_tensors

REST = "rest.ckpt"

# The key of the parts' checksums in rest.ckpt.
PARTS = "parts"

# Only plain names, so that rest.ckpt cannot point outside of its folder.
PART_NAME = re.compile(r"part-[0-9]+-of-[0-9]+\.safetensors")

FIRST_ROWS = "first_rows"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a folder of parts, whose values are read when they are used.

    pieces: first row and rows, in order, without gaps.
    """

    name: str
    shape: torch.Size
    dtype: torch.dtype
    pieces: list[tuple[int, Any]]

    def rows(self, first: int, last: int) -> Tensor:
        """Read the rows [first, last), into memory. Raises CorruptFileError."""
        found = [torch.empty(0, *self.shape[1:], dtype=self.dtype)]
        for start, piece in self.pieces:
            n_rows = piece.get_shape()[0]
            if start < last and first < start + n_rows:
                found.append(piece[max(first - start, 0) : last - start])
                if found[-1].dtype != self.dtype:
                    raise CorruptFileError(f"{self.name} is {found[-1].dtype} in a part, not {self.dtype}")
        return torch.cat(found)

    def whole(self) -> Tensor:
        return self.rows(0, self.shape[0])

    def outline(self) -> Tensor:
        """Return a tensor of the same shape and dtype on the meta device, without values."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


def replace_values(content: Any, kind: type, change: Callable[[str, Any], Any], name: str = "") -> Any:
    """Return nested dicts and lists with `change(name, value)` for each value of `kind`; see above for its name."""
    if isinstance(content, kind):
        return change(name, content)
    if isinstance(content, dict):
        items = content.items()
        return {key: replace_values(value, kind, change, f"{name}/{key}" if name else str(key)) for key, value in items}
    if isinstance(content, list):
        return [replace_values(value, kind, change, f"{name}/{i}") for i, value in enumerate(content)]
    return content


def load_whole(content: Any) -> Any:
    """Return nested dicts and lists with the values of all stored tensors."""
    return replace_values(content, StoredTensor, lambda name, stored: stored.whole())


def load_outlines(content: Any) -> Any:
    """Return nested dicts and lists with tensors on the meta device for the stored ones."""
    return replace_values(content, StoredTensor, lambda name, stored: stored.outline())


def write_part(folder: Path, number: int, count: int, rows: dict[str, tuple[int, Tensor]]) -> tuple[str, int]:
    """Write the rows that one process has, and return the part's name and CRC-32. Raises OSError.

    rows: first row and rows, (n, ...) of any device, by the tensor's name.
    """
    path = folder / f"part-{number:05}-of-{count:05}.safetensors"
    tensors = {name: part.cpu().contiguous() for name, (_, part) in rows.items()}
    first_rows = json.dumps({name: first for name, (first, _) in rows.items()})
    write_tensors(tensors, path, {FIRST_ROWS: first_rows})
    return path.name, checksum(path)


def write_rest(folder: Path, content: dict[str, Any], checksums: dict[str, int]) -> None:
    """Write the checkpoint without the values of its sharded tensors, which are on the meta device. Raises OSError."""
    with atomic_write(folder / REST) as file:
        torch.save(content | {PARTS: checksums}, file)


def checksum(path: Path) -> int:
    """Return the CRC-32 of a file."""
    found = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            found = zlib.crc32(block, found)
    return found


def find_parts(content: dict[str, Any], folder: Path, checked: bool) -> dict[str, Any]:
    """Return the content of rest.ckpt with a StoredTensor for each tensor on the meta device.

    checked: verify the checksum of each part. Raises CorruptFileError for a missing or damaged part, and if the parts
    do not have each row of a tensor once.
    """
    checksums = content.get(PARTS)
    if not isinstance(checksums, dict):
        raise CorruptFileError(f"{folder / REST} is not part of a checkpoint: it lists no parts")
    pieces: dict[str, list[tuple[int, Any]]] = {}
    for name, expected in checksums.items():
        if not PART_NAME.fullmatch(str(name)):
            raise CorruptFileError(f"{folder / REST} lists {str(name)[:200]!r}, which is not a part in its folder")
        path = folder / str(name)
        if not path.is_file():
            raise CorruptFileError(f"{path} is missing")
        if checked and checksum(path) != expected:
            raise CorruptFileError(f"{path} is corrupt: it does not match its checksum in {REST}")
        for tensor, piece in _open_part(path).items():
            pieces.setdefault(tensor, []).append(piece)

    def find(name: str, outline: Tensor) -> Any:
        if not outline.is_meta:
            return outline
        found, next_row = sorted(pieces.get(name, []), key=lambda piece: piece[0]), 0
        for first, rows in found:
            shape = rows.get_shape()
            if first != next_row or not shape or shape[1:] != list(outline.shape[1:]):
                break
            next_row += shape[0]
        if not outline.dim() or next_row != outline.shape[0]:
            raise CorruptFileError(f"{folder} is corrupt: its parts do not hold {name} of {tuple(outline.shape)}")
        return StoredTensor(name, outline.shape, outline.dtype, found)

    return replace_values({key: value for key, value in content.items() if key != PARTS}, Tensor, find)


def _open_part(path: Path) -> dict[str, tuple[int, Any]]:
    try:
        file = safe_open(path, "pt")
        first_rows = json.loads(file.metadata()[FIRST_ROWS])
        if not all(type(first) is int for first in first_rows.values()):
            raise ValueError("a first row is not a whole number")
        return {name: (first, file.get_slice(name)) for name, first in first_rows.items()}
    except Exception as error:  # an arbitrary file can fail in any way
        raise CorruptFileError(f"{path} is corrupt or not a part of a checkpoint ({one_line(error)[:200]})") from error
