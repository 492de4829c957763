"""The weights of one model: every parameter by its official name, validated."""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rwkv_pl.data.vocabulary import Vocabulary
from rwkv_pl.errors import CorruptFileError, UserError
from rwkv_pl.model import MODELS

# The first pattern that a file's keys show names its version; later versions keep some of the earlier names.
VERSION_PATTERNS = (
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
    version:    the model's name in MODELS.
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
        model = meta_model(self.version, self.config)
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
                    f"{self.path}: {name} holds {float(value.abs().max()):.4g}, too large for {dtype_name(dtype)} "
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
        dtypes = sorted({dtype_name(value.dtype) for value in self.tensors.values()})
        return (
            f"{self.form}, {self.version} {self.config.n_layer} x {self.config.n_embd}, "
            f"{len(self.tensors)} tensors, {sum(value.numel() for value in self.tensors.values()):,} parameters, "
            f"{' and '.join(dtypes)}, {self.config.vocab_size:,} tokens "
            f"({self.vocabulary.kind if self.vocabulary else 'vocabulary not known'})"
        )


def validate_tensors(
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
            known = ", ".join(map(dtype_name, DTYPES))
            raise UserError(f"{path}: {name} is of {dtype_name(value.dtype)}; read are {known}")
        if value.layout != torch.strided or value.device.type != "cpu":
            raise UserError(f"{path}: {name} is no plain tensor")
        # One number repeated by strides of 0 would make a small file a large model.
        if value.untyped_storage().nbytes() < value.nbytes:
            raise UserError(f"{path}: {name} of {_shape(value)} has not that many values in the file")
    size = _infer_size(tensors, version, path)
    for key, there in size.items():
        if config and config.get(key) != there:
            raise CorruptFileError(f"{path} says that its {key} is {config.get(key)}, and its tensors have {there}")
    config_class = MODELS[version][1]
    made = config_class(**(config or size))
    if vocabulary and vocabulary.size != made.vocab_size:
        raise CorruptFileError(f"{path}: its vocabulary has {vocabulary.size} tokens, its model {made.vocab_size}")
    expected = meta_model(version, made).state_dict()
    wrong = []
    if missing := [name for name in expected if name not in tensors]:
        wrong.append(f"it lacks {abbreviate(missing)}")
    if unknown := [name for name in tensors if name not in expected]:
        wrong.append(f"{version} has no {abbreviate(unknown)}")
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
        wrong.append(abbreviate(sorted(misshapen)))
    if wrong:
        described = f"{version} model of {made.n_layer} x {made.n_embd}"
        raise UserError(f"{path} does not hold a whole {described}: {'; '.join(wrong)}")
    for name, value in fitted.items():
        if not _is_finite(value):
            raise UserError(f"{path}: {name} holds NaN or infinite values: its training had failed, or it is damaged")
    return Weights(path, form, version, made, {name: fitted[name] for name in expected}, vocabulary)


def detect_version(weights: dict[str, Any], path: Path) -> str:
    """The model version by the names of the parameters. Raises UserError for one that is not known here."""
    for version, pattern in VERSION_PATTERNS:
        if any(re.search(pattern, str(key)) for key in weights):
            if version not in MODELS:
                raise UserError(f"{path} holds a {version} model; known here: {', '.join(MODELS)}")
            return version
    names = ", ".join(sorted(map(str, weights))[:3]) or "nothing"
    raise UserError(f"{path} holds no RWKV weights: it has {names}, and no blocks.0.att.time_first")


def _infer_size(weights: dict[str, Tensor], version: str, path: Path) -> dict[str, int]:
    embedding = weights.get("emb.weight")
    if embedding is None or embedding.dim() != 2 or not embedding.numel():
        raise UserError(f"{path} does not hold a whole {version} model: it has no emb.weight of (vocabulary, channels)")
    vocab_size, n_embd = embedding.shape
    layers = {int(match[1]) for key in weights if (match := re.match(r"blocks\.(\d+)\.", key))}
    if not layers:
        raise UserError(f"{path} does not hold a whole {version} model: it has no blocks")
    return {"vocab_size": vocab_size, "n_layer": len(layers), "n_embd": n_embd}


def meta_model(version: str, config: Any) -> nn.Module:
    """The model with names and shapes alone: whatever a file asks for costs no memory, and no initialisation."""
    with torch.device("meta"):
        return MODELS[version][0](config)


def _is_finite(value: Tensor) -> bool:
    # Both are NaN where one value is. isfinite makes something as large as the tensor, and takes several times as long.
    return not value.numel() or all(torch.isfinite(bound).item() for bound in torch.aminmax(value))


def abbreviate(names: Iterable[str]) -> str:
    """The first three, and how many more there are."""
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shape(value: Tensor) -> str:
    return str(tuple(value.shape))
