"""The loss and the figures that are reported, by hand-made numbers and by the official L2Wrap's gradient."""

import math

import pytest
import torch
from torch.nn import functional as F

from rwkv_pl.training.loss import IGNORED, bits_per_byte, count_bytes, cross_entropy, l2wrap, split_tokens


def test_split_tokens_shifts_once_and_clamps_the_padding_of_inputs_alone():
    inputs, targets = split_tokens(torch.tensor([[5, 6, 7, IGNORED, IGNORED]]))
    assert inputs.tolist() == [[5, 6, 7, 0]]
    assert targets.tolist() == [[6, 7, IGNORED, IGNORED]]


def test_cross_entropy_is_per_target_and_zero_where_ignored():
    logits = torch.zeros(1, 3, 4)
    nats = cross_entropy(logits, torch.tensor([[0, 3, IGNORED]]))
    torch.testing.assert_close(nats, torch.tensor([[math.log(4), math.log(4), 0.0]]))


def test_l2wrap_has_the_official_gradient():
    """The official backward: 1e-4 / (B T) of the largest logit, at its place, beside the cross-entropy's gradient."""
    torch.manual_seed(0)
    B, T, V = 2, 5, 7
    logits = torch.randn(B, T, V, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(l2wrap(logits.double()), logits)
    largest, place = logits.detach().max(-1, keepdim=True)
    official = torch.zeros_like(logits).scatter_(-1, place, largest * 1e-4 / (B * T))
    torch.testing.assert_close(gradient, official, rtol=1e-6, atol=0)


def test_l2wrap_is_right_under_accumulation():
    logits = torch.randn(4, 6, 9)
    torch.testing.assert_close((l2wrap(logits[:2]) + l2wrap(logits[2:])) / 2, l2wrap(logits))


def test_the_loss_is_computed_in_float32():
    logits = (8 * torch.randn(1, 64, 256)).bfloat16()
    targets = torch.randint(256, (1, 64))
    expected = F.cross_entropy(logits[0].double(), targets[0], reduction="none")[None]
    torch.testing.assert_close(cross_entropy(logits, targets).double(), expected, rtol=1e-5, atol=1e-5)


def test_bits_per_byte_counts_the_bytes_of_characters():
    bytes_per_token = torch.tensor([1, 3])
    n_bytes = int(count_bytes(torch.tensor([[0, 1, 1, IGNORED]]), bytes_per_token))
    assert n_bytes == 7
    assert bits_per_byte(7 * math.log(2), n_bytes) == pytest.approx(1)
    assert int(count_bytes(torch.tensor([[0, 1, IGNORED]]), None)) == 2
    assert math.isnan(bits_per_byte(1.0, 0))
