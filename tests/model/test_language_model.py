"""The behaviour that all versions share."""

import re

import pytest
import torch
from versions import CHANNELS, FEWEST_CHANNELS, VERSIONS, VOCAB, perturbed_model, relative_error, small_model

from rwkv_pl import use_kernel
from rwkv_pl.model import language_model as module
from rwkv_pl.model.language_model import LanguageModel
from rwkv_pl.model.state import BlockState
from rwkv_pl.ops.linear import cast_linear_weights

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
    # Rounding in float32; the blocks amplify it. A lost state gives an error of the size of the logits.
    assert relative_error(torch.cat(parts, 1), whole) < 3e-5
    for block, expected in zip(state, last, strict=True):
        torch.testing.assert_close(block.att_shift, expected.att_shift, rtol=1e-4, atol=1e-4)
        assert block.wkv.shape == expected.wkv.shape and len(block.wkv) == 3


def test_head_of_hidden_equals_forward(version):
    model = perturbed_model(version).eval()
    tokens = torch.randint(VOCAB, (2, 9))
    hidden, _ = model.hidden(tokens)
    assert hidden.shape == (2, 9, CHANNELS[version])
    torch.testing.assert_close(model.head(hidden), model(tokens)[0])


def memory(state: BlockState) -> torch.Tensor:
    """A block's `wkv`; in RWKV-4 only the ratio of its first two rows has a meaning."""
    return state.wkv if state.wkv.dim() == 4 else state.wkv[:, 0] / state.wkv[:, 1]


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
            loss = hidden.square().mean() + sum(memory(block).square().mean() for block in state)
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
        with pytest.raises(ValueError, match=r"the state of a block has .* and needs .*: it is the"):
            model(tokens, (state[0], state[1]._replace(wkv=state[1].wkv[:, :1])))
        with pytest.raises(TypeError, match="the state must be one that the model returned, not int"):
            model(tokens, 3)


@pytest.mark.parametrize("kernel", ["auto", "scan"])
def test_state_of_another_version_is_refused(version, kernel):
    models = {name: small_model(name, vocab_size=11, n_layer=2, n_embd=128) for name in VERSIONS}
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    with use_kernel(kernel):
        for other in set(VERSIONS) - {version}:
            with pytest.raises(ValueError, match="it is the state of another model"):
                models[version](tokens, models[other](tokens)[1])


def test_tokens_are_read_only_to_explain_an_error(version, monkeypatch):
    def refuse(*_):
        raise AssertionError("a pass over the tokens in each step, which a GPU would wait for")

    model, tokens = small_model(version, vocab_size=11, n_layer=1), torch.zeros(2, 3, dtype=torch.int64)
    for name in ("aminmax", "min", "max", "tolist", "item"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    model(tokens)


def run_steps(model: LanguageModel, tokens: torch.Tensor, state=None):
    """Logits (B, T, V) of tokens (B, T), one step at a time, and the final state."""
    logits = []
    for token in tokens.unbind(1):
        now, state = model.step(token, state)
        logits.append(now)
    return torch.stack(logits, 1), state


@pytest.fixture
def count_compiled_calls(monkeypatch):
    """Count the calls of the compiled operator."""
    calls = []
    step = module.run_step
    monkeypatch.setattr(module, "run_step", lambda *arguments: calls.append(1) or step(*arguments))
    return calls


@pytest.mark.parametrize("kernel", ["auto", "scan"])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
def test_steps_pieces_and_parallel_form_agree(version, kernel, weights, count_compiled_calls):
    """Over 4,096 tokens, switching between both forms. Casting matrices to bfloat16 adds only the error of the cast."""
    model = perturbed_model(version, n_layer=2, n_embd=FEWEST_CHANNELS[version]).eval()
    cast_linear_weights(model, weights)
    tokens = torch.randint(VOCAB, (1, 4096 if kernel == "auto" else 300))
    with use_kernel(kernel), torch.no_grad():
        whole, last = model(tokens)
        logits, state = run_steps(model, tokens)
        middle, half = model(tokens[:, :200])
        rest, again = run_steps(model, tokens[:, 200:], half)
    assert len(count_compiled_calls) == (4096 + 3896 if kernel == "auto" else 0)
    # float32 rounds each operation to 6e-8; the decay of old errors in the state balances those added per token.
    assert relative_error(logits, whole) < 1e-5
    assert relative_error(torch.cat((middle, rest), 1), whole) < 1e-5
    for mine, expected in [*zip(state, last, strict=True), *zip(again, last, strict=True)]:
        assert mine._fields == expected._fields
        assert relative_error(mine.att_shift, expected.att_shift) < 1e-5
        assert relative_error(mine.ffn_shift, expected.ffn_shift) < 1e-5
        assert relative_error(memory(mine), memory(expected)) < 1e-5
    logits, _ = model(tokens[:, :5], state)
    assert relative_error(logits, model(tokens[:, :5], last)[0]) < 1e-5


@pytest.mark.usefixtures("compiled_kernel")
def test_steps_of_a_bfloat16_model_agree_with_the_parallel_form(version, count_compiled_calls):
    """The step computes in float32 between its weights; the parallel form rounds every tensor to bfloat16, 4e-3."""
    model = perturbed_model(version, n_layer=2).eval().bfloat16()
    tokens = torch.randint(VOCAB, (2, 20))
    with torch.no_grad():
        logits, _ = run_steps(model, tokens)
        whole, middle = model(tokens[:, :10])
        rest, _ = run_steps(model, tokens[:, 10:], middle)
    assert len(count_compiled_calls) == 30 and logits.dtype == torch.float32
    assert relative_error(logits[:, :10], whole.float()) < 3e-2
    assert relative_error(logits[:, 10:], rest) < 3e-2


@pytest.mark.usefixtures("compiled_kernel")
def test_step_with_another_batch_size_and_without_the_operator(version, count_compiled_calls):
    model = perturbed_model(version)
    model.eval()
    tokens, state = torch.randint(VOCAB, (5,)), model(torch.randint(VOCAB, (5, 4)))[1]
    before = [x.clone() for block in state for x in block]
    expected, _ = model(tokens[:, None], state)
    logits, _ = model.step(tokens, state)
    assert len(count_compiled_calls) == 1 and relative_error(logits, expected[:, 0]) < 1e-5
    assert all(torch.equal(x, y) for x, y in zip([x for block in state for x in block], before, strict=True))
    assert not logits.requires_grad and torch.is_grad_enabled()
    # In float64 the plain forms are used, and tokens are checked alike.
    logits, _ = model.double().step(tokens, state)
    assert (
        len(count_compiled_calls) == 1
        and relative_error(logits, expected[:, 0]) < 1e-5
        and logits.dtype == torch.float32
    )
    with pytest.raises(IndexError):
        model.step(torch.tensor([VOCAB]))
    with pytest.raises(IndexError):
        model.float().step(torch.tensor([VOCAB]))
    logits, state = model.step(tokens[:0])
    assert logits.shape == (0, VOCAB) and state[0].wkv.shape == (0, *before[1].shape[1:])


@pytest.mark.usefixtures("compiled_kernel")
def test_step_uses_the_current_parameters(version, count_compiled_calls):
    model, other, tokens = perturbed_model(version, 0).eval(), perturbed_model(version, 1).eval(), torch.arange(3)
    expected, _ = other.step(tokens)
    assert not torch.allclose(model.step(tokens)[0], expected)
    model.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(model.step(tokens)[0], expected)
    with torch.no_grad():
        model.blocks[1].ffn.key.weight.zero_()
        other.blocks[1].ffn.key = torch.nn.Linear(CHANNELS[version], 4 * CHANNELS[version], bias=False)
        other.blocks[1].ffn.key.weight.zero_()
    assert torch.equal(model.step(tokens)[0], other.step(tokens)[0])
    assert len(count_compiled_calls) == 5


@pytest.mark.usefixtures("compiled_kernel")
def test_step_applies_dropout_in_training(version, count_compiled_calls):
    model = perturbed_model(version, dropout=0.5)
    tokens = torch.arange(3)
    assert not torch.equal(model.step(tokens)[0], model.step(tokens)[0]) and not count_compiled_calls
    model.eval()
    assert torch.equal(model.step(tokens)[0], model.step(tokens)[0]) and count_compiled_calls
