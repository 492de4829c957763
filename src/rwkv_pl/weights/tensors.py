"""The weights of one model: all parameters by their official names, validated."""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rwkv_pl.data.vocabulary import Vocabulary
from rwkv_pl.errors import CorruptFileError, UserError
from rwkv_pl.model import MODELS

# Versions that are not supported, but are named in the error. MODELS has the marks of the others.
OTHER_VERSIONS = {
    "rwkv6": r"att\.time_maa_",
    "rwkv5": r"att\.(time_faaaa|time_mix_g|ln_x\.weight)$",
}

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Weights:
    """All parameters of one model, as stored in a file or folder.

    path, form: the file or folder, and a description of its format.
    version:    the model's name in MODELS.
    config:     an instance of the version's config class.
    tensors:    by official name, with the model's shapes and the file's dtypes; memory-mapped, read when used.
    vocabulary: None if the file has none.
    step:       the number of optimizer steps, in a run's checkpoint; else None.
    trained_on: the digests of the corpora of a run's checkpoint by name: see Metadata.corpora.
    """

    path: Path
    form: str
    version: str
    config: Any
    tensors: dict[str, Tensor]
    vocabulary: Vocabulary | None
    step: int | None = None
    trained_on: dict[str, str] = field(default_factory=dict)

    def model(self) -> nn.Module:
        """Build the model on the CPU in float32 and in training mode, with copies of the tensors."""
        model = meta_model(self.version, self.config)
        copies = {
            name: value.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
            for name, value in self.tensors.items()
        }
        model.load_state_dict(copies, assign=True)
        return model

    def cast(self, dtype: torch.dtype) -> "Weights":
        """The weights rounded to `dtype`. Raises UserError if a value is too large for it."""
        tensors = {}
        for name, value in self.tensors.items():
            tensors[name] = value.to(dtype)
            if not _is_finite(tensors[name]):
                raise UserError(
                    f"{self.path}: {name} contains {float(value.abs().max()):.4g}, too large for {dtype_name(dtype)} "
                    f"(at most {torch.finfo(dtype).max:.4g}): choose another dtype"
                )
        return replace(self, tensors=tensors)

    @property
    def unread(self) -> dict[str, Tensor]:
        """Zeros for the parameters that the version's official files may hold, although nothing reads them."""
        shapes = MODELS[self.version][0].unread(self.config)
        return {name: torch.zeros(shape, dtype=self.dtype) for name, shape in shapes.items()}

    @property
    def dtype(self) -> torch.dtype:
        """The widest dtype of the tensors."""
        return max((value.dtype for value in self.tensors.values()), key=lambda dtype: torch.finfo(dtype).bits)

    @property
    def digest(self) -> str:
        """A digest of names, shapes and float32 values, 64 hex digits: the same in every lossless format and dtype."""
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
    """Check the names, shapes, dtypes and values of all tensors against the model that they describe.

    config, vocabulary: as stored with the tensors, if they were; they must match. Parameters that the model class knows
    and does not read are dropped, and `form` then names them. Raises UserError.
    """
    model_class, config_class = MODELS[version]
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise UserError(f"{path} holds more than weights: {name} is a {type(value).__name__}, not a tensor")
        if value.dtype not in DTYPES:
            known = ", ".join(map(dtype_name, DTYPES))
            raise UserError(f"{path}: {name} has dtype {dtype_name(value.dtype)}; supported: {known}")
        if value.layout != torch.strided or value.device.type != "cpu":
            raise UserError(f"{path}: {name} is not a plain dense CPU tensor")
        # Strides of 0, which repeat one number, would let a small file describe a huge model.
        if value.untyped_storage().nbytes() < value.nbytes:
            raise UserError(f"{path}: {name} of {_shape(value)} has fewer values than that in the file")
    try:
        size = model_class.sizes(tensors)
    except ValueError as error:
        raise UserError(f"{path} does not hold a whole {version} model: {error}") from error
    if not config:
        try:
            model_class.check_official(size)
        except ValueError as error:
            raise UserError(f"{path}: {error}") from error
    for key, there in size.items():
        if config and config.get(key) != there:
            raise CorruptFileError(f"{path} has {key}={config.get(key)} in its config, and {there} in its tensors")
    made = config_class(**(config or size))
    if vocabulary and vocabulary.size != made.vocab_size:
        raise CorruptFileError(f"{path}: its vocabulary has {vocabulary.size} tokens, its model {made.vocab_size}")
    if dropped := [name for name in model_class.unread(made) if name in tensors]:
        tensors = {name: value for name, value in tensors.items() if name not in dropped}
        form += f", without {', '.join(dropped)}, which nothing reads"
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
        # Some official files have (C,), others (1, 1, C).
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
            raise UserError(f"{path}: {name} holds NaN or infinite values: its training failed, or it is corrupt")
    return Weights(path, form, version, made, {name: fitted[name] for name in expected}, vocabulary)


def detect_version(weights: dict[str, Any], path: Path) -> str:
    """Detect the model version from the names of the parameters. Raises UserError if it is not supported."""
    marks = OTHER_VERSIONS | {version: model_class.mark for version, (model_class, _) in MODELS.items()}
    for version in sorted(marks, reverse=True):  # later versions keep some names of earlier ones
        if any(re.search(marks[version], str(key)) for key in weights):
            if version not in MODELS:
                raise UserError(f"{path} holds a {version} model; supported: {', '.join(MODELS)}")
            return version
    names = ", ".join(sorted(map(str, weights))[:3]) or "nothing"
    raise UserError(f"{path} holds no RWKV weights: it has {names}, and no time mixing of a block")


def meta_model(version: str, config: Any) -> nn.Module:
    """Build the model on the meta device, with names and shapes only: no size takes memory or initialisation time."""
    with torch.device("meta"):
        return MODELS[version][0](config)


def _is_finite(value: Tensor) -> bool:
    # aminmax returns NaN twice if any value is NaN. isfinite of the tensor would allocate a mask and take several times
    # as long.
    return not value.numel() or all(torch.isfinite(bound).item() for bound in torch.aminmax(value))


def abbreviate(names: Iterable[str]) -> str:
    """The first three names, and the number of the others."""
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shape(value: Tensor) -> str:
    return str(tuple(value.shape))
