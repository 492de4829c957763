"""Small models of every version, for tests that hold for all of them."""

from typing import Any

import torch

from rwkv_pl.model import MODELS
from rwkv_pl.model.language_model import LanguageModel

VERSIONS = tuple(MODELS)
VOCAB, LAYERS = 50, 3
CHANNELS = {"rwkv4": 40, "rwkv7": 128}
FEWEST_CHANNELS = {"rwkv4": 16, "rwkv7": 64}
# After command.SMALL, the settings of a run of this version.
RUN_SETTINGS = {"rwkv4": (), "rwkv7": ("model=rwkv7", f"model.n_embd={FEWEST_CHANNELS['rwkv7']}")}


def small_model(version: str, seed: int = 0, **config: Any) -> LanguageModel:
    """A model with the official initialisation."""
    torch.manual_seed(seed)
    model_class, config_class = MODELS[version]
    return model_class(config_class(**{"vocab_size": VOCAB, "n_layer": LAYERS, "n_embd": CHANNELS[version]} | config))


def perturbed_model(version: str, seed: int = 0, **config: Any) -> LanguageModel:
    """At the official initialisation most gradients are zero, so a comparison would prove nothing."""
    model = small_model(version, seed, **config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).detach().norm() / theirs.detach().norm())
