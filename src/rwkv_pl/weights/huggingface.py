"""Reads and writes Hugging Face folders: a layout per model type (parameter names and config) and the tensor files.

Neither reading nor writing needs transformers.
"""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rwkv_pl.errors import CorruptFileError, UserError, one_line
from rwkv_pl.weights.tensors import abbreviate

CONFIG, TENSORS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
VOCABULARY = "vocabulary.json"  # rwkv_pl's own file; transformers would take a vocab.json for one of its formats

# In the order in which transformers searches for them.
_TENSOR_FILES = (TENSORS, f"{TENSORS}.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class Layout:
    """The format in which transformers stores one model type.

    model_type: its name in config.json.
    version:    its name in MODELS.
    names:      official parameter name -> name in transformers, with {} for the layer's number.
    epsilon:    of the layer norms. It is not a parameter, so only config.json can reveal another value.
    """

    model_type: str
    version: str
    names: dict[str, str]
    epsilon: float

    def their_name(self, official: str) -> str:
        """The name of a parameter in transformers. Raises KeyError if the version has no such parameter."""
        return _rename(official, self.names)

    def official_name(self, theirs: str) -> str:
        """The official name of a parameter. Raises KeyError if the model type has no such parameter."""
        return _rename(theirs, {theirs: official for official, theirs in self.names.items()})

    def from_official(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename tensors from the official names to those of transformers."""
        return {self.their_name(name): value for name, value in tensors.items()}

    def to_official(self, tensors: dict[str, Any], config: dict[str, Any], folder: Path) -> dict[str, Tensor]:
        """Rename tensors to the official names. Raises UserError if one is not a parameter of the model type."""
        official, unknown = {}, []
        for theirs, value in tensors.items():
            try:
                official[self.official_name(theirs)] = value
            except (KeyError, TypeError):
                unknown.append(str(theirs))
        if unknown:
            raise UserError(f"{folder} has tensors that transformers' RWKV lacks: {abbreviate(sorted(unknown))}")
        # Tied weights are stored once. If both tensors are stored, both are used, even if the config says tied.
        if "head.weight" not in official and config.get("tie_word_embeddings") is True and "emb.weight" in official:
            official["head.weight"] = official["emb.weight"]
        return official

    def config_of(self, config: Any, dtype: torch.dtype) -> dict[str, Any]:
        """The content of config.json for a model with the version's `config` and weights of `dtype`."""
        return {
            "architectures": ["RwkvForCausalLM"],
            "model_type": self.model_type,
            "vocab_size": config.vocab_size,
            "hidden_size": config.n_embd,
            "num_hidden_layers": config.n_layer,
            "attention_hidden_size": config.n_embd,
            "intermediate_size": 4 * config.n_embd,
            "layer_norm_epsilon": self.epsilon,
            # The longest sequence of transformers' CUDA kernel; it has no other effect.
            "context_length": 1024,
            # The default, 6, divides weights in place to keep float16 from overflowing, and so changes the logits.
            "rescale_every": 0,
            # The default is 0, which in a byte vocabulary is an ordinary byte, and would end the text.
            "bos_token_id": None,
            "eos_token_id": None,
            "tie_word_embeddings": False,
            "torch_dtype": str(dtype).removeprefix("torch."),
        }


_RWKV4_NAMES = {
    "emb.weight": "rwkv.embeddings.weight",
    "blocks.{}.ln0.weight": "rwkv.blocks.{}.pre_ln.weight",
    "blocks.{}.ln0.bias": "rwkv.blocks.{}.pre_ln.bias",
    "blocks.{}.ln1.weight": "rwkv.blocks.{}.ln1.weight",
    "blocks.{}.ln1.bias": "rwkv.blocks.{}.ln1.bias",
    "blocks.{}.ln2.weight": "rwkv.blocks.{}.ln2.weight",
    "blocks.{}.ln2.bias": "rwkv.blocks.{}.ln2.bias",
    "blocks.{}.att.time_decay": "rwkv.blocks.{}.attention.time_decay",
    "blocks.{}.att.time_first": "rwkv.blocks.{}.attention.time_first",
    "blocks.{}.att.time_mix_k": "rwkv.blocks.{}.attention.time_mix_key",
    "blocks.{}.att.time_mix_v": "rwkv.blocks.{}.attention.time_mix_value",
    "blocks.{}.att.time_mix_r": "rwkv.blocks.{}.attention.time_mix_receptance",
    "blocks.{}.att.key.weight": "rwkv.blocks.{}.attention.key.weight",
    "blocks.{}.att.value.weight": "rwkv.blocks.{}.attention.value.weight",
    "blocks.{}.att.receptance.weight": "rwkv.blocks.{}.attention.receptance.weight",
    "blocks.{}.att.output.weight": "rwkv.blocks.{}.attention.output.weight",
    "blocks.{}.ffn.time_mix_k": "rwkv.blocks.{}.feed_forward.time_mix_key",
    "blocks.{}.ffn.time_mix_r": "rwkv.blocks.{}.feed_forward.time_mix_receptance",
    "blocks.{}.ffn.key.weight": "rwkv.blocks.{}.feed_forward.key.weight",
    "blocks.{}.ffn.receptance.weight": "rwkv.blocks.{}.feed_forward.receptance.weight",
    "blocks.{}.ffn.value.weight": "rwkv.blocks.{}.feed_forward.value.weight",
    "ln_out.weight": "rwkv.ln_out.weight",
    "ln_out.bias": "rwkv.ln_out.bias",
    "head.weight": "head.weight",
}

LAYOUTS = {"rwkv": Layout("rwkv", "rwkv4", _RWKV4_NAMES, epsilon=1e-5)}
"""The layouts by model_type."""


def find_layout(config: dict[str, Any], folder: Path) -> Layout:
    """The layout that config.json names. Raises UserError for an unknown model type or another layer norm epsilon."""
    layout = LAYOUTS.get(str(config.get("model_type")))
    if layout is None:
        known = ", ".join(f"{layout.model_type} ({layout.version})" for layout in LAYOUTS.values())
        raise UserError(f"{folder} holds a {config.get('model_type')} model, says its {CONFIG}; supported: {known}")
    if (epsilon := config.get("layer_norm_epsilon", layout.epsilon)) != layout.epsilon:
        raise UserError(f"{folder / CONFIG} has layer_norm_epsilon {epsilon}; {layout.version} has {layout.epsilon}")
    return layout


def _rename(name: str, table: dict[str, str]) -> str:
    layer = re.search(r"(?<=blocks\.)(0|[1-9]\d{0,5})(?=\.)", name)
    if not layer:
        return table[name]
    return table[f"{name[: layer.start()]}{{}}{name[layer.end() :]}"].format(layer[0])


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
