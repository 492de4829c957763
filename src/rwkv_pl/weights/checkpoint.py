"""Reads checkpoints and other files of torch.save without executing code from them."""

import math
import os
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from rwkv_pl.errors import CorruptFileError, UserError, one_line
from rwkv_pl.files import newest
from rwkv_pl.weights.parts import PARTS, REST, find_parts


def is_checkpoint(path: Path) -> bool:
    """Whether `path` is a file, or the folder of a checkpoint in parts."""
    path = newest(path.absolute())
    return path.is_file() or (path / REST).is_file()


def read_checkpoint(path: Path, checked: bool = True) -> dict[str, Any]:
    """Load a checkpoint with weights_only=True. Its tensors are memory-mapped and read when used.

    As long as one of them exists, Windows does not let another process replace the file. From a folder of parts, the
    sharded tensors are returned as StoredTensor.

    checked: first verify every byte against the checksums in the file; False is enough to read only small values.

    Raises UserError if the file is missing or holds no dictionary, CorruptFileError if it cannot be read.
    """
    path = newest(path)
    if path.is_dir():
        if not (path / REST).is_file():
            raise CorruptFileError(f"{path} is not a checkpoint in parts: {REST} is missing")
        try:
            return find_parts(_read_file(path / REST, checked), path, checked)
        except (RecursionError, RuntimeError, MemoryError) as error:
            raise CorruptFileError(f"{path} is corrupt ({first_sentence(error)})") from error
    content = _read_file(path, checked)
    if path.name == REST and PARTS in content:
        raise UserError(f"{path} is a part of the checkpoint {path.parent}: give that folder")
    return content


def _read_file(path: Path, checked: bool) -> dict[str, Any]:
    if not path.is_file():
        if os.path.lexists(path):
            raise CorruptFileError(f"{path} is not a file, or is a broken link")
        raise UserError(f"there is no checkpoint {path}")
    try:
        zipped = zipfile.is_zipfile(path)
        # torch.load ignores the checksums, so it would load a file with a flipped bit without an error.
        if zipped and checked:
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise zipfile.BadZipFile(f"{damaged} does not match its checksum")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about an untrusted pickle before it refuses it
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped or None)
    except Exception as error:  # an arbitrary file can fail in any way
        raise CorruptFileError(
            f"{path} is not a checkpoint that can be read safely ({first_sentence(error)}): "
            "it is corrupt, truncated, or not written by torch.save"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no weights: it is a {type(content).__name__}, not a dictionary of tensors")
    return content


def find_best(folder: Path) -> Path | None:
    """Return the checkpoint with the best validation score in a folder, None if no checkpoint has a score.

    It is best.ckpt, except in runs of earlier versions: they could give it another name, or overwrite it.
    """
    best = folder / "best.ckpt"
    others = [path for path in folder.glob("*.ckpt") if path != best and not path.name.startswith(("last.", "last-v"))]
    if not others:
        return best if is_checkpoint(best) else None

    def rank(path: Path) -> tuple[float, int]:
        try:
            content = read_checkpoint(path, checked=False)
            states = [state for state in content["callbacks"].values() if isinstance(state, dict)]
            scores = [float(state["current_score"]) for state in states if state.get("current_score") is not None]
            return min(scores), content["global_step"]  # a later checkpoint can repeat the score of an earlier one
        except (UserError, LookupError, TypeError, ValueError, AttributeError):
            return (-math.inf if path == best else math.inf), 0  # reading best.ckpt then gives the error

    ranks = {path: rank(path) for path in [*([best] if is_checkpoint(best) else []), *sorted(others)]}
    found = min(ranks, key=lambda path: ranks[path])
    return found if ranks[found][0] < math.inf else None


def first_sentence(error: BaseException) -> str:
    """The first sentence of an error: torch's messages continue with advice that does not apply here."""
    return one_line(error).partition(". ")[0][:200] or type(error).__name__
