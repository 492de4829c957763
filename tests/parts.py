"""Divide a checkpoint into parts, as the processes of a sharded run do."""

from pathlib import Path
from typing import Any

import torch

from rwkv_pl.weights.parts import replace_values, write_part, write_rest


def divide(content: Any, number: int, count: int) -> tuple[Any, dict[str, tuple[int, torch.Tensor]]]:
    """The checkpoint without the values of its tensors but scalars, and the rows that process `number` has."""
    rows = {}

    def take(name, value):
        if not value.dim():
            return value
        first = min(number * -(-len(value) // count), len(value))
        rows[name] = first, value.chunk(count)[number] if first < len(value) else value[:0]
        return value.to("meta")

    return replace_values(content, torch.Tensor, take), rows


def write_folder(folder: Path, content: Any, count: int = 2) -> Path:
    folder.mkdir()
    checksums = dict(write_part(folder, i, count, divide(content, i, count)[1]) for i in range(count))
    write_rest(folder, divide(content, 0, count)[0], checksums)
    return folder
