"""Each half of a block with compiled operators matches its modules: values, states and gradients.

The reference is the plain half in float64. In float32 the sums over C, T and B lose some 1e-7 each. Errors in bfloat16
are hard to bound, so the fused half is compared with the plain half in bfloat16 and may err only slightly more.
"""

import copy

import pytest
import torch
from halves import Masked, relative_errors
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from rwkv_pl import RWKV4Config, use_kernel
from rwkv_pl.model.rwkv4 import Block, ChannelMix, TimeMix
from rwkv_pl.model.state import BlockState
from rwkv_pl.ops.backend import uses_compiled

HALVES = ("att", "ffn")
KINDS = {"att": TimeMix, "ffn": ChannelMix}
NORMS = {"att": "ln1", "ffn": "ln2"}


@pytest.fixture(scope="module", autouse=True)
def loaded(compiled_kernel):
    assert uses_compiled("elementwise", "cpu")


class ZeroHalf(nn.Module):
    """Replaces the half that is not tested."""

    def forward(self, x, last, *state):
        return torch.zeros_like(x), x[:, -1], *state


def make_block(half, C, dropout=0.0, dtype=torch.float32):
    """A block with only that half and random parameters; the matrices hold values that bfloat16 represents exactly."""
    block = Block(RWKV4Config(vocab_size=2, n_layer=2, n_embd=C, dropout=dropout), layer=1)
    setattr(block, {"att": "ffn", "ffn": "att"}[half], ZeroHalf())
    with torch.no_grad():
        for parameter in block.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
            if parameter.dim() == 2:
                parameter.copy_(parameter.bfloat16())
    return block.to(dtype)


def is_fused(block, half, x):
    return block.supports_fused(getattr(block, half), KINDS[half], getattr(block, NORMS[half]), x)


def make_state(half, B, C):
    shift, den = torch.randn(B, C), torch.rand(B, C) + 0.5
    wkv = torch.stack([torch.randn(B, C), den, torch.randn(B, C)], 1)
    return {"att": (shift, wkv), "ffn": (shift,)}[half]


def block_state(half, state):
    if not state:
        return None
    return BlockState(*state, None) if half == "att" else BlockState(None, None, *state)


def flatten_outputs(half, x, after):
    """x and the half's state; of a WKV state its ratio and magnitude, since num and den are relative to max_exp."""
    if half == "ffn":
        return [x, after.ffn_shift]
    num, den, max_exp = after.wkv.unbind(1)
    return [x, after.att_shift, num / den, den.log() + max_exp]


def run_half(block, half, x, state, gradients, again=False, autocast=False, seed=0):
    """Outputs, and the gradients of x, the state and all parameters."""
    block.recompute_from = 0 if again else 10**9
    leaves = [tensor.detach().requires_grad_() for tensor in (x, *state)]
    parameters = [p for name, p in block.named_parameters() if name.startswith((half, NORMS[half]))]
    torch.manual_seed(seed)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs = flatten_outputs(half, *block(leaves[0], block_state(half, leaves[1:])))
    given = [g.to(y.dtype) for g, y in zip(gradients, outputs, strict=False)]
    return outputs, torch.autograd.grad(outputs, [*leaves, *parameters], given)


@settings(max_examples=40, deadline=None)
@given(
    half=st.sampled_from(HALVES),
    B=st.integers(1, 3),
    T=st.sampled_from([1, 2, 31, 32, 63, 64, 65, 130]),
    C=st.sampled_from([3, 16, 33, 64]),
    dropout=st.sampled_from([0.0, 0.5]),
    has_state=st.booleans(),
    autocast=st.booleans(),
    again=st.booleans(),
    transposed=st.booleans(),
    size=st.sampled_from([0.1, 1.0, 1e4]),
    seed=st.integers(0, 999),
)
@example("att", 2, 130, 33, 0.5, True, True, True, True, 1.0, 0)
@example("ffn", 2, 130, 33, 0.5, True, True, True, True, 1.0, 0)
@example("att", 2, 130, 33, 0.0, True, False, False, False, 1.0, 1)
def test_fused_half_matches_the_plain_half(half, B, T, C, dropout, has_state, autocast, again, transposed, size, seed):
    torch.manual_seed(seed)
    block = make_block(half, C, dropout)
    x = size * torch.randn(T, B, C).transpose(0, 1) if transposed else size * torch.randn(B, T, C)
    x = x + size * torch.arange(C)  # so that the variance of a token is more than rounding errors
    state = make_state(half, B, C) if has_state else ()
    # The gradient of x is expanded, as from a sum.
    gradients = [torch.randn(C).bfloat16().float().expand(B, T, C), *torch.randn(3, B, C)]

    assert is_fused(block, half, x)
    got, got_gradients = run_half(block, half, x, state, gradients, again, autocast)
    with use_kernel("recurrence"):
        assert not is_fused(block, half, x)
        # In float64 the mask could be drawn differently than in the dtype of the half's result.
        torch.manual_seed(0)
        if half == "ffn":
            F.dropout(x, dropout)  # of the half before
        block.dropout = Masked(F.dropout(torch.ones(B, T, C, dtype=torch.bfloat16 if autocast else x.dtype), dropout))
        plain, plain_gradients = run_half(block, half, x, state, gradients, autocast=autocast)
        (x_, *state_), gradients_ = [[tensor.double() for tensor in some] for some in ((x, *state), gradients)]
        reference, reference_gradients = run_half(copy.deepcopy(block).double(), half, x_, state_, gradients_)
    assert [y.dtype for y in got] == [torch.float32] * len(got)
    for tensor, gradient in zip([x, *state], got_gradients, strict=False):
        assert tensor.shape == gradient.shape and tensor.dtype == gradient.dtype
    for found, plainly, exact in (got, plain, reference), (got_gradients, plain_gradients, reference_gradients):
        for error, plain_error in zip(relative_errors(found, exact), relative_errors(plainly, exact), strict=True):
            assert error <= (1.5 * plain_error + 2**-8 if autocast else 2e-5)  # 2^-8: a rounding to bfloat16


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("replaced", ["", "key", "receptance", "norm", "dropout"])
def test_hook_is_called_and_makes_only_its_half_plain(half, replaced):
    block, x, called = Block(RWKV4Config(2, 2, 8), layer=1), torch.randn(1, 3, 8), []
    name = {"": half, "norm": NORMS[half], "dropout": "dropout"}.get(replaced, f"{half}.{replaced}")
    block.get_submodule(name).register_forward_hook(lambda *_: called.append(name))
    other = {"att": "ffn", "ffn": "att"}[half]
    assert not is_fused(block, half, x) and is_fused(block, other, x) == (replaced != "dropout")
    block(x, None)
    assert called


@pytest.mark.parametrize("half", HALVES)
def test_replaced_layer_is_called(half):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    block, x = make_block(half, 8), torch.randn(1, 3, 8)
    before, _ = block(x, None)
    linear = Doubled(8, 8, bias=False)
    linear.weight = getattr(block, half).receptance.weight
    getattr(block, half).receptance = linear
    assert not is_fused(block, half, x)
    assert not torch.allclose(block(x, None)[0], before)


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_use_the_plain_form(half, dtype):
    block, x = make_block(half, 8, dtype=dtype), torch.randn(1, 3, 8, dtype=dtype)
    assert not is_fused(block, half, x)
    assert block(x, None)[0].dtype == dtype


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_backward_pass_ignores_a_surrounding_autocast(half, autocast):
    block, gradients = make_block(half, 8), []
    for enabled in (False, True):
        x = torch.linspace(-1, 1, 48).view(2, 3, 8).requires_grad_()
        loss = block(x, None)[0].square().sum()
        with torch.autocast("cpu", autocast, enabled=enabled):
            loss.backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("half", HALVES)
def test_torch_func_transforms_use_the_plain_form(half):
    block, x = make_block(half, 8), torch.linspace(-1, 1, 48).view(2, 3, 8).requires_grad_()
    parameters = dict(block.named_parameters())
    (expected,) = torch.autograd.grad(block(x, None)[0].square().sum(), x)
    got = torch.func.grad(lambda x: functional_call(block, parameters, (x, None))[0].square().sum())(x.detach())
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    each = torch.func.vmap(lambda x: block(x[None], None)[0].sum())(x.detach())
    torch.testing.assert_close(each.sum(), block(x, None)[0].sum(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("half", HALVES)
def test_results_are_bit_identical_for_any_number_of_threads(half):
    torch.manual_seed(0)
    block, x, gradients = (
        make_block(half, 70),
        torch.randn(2, 300, 70),
        [torch.randn(2, 300, 70), *torch.randn(3, 2, 70)],
    )
    threads, results, state = torch.get_num_threads(), [], make_state(half, 2, 70)
    for count in (1, 3):
        torch.set_num_threads(count)
        outputs, found = run_half(block, half, x, state, gradients)
        results.append([*outputs, *(g for g in found if g.dim() != 2)])  # products of torch may differ
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("half", HALVES)
def test_norm_beyond_float32_gives_nan(half):
    block = make_block(half, 4)
    for x in (torch.tensor([1e20, 2e20, 0, 0]), torch.tensor([float("inf"), 0, 0, 0])):
        y, after = block(x.expand(1, 2, 4), None)
        assert y.isnan().all() and (after.att_shift if half == "att" else after.ffn_shift).isnan().all()


@pytest.mark.parametrize("half", HALVES)
def test_state_of_another_batch_size_is_refused(half):
    with pytest.raises(RuntimeError):
        make_block(half, 8)(torch.randn(2, 3, 8), block_state(half, make_state(half, 1, 8)))


@pytest.mark.parametrize("half", HALVES)
def test_frozen_parameters_have_no_gradient(half):
    block, x = make_block(half, 8), torch.randn(2, 3, 8)
    for name, parameter in block.named_parameters():
        parameter.requires_grad_("time_mix_k" in name)
    block(x, None)[0].sum().backward()
    assert [name for name, p in block.named_parameters() if p.grad is not None] == [f"{half}.time_mix_k"]
