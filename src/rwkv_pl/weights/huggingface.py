"""RWKV-4 as Hugging Face transformers keeps it: the names of the parameters, config.json, and the files of a folder.

transformers itself is not needed, neither to read nor to write.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rwkv_pl.config import DamagedError, UserError
from rwkv_pl.weights.tensors import abbreviate

# Official name and theirs, {} for the number of the layer.
NAMES = {
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
_OFFICIAL = {theirs: official for official, theirs in NAMES.items()}

CONFIG, TENSORS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
VOCABULARY = "vocabulary.json"  # of ours; not vocab.json, which transformers takes for a table of its own

# In the order in which transformers looks for them.
_TENSOR_FILES = (TENSORS, f"{TENSORS}.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")

EPSILON = 1e-5
"""Of the layer norms: no parameter, so that no other would be seen in the tensors."""


def their_name(official: str) -> str:
    """Raises KeyError where RWKV-4 has no such parameter."""
    return _renamed(official, NAMES)


def official_name(theirs: str) -> str:
    """Raises KeyError where transformers' RWKV has no such parameter."""
    return _renamed(theirs, _OFFICIAL)


def _renamed(name: str, table: dict[str, str]) -> str:
    layer = re.search(r"(?<=blocks\.)(0|[1-9]\d{0,5})(?=\.)", name)
    if not layer:
        return table[name]
    return table[f"{name[: layer.start()]}{{}}{name[layer.end() :]}"].format(layer[0])


def config_of(vocab_size: int, n_layer: int, n_embd: int, dtype: torch.dtype) -> dict[str, Any]:
    """config.json of an RWKV-4 with weights of `dtype`."""
    return {
        "architectures": ["RwkvForCausalLM"],
        "model_type": "rwkv",
        "vocab_size": vocab_size,
        "hidden_size": n_embd,
        "num_hidden_layers": n_layer,
        "attention_hidden_size": n_embd,
        "intermediate_size": 4 * n_embd,
        "layer_norm_epsilon": EPSILON,
        # The longest text that transformers' own CUDA kernel is built for; nothing else depends on it.
        "context_length": 1024,
        # By default 6: weights are divided where they lie, to keep float16 from overflowing, and the logits move.
        "rescale_every": 0,
        # By default 0, which is a byte like others, and would end a text.
        "bos_token_id": None,
        "eos_token_id": None,
        "tie_word_embeddings": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def read_config(folder: Path) -> dict[str, Any]:
    """config.json, as far as it says what the tensors do not: the sizes are theirs to tell. Raises UserError."""
    config = read_json(folder / CONFIG)
    if (model_type := config.get("model_type")) != "rwkv":
        raise UserError(f"{folder} holds a {model_type} model by its {CONFIG}; known here: rwkv, which is RWKV-4")
    if (epsilon := config.get("layer_norm_epsilon", EPSILON)) != EPSILON:
        raise UserError(f"{folder / CONFIG} has layer_norm_epsilon {epsilon}; RWKV-4 has {EPSILON}")
    return config


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a few keys. Raises UserError."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path} is no JSON ({error})") from error
    if not isinstance(content, dict):
        raise DamagedError(f"{path} holds a {type(content).__name__} where a JSON object should be")
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
        raise DamagedError(f"{found} names no files: it has no weight_map")
    files = []
    for name in sorted(set(map(str, shards.values()))):
        # A name is one of the folder's files, and leads nowhere else.
        if Path(name).name != name or not name.endswith((".safetensors", ".bin")):
            raise DamagedError(f"{found} names {name!r}, which is no file of tensors in its folder")
        if not (folder / name).is_file():
            raise DamagedError(f"{found} names {name}, which is not there")
        files.append(folder / name)
    return files


def read_tensors(path: Path) -> dict[str, Tensor]:
    """What a .safetensors file holds, by its own names, mapped. Raises UserError."""
    try:
        return load_file(path)
    except Exception as error:  # a file that is none can fail in any way
        told = " ".join(str(error).split())[:200]
        raise DamagedError(f"{path} is no safetensors file, or damaged ({told})") from error


def to_official(tensors: dict[str, Any], config: dict[str, Any], folder: Path) -> dict[str, Tensor]:
    """The tensors by their official names. Raises UserError where there are others than RWKV-4 has."""
    official, unknown = {}, []
    for theirs, value in tensors.items():
        try:
            official[official_name(theirs)] = value
        except (KeyError, TypeError):
            unknown.append(str(theirs))
    if unknown:
        raise UserError(f"{folder} holds what transformers' RWKV has not: {abbreviate(sorted(unknown))}")
    # One tensor under two names is kept once. Where both are there they are what they are, whatever the config says.
    if "head.weight" not in official and config.get("tie_word_embeddings") is True and "emb.weight" in official:
        official["head.weight"] = official["emb.weight"]
    return official

def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """official name -> tensor, into a .safetensors file on the disk under transformers' names. Raises OSError."""
    path.touch()
    mode = path.stat().st_mode  # what the user's other files have; safetensors' can be read by nobody else
    try:
        save_file({their_name(name): value for name, value in tensors.items()}, path, metadata={"format": "pt"})
        with path.open("r+b") as file:
            os.fsync(file.fileno())
        path.chmod(mode)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else None, str(error), str(path)) from error
