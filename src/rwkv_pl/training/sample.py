"""A look at what the model has learned: some text of its own."""

from itertools import islice

import torch
from torch import nn

from rwkv_pl.inference.generate import generate


def sample_tokens(model: nn.Module, prompt: list[int], n_tokens: int, seed: int) -> list[int]:
    """`n_tokens` tokens that the model writes after `prompt`, the same for the same weights and seed."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    tokens = generate(model, torch.tensor([prompt], device=device), generator=generator)
    written = [int(token) for token in islice(tokens, n_tokens)]
    model.train(was_training)
    return written
