"""The loss and the reported metrics, against hand-made numbers and the gradient of the official L2Wrap."""

import math

import pytest
import torch
from torch.nn import functional as F

from rwkv_pl.inference.evaluate import bits_per_byte
from rwkv_pl.ops.cross_entropy import head_cross_entropy
from rwkv_pl.training.loss import IGNORE_INDEX, count_bytes, l2wrap, split_tokens


def test_split_tokens_shifts_once_and_clamps_only_padding_of_inputs():
    inputs, targets = split_tokens(torch.tensor([[5, 6, 7, IGNORE_INDEX, IGNORE_INDEX]]))
    assert inputs.tolist() == [[5, 6, 7, 0]]
    assert targets.tolist() == [[6, 7, IGNORE_INDEX, IGNORE_INDEX]]


def test_cross_entropy_is_per_target_and_zero_where_ignored():
    nats, largest = head_cross_entropy(torch.nn.Identity(), torch.zeros(1, 3, 4), torch.tensor([[0, 3, IGNORE_INDEX]]))
    torch.testing.assert_close(nats, torch.tensor([[math.log(4), math.log(4), 0.0]]))
    assert torch.equal(largest, torch.zeros(1, 3))


def test_l2wrap_gradient_is_the_official_one():
    """The official backward adds 1e-4 / (B T) of the largest logit, at its index, to the cross-entropy's gradient."""
    torch.manual_seed(0)
    B, T, V = 2, 5, 7
    logits = torch.randn(B, T, V, dtype=torch.float64, requires_grad=True)
    _, of_each = head_cross_entropy(torch.nn.Identity(), logits, torch.zeros(B, T, dtype=torch.int64))
    (gradient,) = torch.autograd.grad(l2wrap(of_each), logits)
    largest, place = logits.detach().max(-1, keepdim=True)
    official = torch.zeros_like(logits).scatter_(-1, place, largest * 1e-4 / (B * T))
    torch.testing.assert_close(gradient, official, rtol=1e-6, atol=0)


def test_l2wrap_is_correct_under_accumulation():
    largest = torch.randn(4, 6)
    torch.testing.assert_close((l2wrap(largest[:2]) + l2wrap(largest[2:])) / 2, l2wrap(largest))


def test_loss_is_computed_in_float32():
    logits = (8 * torch.randn(1, 64, 256)).bfloat16()
    targets = torch.randint(256, (1, 64))
    nats, largest = head_cross_entropy(torch.nn.Identity(), logits, targets)
    expected = F.cross_entropy(logits[0].double(), targets[0], reduction="none")[None]
    torch.testing.assert_close(nats.double(), expected, rtol=1e-5, atol=1e-5)
    assert nats.dtype == largest.dtype == torch.float32


def compute_loss_and_gradients(chunk_len, autocast):
    """The total loss for a head of 50 tokens, and the gradients; 21 positions, one of them ignored."""
    torch.manual_seed(0)
    head, hidden = torch.nn.Linear(8, 50, bias=False), torch.randn(3, 7, 8, requires_grad=True)
    targets = torch.randint(50, (3, 7))
    targets[1, 2] = IGNORE_INDEX
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        nats, largest = head_cross_entropy(head, hidden, targets, chunk_len)
        loss = nats.mean() + 1e4 * l2wrap(largest)  # as strong as the cross-entropy
    (2.0**10 * loss).backward()  # like a loss scaler
    return nats.detach(), hidden.grad, head.weight.grad


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("chunk_len", [1, 4, 20, 21, 1000])
def test_chunked_loss_equals_the_whole_loss(chunk_len, autocast):
    for whole, chunked in zip(
        compute_loss_and_gradients(None, autocast), compute_loss_and_gradients(chunk_len, autocast), strict=True
    ):
        # In bfloat16 the gradient of the head is rounded once for the whole loss, but once per chunk if it is chunked.
        error = (chunked - whole).norm() / whole.norm()
        assert error < (1e-2 if autocast else 1e-6)


def test_only_one_chunk_of_logits_exists_at_a_time():
    widest, kept = 0, set()

    def keep(tensor):
        if tensor.is_floating_point() and tensor.numel():
            kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    def head(hidden):
        nonlocal widest
        widest = max(widest, len(hidden))
        return hidden

    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            hidden = torch.randn(2, 8, 5, requires_grad=grad)
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                nats, _ = head_cross_entropy(head, hidden, torch.zeros(2, 8, dtype=torch.int64), 3)
            assert nats.shape == (2, 8)
            assert kept <= {hidden.untyped_storage().data_ptr()}
            kept.clear()
    assert widest == 3


def test_bits_per_byte_counts_the_bytes_of_characters():
    bytes_per_token = torch.tensor([1, 3])
    n_bytes = int(count_bytes(torch.tensor([[0, 1, 1, IGNORE_INDEX]]), bytes_per_token))
    assert n_bytes == 7
    assert bits_per_byte(7 * math.log(2), n_bytes) == pytest.approx(1)
    assert int(count_bytes(torch.tensor([[0, 1, IGNORE_INDEX]]), None)) == 2
    assert math.isnan(bits_per_byte(1.0, 0))
