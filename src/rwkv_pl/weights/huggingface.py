"""Reads and writes the files of Hugging Face folders; their names and configs are in layouts.py.

Neither reading nor writing needs transformers.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rwkv_pl.errors import CorruptFileError, UserError, one_line

CONFIG, TENSORS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
VOCABULARY = "vocabulary.json"  # rwkv_pl's own file; transformers would take a vocab.json for one of its formats

# In the order in which transformers searches for them.
_TENSOR_FILES = (TENSORS, f"{TENSORS}.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that contains one JSON object. Raises CorruptFileError if it is anything else."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"{path} is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise CorruptFileError(f"{path} is a {type(content).__name__}, not a JSON object")
    return content


def tensor_files(folder: Path) -> list[Path]:
    """The files with the folder's tensors: one file, or the shards in its index. Raises UserError if one is missing."""
    found = next((folder / name for name in _TENSOR_FILES if (folder / name).is_file()), None)
    if found is None:
        raise UserError(f"{folder} has a {CONFIG} but no weights: {TENSORS} or pytorch_model.bin is missing")
    if found.suffix != ".json":
        return [found]
    shards = read_json(found).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise CorruptFileError(f"{found} lists no files: it has no weight_map")
    files = []
    for name in sorted(set(map(str, shards.values()))):
        # Only plain file names, so that an index cannot point outside of its folder.
        if Path(name).name != name or not name.endswith((".safetensors", ".bin")):
            raise CorruptFileError(f"{found} lists {name!r}, which is not a tensor file in its folder")
        if not (folder / name).is_file():
            raise CorruptFileError(f"{found} lists {name}, which is missing")
        files.append(folder / name)
    return files


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a .safetensors file, by its own names, memory-mapped. Raises CorruptFileError."""
    try:
        return load_file(path)
    except Exception as error:  # an arbitrary file can fail in any way
        reason = one_line(error)[:200]
        raise CorruptFileError(f"{path} is corrupt or not a safetensors file ({reason})") from error


def write_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a .safetensors file, with further metadata, and flush it to disk. Raises OSError."""
    path.touch()
    mode = path.stat().st_mode  # the user's default; safetensors makes its files readable by their owner only
    try:
        save_file(tensors, path, metadata={"format": "pt", **(metadata or {})})
        with path.open("r+b") as file:
            os.fsync(file.fileno())
        path.chmod(mode)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else None, str(error), str(path)) from error
