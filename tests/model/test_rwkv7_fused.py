"""Each half of a block of RWKV-7 with compiled operators matches its modules, as in test_rwkv4_fused.py.

The reference is the plain half in float64. The bounds are those of RWKV-4, and twice as wide in float32: the sums over
a head go through a division by their norm as well.
"""

import copy

import pytest
import torch
from halves import Masked, relative_errors
from hypothesis import example, given, settings
from hypothesis import strategies as st
from systems import needs_backward_errors
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from versions import small_model

from rwkv_pl import RWKV7Config, use_kernel
from rwkv_pl.model.rwkv7 import Block, ChannelMix, TimeMix
from rwkv_pl.model.state import BlockState
from rwkv_pl.ops.backend import uses_compiled

# The half, and whether its block is the first, which has no v_first.
HALVES = ("att first", "att", "ffn")
KINDS = {"att": TimeMix, "ffn": ChannelMix}
NORMS = {"att": "ln1", "ffn": "ln2"}


@pytest.fixture(scope="module", autouse=True)
def loaded(compiled_kernel):
    assert uses_compiled("wkv7", "cpu")


class ZeroHalf(nn.Module):
    """Replaces the half that is not tested."""

    def forward(self, x, shift, *others):
        """others: in the time mixing the WKV state, and in all layers but the first v_first."""
        v_first = others[1] if others[1:] else torch.zeros_like(x)
        return torch.zeros_like(x), x[:, -1], *((others[0], v_first) if others else ())


def make_block(half, C=64, dropout=0.0, dtype=torch.float32):
    """A block with only that half and random parameters; the matrices hold values that bfloat16 represents exactly."""
    half, _, is_first = half.partition(" ")
    config = RWKV7Config(vocab_size=2, n_layer=2, n_embd=C, dropout=dropout)
    block = Block(config, layer=0 if is_first else 1)
    block.ln0 = nn.Identity()
    setattr(block, {"att": "ffn", "ffn": "att"}[half], ZeroHalf())
    if half == "ffn":
        block.att.head_size = 0
    with torch.no_grad():
        for parameter in block.parameters():
            parameter += 0.3 * torch.randn_like(parameter) / (C**0.5 if parameter.dim() == 2 else 1)
            if parameter.dim() == 2:
                parameter.copy_(parameter.bfloat16())
    return block.to(dtype)


def is_fused(block, half, x):
    half = half.split()[0]
    return block.supports_fused(getattr(block, half), KINDS[half], getattr(block, NORMS[half]), x)


def make_inputs(half, B, T, C, has_state):
    """The state of the half, and v_first in all layers but the first."""
    state = [torch.randn(B, C), torch.randn(B, C // 64, 64, 64)][: 2 if "att" in half else 1] if has_state else []
    return state + ([torch.randn(B, T, C).bfloat16().float()] if half == "att" else [])


def run_half(block, half, x, others, gradients, again=False, autocast=False):
    """Outputs, and the gradients of x, of the state, of v_first and of all parameters."""
    block.recompute_from = 0 if again else 10**9
    leaves = [tensor.detach().requires_grad_() for tensor in (x, *others)]
    parameters = [
        p for name, p in block.named_parameters() if name.startswith((half.split()[0], NORMS[half.split()[0]]))
    ]
    *state, v_first = leaves[1:] if half == "att" else [*leaves[1:], None]
    if state:
        state = BlockState(*state, None) if "att" in half else BlockState(None, None, *state)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, after, first = block(leaves[0], state or None, v_first.bfloat16() if autocast and half == "att" else v_first)
    outputs = [y, after.ffn_shift] if half == "ffn" else [y, after.att_shift, after.wkv]
    outputs += [first] if half == "att first" else []
    given = [g.to(y.dtype) for g, y in zip(gradients, outputs, strict=False)]
    return outputs, torch.autograd.grad(outputs, [*leaves, *parameters], given)


def make_gradients(half, B, T, C):
    # The gradient of x is expanded, as from a sum.
    gradients = [torch.randn(C).bfloat16().float().expand(B, T, C), torch.randn(B, C)]
    gradients += [torch.randn(B, C // 64, 64, 64)] if "att" in half else []
    return gradients + ([torch.randn(B, T, C).bfloat16().float()] if half == "att first" else [])


@settings(max_examples=12, deadline=None)
@given(
    half=st.sampled_from(HALVES),
    B=st.integers(1, 3),
    T=st.sampled_from([1, 2, 16, 65]),
    C=st.sampled_from([64, 128]),
    dropout=st.sampled_from([0.0, 0.5]),
    has_state=st.booleans(),
    autocast=st.booleans(),
    again=st.booleans(),
    transposed=st.booleans(),
    size=st.sampled_from([0.1, 1.0, 1e4]),
    seed=st.integers(0, 999),
)
@example("att", 2, 130, 64, 0.5, True, True, True, True, 1.0, 0)
@example("att first", 2, 65, 64, 0.5, True, False, True, True, 1.0, 0)
@example("ffn", 2, 65, 64, 0.5, True, True, True, True, 1.0, 0)
@example("att", 2, 65, 64, 0.0, True, False, False, False, 1.0, 1)
def test_fused_half_matches_the_plain_half(half, B, T, C, dropout, has_state, autocast, again, transposed, size, seed):
    torch.manual_seed(seed)
    block = make_block(half, C, dropout)
    x = size * torch.randn(T, B, C).transpose(0, 1) if transposed else size * torch.randn(B, T, C)
    others, gradients = make_inputs(half, B, T, C, has_state), make_gradients(half, B, T, C)

    assert is_fused(block, half, x)
    got, got_gradients = run_half(block, half, x, others, gradients, again, autocast)
    with use_kernel("scan"):
        assert not is_fused(block, half, x)
        # In float64 the mask could be drawn differently than in the dtype of the half's result.
        torch.manual_seed(0)
        if half == "ffn":
            F.dropout(x, dropout)  # of the half before
        block.dropout = Masked(F.dropout(torch.ones(B, T, C, dtype=torch.bfloat16 if autocast else x.dtype), dropout))
        plain, plain_gradients = run_half(block, half, x, others, gradients, autocast=autocast)
        (x_, *others_), gradients_ = [[tensor.double() for tensor in some] for some in ((x, *others), gradients)]
        reference, reference_gradients = run_half(copy.deepcopy(block).double(), half, x_, others_, gradients_)
    for tensor, gradient in zip([x, *others], got_gradients, strict=False):
        assert tensor.shape == gradient.shape and tensor.dtype == gradient.dtype
    for found, plainly, exact in (got, plain, reference), (got_gradients, plain_gradients, reference_gradients):
        for error, plain_error in zip(relative_errors(found, exact), relative_errors(plainly, exact), strict=True):
            # 2^-8: a rounding to bfloat16
            assert error <= (1.5 * plain_error + 2**-8 if autocast else 4e-5)


@pytest.mark.parametrize("replaced", ["", "key", "ln_x", "norm", "dropout"])
def test_hook_is_called_and_makes_only_its_half_plain(replaced):
    block, x, called = Block(RWKV7Config(2, 2, 64), layer=0), torch.randn(1, 3, 64), []
    name = {"": "att", "norm": "ln1", "dropout": "dropout"}.get(replaced, f"att.{replaced}")
    block.get_submodule(name).register_forward_hook(lambda *_: called.append(name))
    assert not is_fused(block, "att", x) and is_fused(block, "ffn", x) == (replaced != "dropout")
    block(x, None)
    assert called


def test_results_are_bit_identical_for_any_number_of_threads():
    torch.manual_seed(0)
    half, B, T, C = "att", 2, 300, 128
    block, x, gradients = make_block(half, C), torch.randn(B, T, C), make_gradients(half, B, T, C)
    threads, results, others = torch.get_num_threads(), [], make_inputs(half, B, T, C, True)
    for count in (1, 3):
        torch.set_num_threads(count)
        outputs, found = run_half(block, half, x, others, gradients)
        results.append([*outputs, *(g for g in found if g.dim() != 2)])  # products of torch may differ
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_tiny_key_has_the_gradient_of_the_plain_form():
    """torch.nn.functional.normalize divides by at least 1e-12."""
    block, x = make_block("att"), torch.randn(1, 5, 64)
    shift, wkv, v_first = make_inputs("att", 1, 5, 64, has_state=True)
    block.att.key.weight.data *= 1e-14
    found = {}
    for kernel in ("auto", "scan"):
        block.zero_grad()
        with use_kernel(kernel):
            block(x, BlockState(shift, wkv, None), v_first)[0].square().sum().backward()
        found[kernel] = {name: p.grad.clone() for name, p in block.named_parameters() if p.grad is not None}
    assert found["auto"]["att.key.weight"].norm() > 1e6
    for name, gradient in found["scan"].items():
        torch.testing.assert_close(found["auto"][name], gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()))


@pytest.mark.parametrize("name", ["x_k", "w0", "w1", "r_k", "key.weight"])
def test_frozen_parameters_have_no_gradient(name):
    block = make_block("att")
    for other, parameter in block.named_parameters():
        parameter.requires_grad_(other == f"att.{name}")
    block(torch.randn(2, 3, 64), None, torch.randn(2, 3, 64))[0].sum().backward()
    assert [other for other, p in block.named_parameters() if p.grad is not None] == [f"att.{name}"]


@needs_backward_errors
@pytest.mark.parametrize("half", HALVES)
def test_second_derivative_is_refused(half):
    block = make_block(half)
    x = torch.randn(1, 3, 64, requires_grad=True)
    y = block(x, None, *make_inputs(half, 1, 3, 64, False))[0]
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(gradient.square().sum(), x)


class RecordStretches(TorchDispatchMode):
    """Records how many steps are between two saved states, 0 if none is saved."""

    def __init__(self):
        super().__init__()
        self.stretches = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.rwkv_pl.wkv7_forward.default:
            self.stretches.append(args[-1])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_nothing_is_saved_without_gradients(context):
    model, tokens = small_model("rwkv7"), torch.zeros(1, 5, dtype=torch.int64)
    with RecordStretches() as recorded:
        with context():
            model(tokens)
        model.requires_grad_(False)(tokens)
        assert recorded.stretches == [0] * 2 * len(model.blocks)
        model.requires_grad_(True)(tokens)
    assert 0 not in recorded.stretches[-len(model.blocks) :]
