"""Models from what lies on disk: a run folder, a checkpoint of ours, an official RWKV-4 `.pth`."""

import os
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rwkv_pl.config import DamagedError, UserError
from rwkv_pl.data.tokens import Vocabulary
from rwkv_pl.model import VERSIONS

# The first pattern that a file's keys show names its version; later versions keep some of the earlier names.
_MARKS = (
    ("rwkv7", r"att\.w0$"),
    ("rwkv6", r"att\.time_maa_"),
    ("rwkv5", r"att\.(time_faaaa|time_mix_g|ln_x\.weight)$"),
    ("rwkv4", r"att\.time_first$"),
)


def load_weights(source: str | Path) -> tuple[nn.Module, Vocabulary | None]:
    """The model that `source` holds, on the CPU in float32 and in training mode, and its vocabulary.

    source: a run folder (its best.ckpt, else last.ckpt), a `.ckpt` of ours, or an official RWKV-4 `.pth`, whose
    vocabulary is not known (None). The version and the size come from the file.

    Raises UserError, one line, where there is nothing, or nothing that we can read.
    """
    path = checkpoint_path(Path(source))
    content = read_checkpoint(path)
    try:
        return _built(content, path)
    except UserError:
        raise
    except Exception as error:  # what was made by hand, or is damaged, can fail in any way
        raise DamagedError(f"{path} does not hold a whole model ({_first_sentence(error)})") from error


def _built(content: dict[str, Any], path: Path) -> tuple[nn.Module, Vocabulary | None]:
    if "rwkv_pl" in content:
        about = content["rwkv_pl"]
        check_about(about, path)
        weights = _model_part(content["state_dict"])
        name, config = about["model"], about["config"]
        vocabulary = Vocabulary.from_dict(about["vocabulary"]) if about["vocabulary"] else None
        if vocabulary and vocabulary.size != config["vocab_size"]:
            raise DamagedError(f"{path}: its vocabulary has {vocabulary.size} tokens, its model {config['vocab_size']}")
    else:
        weights, vocabulary = content, None
        name = version_of(weights, path)
        config = _size_of(weights, path)
    model_class, config_class = VERSIONS[name]
    model = model_class(config_class(**config))
    for key, value in weights.items():
        if not isinstance(value, Tensor):
            raise UserError(f"{path} holds more than weights: {key} is a {type(value).__name__}, not a tensor")
    weights = {key: value.float() for key, value in weights.items()}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise UserError(f"{path} does not hold a whole {name} model: {first}") from error
    return model, vocabulary


def checkpoint_path(source: Path) -> Path:
    """The file that `source` means: a run folder's best.ckpt, else last.ckpt; a file is itself."""
    if source.is_file():
        return source
    if not source.exists():
        raise UserError(f"there are no weights at {source}: give a run folder, a .ckpt or a .pth")
    for name in ("best.ckpt", "last.ckpt"):
        if (path := source / "checkpoints" / name).is_file():
            return path
    if (source / "config.json").is_file():
        raise UserError(f"{source} is a Hugging Face folder, which is not read yet: give its official .pth instead")
    raise UserError(f"{source} is no run folder with weights: it holds neither checkpoints/best.ckpt nor last.ckpt")


def read_checkpoint(path: Path, checked: bool = True) -> dict[str, Any]:
    """What torch.save wrote there, opened with weights_only=True; tensors are mapped, and read when used.

    checked: every byte is compared with the sums in the file first; where only its small values are wanted that can be
    left out. Raises UserError.
    """
    if not path.is_file():
        if os.path.lexists(path):
            raise DamagedError(f"{path} is no file, or a link to none")
        raise UserError(f"there is no checkpoint {path}")
    try:
        zipped = zipfile.is_zipfile(path)
        # torch does not check what it reads, and loads a file with a flipped bit in silence.
        if zipped and checked:
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise zipfile.BadZipFile(f"{damaged} is not what was written")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped or None)
    except Exception as error:  # a file that is no checkpoint can fail in any way
        raise DamagedError(
            f"{path} is not a checkpoint that can be read safely ({_first_sentence(error)}): "
            "it is damaged, cut short, or no file of torch.save"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no weights: a {type(content).__name__} where a dictionary of tensors should be")
    return content


def check_about(about: dict[str, Any], path: Path) -> None:
    """Raises UserError for a checkpoint of a later format, or of a model version that is not known here."""
    if not isinstance(about, dict) or not isinstance(about.get("format"), int):
        raise DamagedError(f"{path} is not a whole checkpoint: it does not say what it holds")
    if about["format"] != 1:
        raise UserError(f"{path} has checkpoint format {about['format']}, this rwkv_pl reads 1: install a newer one")
    kinds = {"model": str, "config": dict, "vocabulary": dict | None, "finished": str | None}
    optional = {name: kind for name, kind in {"past": dict, "skipped": int, "accumulate": int}.items() if name in about}
    if not all(isinstance(about.get(name, ...), kind) for name, kind in (kinds | optional).items()):
        raise DamagedError(f"{path} is not a whole checkpoint: it does not say what it holds")
    if about["model"] not in VERSIONS:
        raise UserError(f"{path} holds a {about['model']} model; known here: {', '.join(VERSIONS)}")


def version_of(weights: dict[str, Any], path: Path) -> str:
    """The model version by the names of the parameters. Raises UserError for one that is not known here."""
    for version, mark in _MARKS:
        if any(re.search(mark, str(key)) for key in weights):
            if version not in VERSIONS:
                raise UserError(f"{path} holds a {version} model; known here: {', '.join(VERSIONS)}")
            return version
    some = ", ".join(sorted(map(str, weights))[:3]) or "nothing"
    raise UserError(f"{path} holds no RWKV weights: it has {some}, and no blocks.0.att.time_first")


def _size_of(weights: dict[str, Tensor], path: Path) -> dict[str, int]:
    embedding = weights.get("emb.weight")
    if not isinstance(embedding, Tensor) or embedding.dim() != 2:
        raise UserError(f"{path} does not hold a whole rwkv4 model: it has no emb.weight of (vocabulary, channels)")
    vocab_size, n_embd = embedding.shape
    layers = {int(match[1]) for key in weights if (match := re.match(r"blocks\.(\d+)\.", key))}
    return {"vocab_size": vocab_size, "n_layer": len(layers), "n_embd": n_embd}


def _model_part(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix("model."): value for key, value in state_dict.items() if key.startswith("model.")}


def _first_sentence(error: BaseException) -> str:
    """An error's first sentence: torch's go on with advice that is not for this command's users."""
    return " ".join(str(error).split()).partition(". ")[0][:200] or type(error).__name__
