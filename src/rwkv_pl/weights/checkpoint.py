"""Files of torch.save, read safely."""

import os
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from rwkv_pl.errors import CorruptFileError, UserError, one_line


def read_checkpoint(path: Path, checked: bool = True) -> dict[str, Any]:
    """What torch.save wrote there, opened with weights_only=True; tensors are mapped, and read when used.

    checked: every byte is compared with the sums in the file first; where only its small values are wanted that can be
    left out. Raises UserError.
    """
    if not path.is_file():
        if os.path.lexists(path):
            raise CorruptFileError(f"{path} is no file, or a link to none")
        raise UserError(f"there is no checkpoint {path}")
    try:
        zipped = zipfile.is_zipfile(path)
        # torch does not check what it reads, and loads a file with a flipped bit in silence.
        if zipped and checked:
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise zipfile.BadZipFile(f"{damaged} is not what was written")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of a stranger's pickle, before it refuses it
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped or None)
    except Exception as error:  # a file that is no checkpoint can fail in any way
        raise CorruptFileError(
            f"{path} is not a checkpoint that can be read safely ({first_sentence(error)}): "
            "it is damaged, cut short, or no file of torch.save"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no weights: a {type(content).__name__} where a dictionary of tensors should be")
    return content


def first_sentence(error: BaseException) -> str:
    """An error's first sentence: torch's go on with advice that is not for this command's users."""
    return one_line(error).partition(". ")[0][:200] or type(error).__name__
