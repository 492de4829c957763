"""The behaviour that all versions share."""

import re

import pytest
import torch
from versions import CHANNELS, VERSIONS, VOCAB, perturbed_model, small_model

from rwkv_pl import use_kernel

pytestmark = pytest.mark.parametrize("version", VERSIONS)


@pytest.mark.parametrize("kernel", ["auto", "scan", "recurrence"])
@pytest.mark.parametrize("pieces", [[1] * 21, [5, 1, 15], [20, 1]], ids=["token-by-token", "uneven", "all-but-one"])
def test_logits_of_a_text_in_pieces_are_the_same(version, kernel, pieces):
    model = perturbed_model(version).eval()
    tokens = torch.randint(VOCAB, (3, sum(pieces)))
    with use_kernel(kernel), torch.no_grad():
        whole, last = model(tokens)
        state, parts = None, []
        for piece in tokens.split(pieces, dim=1):
            logits, state = model(piece, state)
            parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)
    for block, expected in zip(state, last, strict=True):
        torch.testing.assert_close(block.att_shift, expected.att_shift, rtol=1e-4, atol=1e-4)
        assert block.wkv.shape == expected.wkv.shape and len(block.wkv) == 3


def test_head_of_hidden_equals_forward(version):
    model = perturbed_model(version).eval()
    tokens = torch.randint(VOCAB, (2, 9))
    hidden, _ = model.hidden(tokens)
    assert hidden.shape == (2, 9, CHANNELS[version])
    torch.testing.assert_close(model.head(hidden), model(tokens)[0])


def read_state(wkv: torch.Tensor) -> torch.Tensor:
    """A scalar function of a block's WKV state; in RWKV-4 only the ratio of its first two rows has a meaning."""
    return (wkv[:, 0] / wkv[:, 1]).sum() if wkv.dim() == 3 else wkv.square().mean()


@pytest.mark.parametrize(("dropout", "autocast"), [(0.0, False), (0.3, False), (0.3, True)])
def test_activation_checkpointing_gives_bit_identical_gradients(version, dropout, autocast):
    tokens = torch.randint(VOCAB, (2, 40))
    gradients, kept = {}, {}
    for again in (False, True):
        model = perturbed_model(version, dropout=dropout)
        model.activation_checkpointing = again
        storages = {}

        def keep(tensor, storages=storages):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        torch.manual_seed(1)
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
            _, state = model.hidden(tokens[:, :3])
            hidden, state = model.hidden(tokens, state)
            loss = hidden.square().mean() + sum(read_state(block.wkv) for block in state)
        loss.backward()
        gradients[again] = [parameter.grad for parameter in model.blocks.parameters()]
        kept[again] = sum(storages.values())
    assert all(torch.equal(*pair) for pair in zip(*gradients.values(), strict=True))
    assert all(gradient.norm() > 0 for gradient in gradients[True])
    assert kept[True] < kept[False] / 2


def test_small_vocabulary_does_not_increase_the_head_gain(version):
    weight = small_model(version, vocab_size=8, n_layer=1).head.weight
    torch.testing.assert_close(weight @ weight.T, 0.25 * torch.eye(8), rtol=0, atol=1e-4)


def test_dropout_acts_only_in_training(version):
    model = perturbed_model(version, dropout=0.5)
    tokens = torch.randint(VOCAB, (1, 8))
    assert not torch.equal(model(tokens)[0], model(tokens)[0])
    model.eval()
    assert torch.equal(model(tokens)[0], model(tokens)[0])


@pytest.mark.parametrize("kernel", ["auto", "scan"])
@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        (torch.tensor([1, 2, 3]), ValueError, r"tokens must be (B, T) with T at least 1, not (3,)"),
        (torch.zeros(2, 0, dtype=torch.int64), ValueError, r"tokens must be (B, T) with T at least 1, not (2, 0)"),
        (torch.rand(1, 3), TypeError, "tokens must be an int64 tensor, not torch.float32"),
        ([[1, 2]], TypeError, "tokens must be an int64 tensor, not list"),
        (torch.tensor([[1, 11]]), IndexError, "tokens must be from 0 to 10, got 11"),
        (torch.tensor([[-1, 2]]), IndexError, "tokens must be from 0 to 10, got -1"),
        (torch.zeros(1, 2, dtype=torch.int64, device="meta"), ValueError, "tokens are on meta and the model on cpu"),
    ],
)
def test_bad_tokens_are_named(version, kernel, tokens, error, message):
    model = small_model(version, vocab_size=11, n_layer=1)
    with use_kernel(kernel), pytest.raises(error, match=re.escape(message)):
        model(tokens)


@pytest.mark.parametrize("kernel", ["auto", "scan"])
def test_state_of_another_size_is_named(version, kernel):
    model, tokens = small_model(version, vocab_size=11, n_layer=2), torch.zeros(2, 3, dtype=torch.int64)
    with use_kernel(kernel):
        _, state = model(tokens)
        with pytest.raises(ValueError, match="2 layers and 2 rows; the model has 2 layers, and tokens 1 rows"):
            model(tokens[:1], state)
        with pytest.raises(ValueError, match="the state has 1 layers and 2 rows"):
            model(tokens, state[:1])
        with pytest.raises(ValueError, match=r"the state has \d+ channels and the model \d+: it is the state of an"):
            small_model(version, vocab_size=11, n_layer=2, n_embd=2 * CHANNELS[version])(tokens, state)
        with pytest.raises(TypeError, match="the state must be one that the model returned, not int"):
            model(tokens, 3)


def test_tokens_are_read_only_to_explain_an_error(version, monkeypatch):
    def refuse(*_):
        raise AssertionError("a pass over the tokens in each step, which a GPU would wait for")

    model, tokens = small_model(version, vocab_size=11, n_layer=1), torch.zeros(2, 3, dtype=torch.int64)
    for name in ("aminmax", "min", "max", "tolist", "item"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    model(tokens)
