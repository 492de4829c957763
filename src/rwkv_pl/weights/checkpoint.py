"""Reads files of torch.save without executing code from them."""

import math
import os
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from rwkv_pl.errors import CorruptFileError, UserError, one_line
from rwkv_pl.files import newest


def read_checkpoint(path: Path, checked: bool = True) -> dict[str, Any]:
    """Load a checkpoint with weights_only=True. Its tensors are memory-mapped and read when used.

    As long as one of them exists, Windows does not let another process replace the file.

    checked: first verify every byte against the checksums in the file; False is enough to read only small values.

    Raises UserError if the file is missing or holds no dictionary, CorruptFileError if it cannot be read.
    """
    path = newest(path)
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
        return best if best.is_file() else None

    def rank(path: Path) -> tuple[float, int]:
        try:
            content = read_checkpoint(path, checked=False)
            states = [state for state in content["callbacks"].values() if isinstance(state, dict)]
            scores = [float(state["current_score"]) for state in states if state.get("current_score") is not None]
            return min(scores), content["global_step"]  # a later checkpoint can repeat the score of an earlier one
        except (UserError, LookupError, TypeError, ValueError, AttributeError):
            return (-math.inf if path == best else math.inf), 0  # reading best.ckpt then gives the error

    ranks = {path: rank(path) for path in [*([best] if best.is_file() else []), *sorted(others)]}
    found = min(ranks, key=lambda path: ranks[path])
    return found if ranks[found][0] < math.inf else None


def first_sentence(error: BaseException) -> str:
    """The first sentence of an error: torch's messages continue with advice that does not apply here."""
    return one_line(error).partition(". ")[0][:200] or type(error).__name__
