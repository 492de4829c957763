"""Weights on disk, in and out: a run folder, a checkpoint of ours, an official RWKV-4 `.pth`, a Hugging Face folder."""

import contextlib
import hashlib
import json
import os
import re
import warnings
import zipfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rwkv_pl import huggingface
from rwkv_pl.config import DamagedError, RunError, UserError
from rwkv_pl.data.vocabulary import Vocabulary, read_vocabulary
from rwkv_pl.files import publish, publish_folder
from rwkv_pl.model import VERSIONS

CHECKPOINT_FORMAT = 1

# The first pattern that a file's keys show names its version; later versions keep some of the earlier names.
_MARKS = (
    ("rwkv7", r"att\.w0$"),
    ("rwkv6", r"att\.time_maa_"),
    ("rwkv5", r"att\.(time_faaaa|time_mix_g|ln_x\.weight)$"),
    ("rwkv4", r"att\.time_first$"),
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Weights:
    """Every parameter of one model, as a file or folder holds them.

    path, form: where they were found, and what that is, in words.
    version:    the model's name in VERSIONS.
    config:     of the version's config class.
    tensors:    by official name, in the model's shapes and the file's dtypes; mapped, and read when used.
    vocabulary: None where the file does not tell.
    step:       of a run's checkpoint, how many optimizer steps it had made; trained_on: the digest of its corpus.
    """

    path: Path
    form: str
    version: str
    config: Any
    tensors: dict[str, Tensor]
    vocabulary: Vocabulary | None
    step: int | None = None
    trained_on: str | None = None

    def model(self) -> nn.Module:
        """On the CPU in float32 and in training mode, with copies of the tensors."""
        model = _without_memory(self.version, self.config)
        copies = {
            name: value.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
            for name, value in self.tensors.items()
        }
        model.load_state_dict(copies, assign=True)
        return model

    def cast(self, dtype: torch.dtype) -> "Weights":
        """The same in `dtype`, rounded. Raises UserError where a value is too large for it."""
        tensors = {}
        for name, value in self.tensors.items():
            tensors[name] = value.to(dtype)
            if not _is_finite(tensors[name]):
                raise UserError(
                    f"{self.path}: {name} holds {float(value.abs().max()):.4g}, too large for {_called(dtype)} "
                    f"(at most {torch.finfo(dtype).max:.4g}): choose another dtype"
                )
        return replace(self, tensors=tensors)

    @property
    def dtype(self) -> torch.dtype:
        """The widest of the tensors'."""
        return max((value.dtype for value in self.tensors.values()), key=lambda dtype: torch.finfo(dtype).bits)

    @property
    def digest(self) -> str:
        """64 hex digits, of names, shapes and values in float32: the same in every form and dtype that holds them."""
        total = hashlib.sha256()
        for name in sorted(self.tensors):
            value = self.tensors[name].to(torch.float32).contiguous()
            total.update(f"{name} {tuple(value.shape)}\n".encode())
            total.update(value.numpy().data)
        return total.hexdigest()

    def __str__(self) -> str:
        dtypes = sorted({_called(value.dtype) for value in self.tensors.values()})
        return (
            f"{self.form}, {self.version} {self.config.n_layer} x {self.config.n_embd}, "
            f"{len(self.tensors)} tensors, {sum(value.numel() for value in self.tensors.values()):,} parameters, "
            f"{' and '.join(dtypes)}, {self.config.vocab_size:,} tokens "
            f"({self.vocabulary.kind if self.vocabulary else 'vocabulary not known'})"
        )


def load_weights(source: str | Path) -> tuple[nn.Module, Vocabulary | None]:
    """The model that `source` holds, on the CPU in float32 and in training mode, and its vocabulary.

    source: as for `read_weights`. The vocabulary is None where it is not known, as of an official `.pth`.

    Raises UserError, one line, where there is nothing, or nothing that we can read.
    """
    weights = read_weights(source)
    return weights.model(), weights.vocabulary


def read_weights(source: str | Path) -> Weights:
    """What `source` holds, all of its tensors looked at.

    source: a run folder (its best.ckpt, else last.ckpt), a `.ckpt` of ours, an official RWKV-4 `.pth`, or a folder of
    Hugging Face transformers. The content tells which it is, and the tensors the version and the size.

    Raises UserError, one line, where a tensor is missing, left over, of another shape, or not finite.
    """
    path = weights_path(Path(source))
    try:
        return _read_folder(path) if path.is_dir() else _read_file(path)
    except UserError as error:
        if str(path) in str(error):
            raise
        raise DamagedError(f"{path}: {error}") from error
    except Exception as error:  # what was made by hand, or is damaged, can fail in any way
        raise DamagedError(f"{path} does not hold a whole model ({_first_sentence(error)})") from error


def _read_file(path: Path) -> Weights:
    content = read_checkpoint(path)
    if "rwkv_pl" not in content:
        return _fitted(content, version_of(content, path), path, "official .pth")
    about = content["rwkv_pl"]
    check_about(about, path)
    vocabulary = Vocabulary.from_dict(about["vocabulary"]) if about["vocabulary"] else None
    weights = _fitted(
        _model_part(content["state_dict"]), about["model"], path, "checkpoint of rwkv_pl", about["config"], vocabulary
    )
    return replace(weights, step=content.get("global_step"), trained_on=about.get("past", {}).get("corpus"))


def _read_folder(folder: Path) -> Weights:
    config = huggingface.read_config(folder)
    tensors: dict[str, Tensor] = {}
    for path in huggingface.tensor_files(folder):
        safe = path.suffix == ".safetensors"
        tensors |= huggingface.read_tensors(path) if safe else read_checkpoint(path)
    tensors = huggingface.to_official(tensors, config, folder)
    stored, tokenizer = folder / huggingface.VOCABULARY, folder / huggingface.TOKENIZER
    vocabulary = Vocabulary.from_dict(huggingface.read_json(stored)) if stored.exists() else None
    if vocabulary is None and tokenizer.exists():
        # The 20B tokenizer, or another that is not known here and leaves the weights what they are.
        with contextlib.suppress(UserError):
            known = read_vocabulary(tokenizer)
            vocabulary = known if known.size == len(tensors.get("emb.weight", ())) else None
    return _fitted(tensors, "rwkv4", folder, "Hugging Face folder", vocabulary=vocabulary)


def _fitted(
    tensors: dict[str, Any],
    version: str,
    path: Path,
    form: str,
    config: dict[str, Any] | None = None,
    vocabulary: Vocabulary | None = None,
) -> Weights:
    """The tensors as those of a model, each name, shape, dtype and value looked at. Raises UserError."""
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise UserError(f"{path} holds more than weights: {name} is a {type(value).__name__}, not a tensor")
        if value.dtype not in DTYPES:
            known = ", ".join(map(_called, DTYPES))
            raise UserError(f"{path}: {name} is of {_called(value.dtype)}; read are {known}")
        if value.layout != torch.strided or value.device.type != "cpu":
            raise UserError(f"{path}: {name} is no plain tensor")
        # One number repeated by strides of 0 would make a small file a large model.
        if value.untyped_storage().nbytes() < value.nbytes:
            raise UserError(f"{path}: {name} of {_shape(value)} has not that many values in the file")
    size = _size_of(tensors, version, path)
    for key, there in size.items():
        if config and config.get(key) != there:
            raise DamagedError(f"{path} says that its {key} is {config.get(key)}, and its tensors have {there}")
    config_class = VERSIONS[version][1]
    made = config_class(**(config or size))
    if vocabulary and vocabulary.size != made.vocab_size:
        raise DamagedError(f"{path}: its vocabulary has {vocabulary.size} tokens, its model {made.vocab_size}")
    expected = _without_memory(version, made).state_dict()
    wrong = []
    if missing := [name for name in expected if name not in tensors]:
        wrong.append(f"it lacks {huggingface.some(missing)}")
    if unknown := [name for name in tensors if name not in expected]:
        wrong.append(f"{version} has no {huggingface.some(unknown)}")
    fitted = {}
    misshapen = []
    for name in expected.keys() & tensors.keys():
        value, shape = tensors[name].detach(), expected[name].shape
        # Some official files hold (C,) where others hold (1, 1, C).
        if [n for n in value.shape if n != 1] != [n for n in shape if n != 1]:
            misshapen.append(f"{name} is {_shape(value)} and should be {_shape(expected[name])}")
            continue
        fitted[name] = value.reshape(shape)
    if misshapen:
        wrong.append(huggingface.some(sorted(misshapen)))
    if wrong:
        size_told = f"{version} model of {made.n_layer} x {made.n_embd}"
        raise UserError(f"{path} does not hold a whole {size_told}: {'; '.join(wrong)}")
    for name, value in fitted.items():
        if not _is_finite(value):
            raise UserError(f"{path}: {name} holds NaN or infinite values: its training had failed, or it is damaged")
    return Weights(path, form, version, made, {name: fitted[name] for name in expected}, vocabulary)


def write_weights(weights: Weights, target: Path) -> Weights:
    """Writes them in the form that the name asks for: `.pth`, `.ckpt`, else a Hugging Face folder.

    What was written is read again, and compared bit for bit, before it bears its name. Returns what was read. A `.pth`
    is weights alone, it keeps no vocabulary. The folder of `target` is there, `target` not, or an empty folder.

    Raises OSError where the disk refuses; nothing is left then.
    """
    from rwkv_pl.data.tokenizer_20b import as_tokenizer  # its library is for those who use it

    # Each in memory of its own: a part of something larger would be written as the whole of it.
    weights = replace(weights, tensors={name: _packed(value) for name, value in weights.tensors.items()})
    if target.suffix.lower() in (".pth", ".ckpt"):
        with publish(target) as file:
            torch.save(weights.tensors if target.suffix.lower() == ".pth" else _checkpoint(weights), file)
            file.flush()
            written = _read_again(Path(file.name), weights)
    else:
        with publish_folder(target) as folder:
            config = weights.config
            about = huggingface.config_of(config.vocab_size, config.n_layer, config.n_embd, weights.dtype)
            _write_json(about, folder / huggingface.CONFIG)
            if weights.vocabulary:
                _write_json(weights.vocabulary.to_dict(), folder / huggingface.VOCABULARY)
                if tokenizer := as_tokenizer(weights.vocabulary):
                    _write_json(tokenizer, folder / huggingface.TOKENIZER)
                    # Without it transformers takes a class for this model whose own settings override the json's.
                    _write_json({"tokenizer_class": "PreTrainedTokenizerFast"}, folder / "tokenizer_config.json")
            huggingface.write_tensors(weights.tensors, folder / huggingface.TENSORS)
            written = _read_again(folder, weights)
    return replace(written, path=target)


def _checkpoint(weights: Weights) -> dict[str, Any]:
    """A checkpoint without a run: it can be loaded, not resumed."""
    return {
        "rwkv_pl": {
            "format": CHECKPOINT_FORMAT,
            "model": weights.version,
            "config": asdict(weights.config),
            "vocabulary": weights.vocabulary.to_dict() if weights.vocabulary else None,
            "finished": None,
        },
        "state_dict": {f"model.{name}": value for name, value in weights.tensors.items()},
    }


def _read_again(path: Path, weights: Weights) -> Weights:
    written = read_weights(path)
    for name, value in weights.tensors.items():
        there = written.tensors[name]
        if there.dtype != value.dtype or not torch.equal(_bits(there), _bits(value)):
            raise RunError(f"{name} was not written to {path} as it was: its disk may be failing")
    return written


def _write_json(content: dict[str, Any], path: Path) -> None:
    with publish(path) as file:
        file.write(json.dumps(content, indent=2).encode() + b"\n")


def weights_path(source: Path) -> Path:
    """What `source` means: of a run folder its best.ckpt, else last.ckpt; a file or Hugging Face folder itself."""
    if source.is_file():
        return source
    if not source.exists():
        raise UserError(f"there are no weights at {source}: give a run folder, .ckpt, .pth or Hugging Face folder")
    for folder in (source / "checkpoints", source):
        for name in ("best.ckpt", "last.ckpt"):
            if (path := folder / name).is_file():
                return path
    if (source / huggingface.CONFIG).is_file():
        return source
    raise UserError(
        f"{source} is no run folder with weights: it holds neither checkpoints/best.ckpt nor last.ckpt, "
        f"nor a {huggingface.CONFIG} of Hugging Face"
    )


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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of a stranger's pickle, before it refuses it
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
    if about["format"] != CHECKPOINT_FORMAT:
        raise UserError(
            f"{path} has checkpoint format {about['format']}, this rwkv_pl reads {CHECKPOINT_FORMAT}: "
            "install a newer one"
        )
    kinds = {"model": str, "config": dict, "vocabulary": dict | None, "finished": str | None}
    later = {"past": dict, "skipped": int, "accumulate": int, "precision": str}
    optional = {name: kind for name, kind in later.items() if name in about}
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


def _size_of(weights: dict[str, Tensor], version: str, path: Path) -> dict[str, int]:
    embedding = weights.get("emb.weight")
    if embedding is None or embedding.dim() != 2 or not embedding.numel():
        raise UserError(f"{path} does not hold a whole {version} model: it has no emb.weight of (vocabulary, channels)")
    vocab_size, n_embd = embedding.shape
    layers = {int(match[1]) for key in weights if (match := re.match(r"blocks\.(\d+)\.", key))}
    if not layers:
        raise UserError(f"{path} does not hold a whole {version} model: it has no blocks")
    return {"vocab_size": vocab_size, "n_layer": len(layers), "n_embd": n_embd}


def _model_part(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix("model."): value for key, value in state_dict.items() if key.startswith("model.")}


def _without_memory(version: str, config: Any) -> nn.Module:
    """The model with names and shapes alone: whatever a file asks for costs no memory, and no initialisation."""
    with torch.device("meta"):
        return VERSIONS[version][0](config)


def _is_finite(value: Tensor) -> bool:
    # Both are NaN where one value is. isfinite makes something as large as the tensor, and takes several times as long.
    return not value.numel() or all(torch.isfinite(bound).item() for bound in torch.aminmax(value))


def _packed(value: Tensor) -> Tensor:
    whole = value.is_contiguous() and value.untyped_storage().nbytes() == value.nbytes
    return value if whole else value.clone(memory_format=torch.contiguous_format)


def _bits(value: Tensor) -> Tensor:
    """Every bit, that of a zero's sign too."""
    return value.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[value.element_size()])


def _called(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shape(value: Tensor) -> str:
    return str(tuple(value.shape))


def _first_sentence(error: BaseException) -> str:
    """An error's first sentence: torch's go on with advice that is not for this command's users."""
    return " ".join(str(error).split()).partition(". ")[0][:200] or type(error).__name__
