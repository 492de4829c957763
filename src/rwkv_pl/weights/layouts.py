"""The layouts of Hugging Face's model types: names of the parameters and content of config.json, both ways."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkv_pl.errors import UserError
from rwkv_pl.weights.tensors import abbreviate


@dataclass(frozen=True)
class Layout:
    """The format of one of Hugging Face's model classes. A subclass knows the content of its config.json.

    model_type: its name in config.json.
    architecture: the name of the class in config.json.
    version:    its name in MODELS.
    names:      official parameter name -> name in transformers, with {} for the layer's number.
    required:   keys of config.json, the values that the version has and files may state, such as the epsilon of a norm,
                which is not a parameter.
    stated:     more such keys, that files of some programs state and that are not written.
    """

    model_type: str
    architecture: str
    version: str
    names: dict[str, str]
    required: dict[str, Any]
    stated: dict[str, Any] = field(default_factory=dict)

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
            raise UserError(f"{folder} has tensors that {self.model_type} models lack: {abbreviate(sorted(unknown))}")
        # Tied weights are stored once. If both tensors are stored, both are used, even if the config says tied.
        if "head.weight" not in official and config.get("tie_word_embeddings") is True and "emb.weight" in official:
            official["head.weight"] = official["emb.weight"]
        return official

    def config_of(self, config: Any, dtype: torch.dtype) -> dict[str, Any]:
        """The content of config.json for a model with the version's `config` and weights of `dtype`."""
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "vocab_size": config.vocab_size,
            "hidden_size": config.n_embd,
            "num_hidden_layers": config.n_layer,
            "attention_hidden_size": config.n_embd,
            **self.required,
            # The default is an ordinary token in some vocabularies, and would end the text.
            "bos_token_id": None,
            "eos_token_id": None,
            "tie_word_embeddings": False,
            "torch_dtype": str(dtype).removeprefix("torch."),
        }


class RWKV4Layout(Layout):
    """`rwkv`, the model type of transformers."""

    def config_of(self, config: Any, dtype: torch.dtype) -> dict[str, Any]:
        return super().config_of(config, dtype) | {
            "intermediate_size": 4 * config.n_embd,
            # The longest sequence of transformers' CUDA kernel; it has no other effect.
            "context_length": 1024,
            # The default, 6, divides weights in place to keep float16 from overflowing, and so changes the logits.
            "rescale_every": 0,
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


class RWKV7Layout(Layout):
    """`rwkv7`, the model type of the package rwkv7-hf and of flash-linear-attention.

    The low-rank functions are torch.nn.Linear there, whose matrices are the transposes of the official ones, and whose
    biases are vectors without the official leading dimensions.
    """

    def from_official(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors = {name: value.T.contiguous() if _is_low_rank(name) else value for name, value in tensors.items()}
        theirs = super().from_official(tensors)
        return {name: value.flatten() if _VECTORS.search(name) else value for name, value in theirs.items()}

    def to_official(self, tensors: dict[str, Any], config: dict[str, Any], folder: Path) -> dict[str, Tensor]:
        official = super().to_official(tensors, config, folder)
        return {
            name: value.mT if _is_low_rank(name) and value.dim() == 2 else value for name, value in official.items()
        }

    def config_of(self, config: Any, dtype: torch.dtype) -> dict[str, Any]:
        return super().config_of(config, dtype) | {
            "head_dim": config.head_size,
            "num_heads": config.n_embd // config.head_size,
            "intermediate_size": config.n_ffn,
            "hidden_ratio": config.n_ffn / config.n_embd,
            "decay_low_rank_dim": config.rank_w,
            "a_low_rank_dim": config.rank_a,
            "v_low_rank_dim": config.rank_v,
            "gate_low_rank_dim": config.rank_g,
            # The embedding of this token would have no gradient in their training.
            "pad_token_id": None,
        }


def _is_low_rank(official: str) -> bool:
    return bool(re.search(r"\.att\.[wavg][12]$", official))


_VECTORS = re.compile(r"(lora\.2\.bias|attn\.k_[ka]|ffn\.x_k)$")

_RWKV7_PARTS = {
    "ln0.weight": "pre_norm.weight",
    "ln0.bias": "pre_norm.bias",
    "ln1.weight": "attn_norm.weight",
    "ln1.bias": "attn_norm.bias",
    "ln2.weight": "ffn_norm.weight",
    "ln2.bias": "ffn_norm.bias",
    **{f"att.{name}": f"attn.{name}" for name in ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "k_k", "k_a", "r_k")},
    **{f"att.{name}0": f"attn.{name}_lora.lora.2.bias" for name in ("w", "a", "v")},
    **{f"att.{name}1": f"attn.{name}_lora.lora.0.weight" for name in ("w", "a", "v", "g")},
    **{f"att.{name}2": f"attn.{name}_lora.lora.2.weight" for name in ("w", "a", "v", "g")},
    "att.receptance.weight": "attn.r_proj.weight",
    "att.key.weight": "attn.k_proj.weight",
    "att.value.weight": "attn.v_proj.weight",
    "att.output.weight": "attn.o_proj.weight",
    "att.ln_x.weight": "attn.g_norm.weight",
    "att.ln_x.bias": "attn.g_norm.bias",
    "ffn.x_k": "ffn.x_k",
    "ffn.key.weight": "ffn.key.weight",
    "ffn.value.weight": "ffn.value.weight",
}
_RWKV7_NAMES = {
    "emb.weight": "model.embeddings.weight",
    **{f"blocks.{{}}.{ours}": f"model.layers.{{}}.{theirs}" for ours, theirs in _RWKV7_PARTS.items()},
    "ln_out.weight": "model.norm.weight",
    "ln_out.bias": "model.norm.bias",
    "head.weight": "lm_head.weight",
}

# The class of a pull request to transformers has the official names and shapes, below the name of its base model.
_RWKV7_OFFICIAL_NAMES = {name: name if name == "head.weight" else f"rwkv7.{name}" for name in _RWKV7_NAMES}

# They determine the epsilon of the GroupNorm over a head: head_dim * norm_eps in rwkv7-hf and flash-linear-attention.
_RWKV7_STATED = {"head_dim": 64, "head_size": 64, "group_norm_epsilon": 64e-5}

LAYOUTS = (
    RWKV4Layout("rwkv", "RwkvForCausalLM", "rwkv4", _RWKV4_NAMES, required={"layer_norm_epsilon": 1e-5}),
    RWKV7Layout("rwkv7", "RWKV7ForCausalLM", "rwkv7", _RWKV7_NAMES, {"norm_eps": 1e-5}, _RWKV7_STATED),
    Layout("rwkv7", "Rwkv7ForCausalLM", "rwkv7", _RWKV7_OFFICIAL_NAMES, {"norm_eps": 1e-5}, _RWKV7_STATED),
)
"""All layouts; the first one of a version is the one that is written."""


def layout_of(version: str) -> Layout:
    """The layout in which a version is written."""
    return next(layout for layout in LAYOUTS if layout.version == version)


def find_layout(config: dict[str, Any], folder: Path) -> Layout:
    """The layout that config.json names. Raises UserError for an unknown model type or another value of a fixed key."""
    classes = config.get("architectures") or []
    fitting = [layout for layout in LAYOUTS if layout.model_type == config.get("model_type")]
    layout = next((layout for layout in fitting if layout.architecture in classes), next(iter(fitting), None))
    if layout is None:
        known = ", ".join(dict.fromkeys(f"{layout.model_type} ({layout.version})" for layout in LAYOUTS))
        raise UserError(f"{folder} holds a {config.get('model_type')} model, says its config.json; supported: {known}")
    for key, value in (layout.required | layout.stated).items():
        # A program that derives head_dim from the tensors or from num_heads may store null.
        if config.get(key, value) != value and not (key in layout.stated and config[key] is None):
            raise UserError(f"{folder / 'config.json'} has {key} {config[key]}; {layout.version} has {value}")
    return layout


def _rename(name: str, table: dict[str, str]) -> str:
    layer = re.search(r"(?<=blocks\.|layers\.)(0|[1-9]\d{0,5})(?=\.)", name)
    if not layer:
        return table[name]
    return table[f"{name[: layer.start()]}{{}}{name[layer.end() :]}"].format(layer[0])
