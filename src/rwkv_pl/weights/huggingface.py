"""Hugging Face folders: a layout for each model type (names and config, both ways), and the files with the tensors.

transformers itself is not needed, neither to read nor to write.
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
VOCABULARY = "vocabulary.json"  # of ours; not vocab.json, which transformers takes for a table of its own

# In the order in which transformers looks for them.
_TENSOR_FILES = (TENSORS, f"{TENSORS}.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class Layout:
    """How transformers stores one model type.

    model_type: its name in config.json.
    version:    the name in MODELS.
    names:      official parameter name -> theirs, {} for the number of the layer.
    epsilon:    of the layer norms. It is not a parameter, so the tensors do not show another value.
    """

    model_type: str
    version: str
    names: dict[str, str]
    epsilon: float

    def their_name(self, official: str) -> str:
        """Raises KeyError if the version has no such parameter."""
        return _rename(official, self.names)

    def official_name(self, theirs: str) -> str:
        """Raises KeyError if the model type has no such parameter."""
        return _rename(theirs, {theirs: official for official, theirs in self.names.items()})

    def from_official(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors by their names in transformers."""
        return {self.their_name(name): value for name, value in tensors.items()}

    def to_official(self, tensors: dict[str, Any], config: dict[str, Any], folder: Path) -> dict[str, Tensor]:
        """The tensors by their official names. Raises UserError if there are others than the model type has."""
        official, unknown = {}, []
        for theirs, value in tensors.items():
            try:
                official[self.official_name(theirs)] = value
            except (KeyError, TypeError):
                unknown.append(str(theirs))
        if unknown:
            raise UserError(f"{folder} holds what transformers' RWKV has not: {abbreviate(sorted(unknown))}")
        # A tensor shared by two names is stored once. If both are stored, both are used, whatever the config says.
        if "head.weight" not in official and config.get("tie_word_embeddings") is True and "emb.weight" in official:
            official["head.weight"] = official["emb.weight"]
        return official

    def config_of(self, config: Any, dtype: torch.dtype) -> dict[str, Any]:
        """config.json for a model of the version's `config` with weights of `dtype`."""
        return {
            "architectures": ["RwkvForCausalLM"],
            "model_type": self.model_type,
            "vocab_size": config.vocab_size,
            "hidden_size": config.n_embd,
            "num_hidden_layers": config.n_layer,
            "attention_hidden_size": config.n_embd,
            "intermediate_size": 4 * config.n_embd,
            "layer_norm_epsilon": self.epsilon,
            # The longest text that transformers' own CUDA kernel is built for; nothing else depends on it.
            "context_length": 1024,
            # By default 6: weights are divided in place, to keep float16 from overflowing, and the logits change.
            "rescale_every": 0,
            # By default 0, which is a byte like others, and would end a text.
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
"""By model_type."""


def find_layout(config: dict[str, Any], folder: Path) -> Layout:
    """The layout that config.json names. Raises UserError for an unknown one, or a setting that it does not have."""
    layout = LAYOUTS.get(str(config.get("model_type")))
    if layout is None:
        known = ", ".join(f"{layout.model_type} ({layout.version})" for layout in LAYOUTS.values())
        raise UserError(f"{folder} holds a {config.get('model_type')} model by its {CONFIG}; known here: {known}")
    if (epsilon := config.get("layer_norm_epsilon", layout.epsilon)) != layout.epsilon:
        raise UserError(f"{folder / CONFIG} has layer_norm_epsilon {epsilon}; {layout.version} has {layout.epsilon}")
    return layout


def _rename(name: str, table: dict[str, str]) -> str:
    layer = re.search(r"(?<=blocks\.)(0|[1-9]\d{0,5})(?=\.)", name)
    if not layer:
        return table[name]
    return table[f"{name[: layer.start()]}{{}}{name[layer.end() :]}"].format(layer[0])


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a few keys. Raises UserError."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"{path} is no JSON ({error})") from error
    if not isinstance(content, dict):
        raise CorruptFileError(f"{path} holds a {type(content).__name__} where a JSON object should be")
    return content


def tensor_files(folder: Path) -> list[Path]:
    """The files with the folder's tensors: one, or the shards that its index names. Raises UserError."""
    found = next((folder / name for name in _TENSOR_FILES if (folder / name).is_file()), None)
    if found is None:
        raise UserError(f"{folder} has a {CONFIG} and no weights: there is neither {TENSORS} nor pytorch_model.bin")
    if found.suffix != ".json":
        return [found]
    shards = read_json(found).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise CorruptFileError(f"{found} names no files: it has no weight_map")
    files = []
    for name in sorted(set(map(str, shards.values()))):
        # A name is one of the folder's files, and leads nowhere else.
        if Path(name).name != name or not name.endswith((".safetensors", ".bin")):
            raise CorruptFileError(f"{found} names {name!r}, which is no file of tensors in its folder")
        if not (folder / name).is_file():
            raise CorruptFileError(f"{found} names {name}, which is not there")
        files.append(folder / name)
    return files


def read_tensors(path: Path) -> dict[str, Tensor]:
    """What a .safetensors file holds, by its own names, mapped. Raises UserError."""
    try:
        return load_file(path)
    except Exception as error:  # a file that is none can fail in any way
        reason = one_line(error)[:200]
        raise CorruptFileError(f"{path} is no safetensors file, or damaged ({reason})") from error


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Writes a .safetensors file, flushed to the disk. Raises OSError."""
    path.touch()
    mode = path.stat().st_mode  # what the user's other files have; safetensors' can be read by nobody else
    try:
        save_file(tensors, path, metadata={"format": "pt"})
        with path.open("r+b") as file:
            os.fsync(file.fileno())
        path.chmod(mode)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else None, str(error), str(path)) from error
