"""A second derivative is correct or raises an error: every operator, every kernel, both matrix products.

The reference is the plain recurrence in float64. The critical call is `torch.autograd.grad` with inputs: it visits only
the nodes between the loss and those inputs, so it never reaches an error raised outside of them.
"""

import re
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from systems import needs_backward_errors
from torch import nn
from torch.autograd import gradgradcheck
from torch.func import functional_call
from torch.nn import functional as F

from rwkv_pl import RWKV4, RWKV4Config, use_kernel
from rwkv_pl.config import KERNELS
from rwkv_pl.model.rwkv4 import Block
from rwkv_pl.model.state import BlockState
from rwkv_pl.ops import linear as linear_module
from rwkv_pl.ops.backend import uses_compiled
from rwkv_pl.ops.cross_entropy import cross_entropy
from rwkv_pl.ops.linear import MIN_ROWS, linear
from rwkv_pl.ops.wkv4 import wkv4

pytestmark = needs_backward_errors

B, T, C = 2, MIN_ROWS // 2, 6  # just the rows from which oneDNN's product is used
REFUSED = re.compile("differentiable once|no second derivative")


@pytest.fixture(params=["torch's product", "oneDNN's product"])
def product(request, monkeypatch):
    """Select either product, whichever is the faster on this processor."""
    if request.param == "oneDNN's product" and not linear_module._has_onednn:
        pytest.skip("this torch has no oneDNN product")
    monkeypatch.setattr(linear_module, "_is_onednn_faster", request.param == "oneDNN's product")


class ZeroHalf(nn.Module):
    """Replaces the half of a block that is not tested."""

    def forward(self, x, last, *state):
        return torch.zeros_like(x), x[:, -1], *state


def make_half_block(name: str, norm: str, other: str, other_norm: str) -> tuple[Callable[..., Any], list[Any]]:
    """x + half(norm(x)) as a function of x, its state and its parameters, and the shapes of these."""
    block = Block(RWKV4Config(vocab_size=2, n_layer=2, n_embd=C), layer=1)
    setattr(block, other, ZeroHalf())
    setattr(block, other_norm, nn.Identity())  # its parameters would stay in float32
    own = {key: p for key, p in block.named_parameters() if key.startswith((name, norm))}
    memory = [(B, C), (B, 3, C)] if name == "att" else [(B, C)]

    def function(x, *others):
        before, parameters = others[: len(memory)], others[len(memory) :]
        state = BlockState(*before, None) if name == "att" else BlockState(None, None, *before)
        x, after = functional_call(block, dict(zip(own, parameters, strict=True)), (x, state))
        if name == "ffn":
            return x, after.ffn_shift
        num, den, max_exp = after.wkv.unbind(1)
        return x, after.att_shift, num / den, den.log() + max_exp

    return function, [TEXT, *memory, *(tuple(p.shape) for p in own.values())]


def wkv4_invariants(time_decay, time_first, key, value, state):
    """The output, and a state's ratio and magnitude: its rows are relative to max_exp, which has no gradient."""
    output, (num, den, max_exp) = (x := wkv4(time_decay, time_first, key, value, state))[0], x[1].unbind(1)
    return output, num / den, den.log() + max_exp


def cross_entropy_of(x):
    return cross_entropy(x.flatten(0, 1), TARGETS)


def cross_entropy_in_float64(x):
    """The operator's plain form computes in float32."""
    logits = x.flatten(0, 1)
    return F.cross_entropy(logits, TARGETS, reduction="none"), logits.max(-1).values


TEXT, TARGETS = (B, T, C), torch.arange(B * T) % C
OPERATORS = {
    "wkv4": (wkv4_invariants, [(C,), (C,), TEXT, TEXT, (B, 3, C)]),
    "linear": (lambda x, weight: (linear(x, weight),), [TEXT, (5, C)]),
    "time mixing": make_half_block("att", "ln1", "ffn", "ln2"),
    "channel mixing": make_half_block("ffn", "ln2", "att", "ln1"),
    "cross_entropy": (cross_entropy_of, [TEXT]),
}
REFERENCES = {name: operator for name, (operator, _) in OPERATORS.items()} | {"cross_entropy": cross_entropy_in_float64}


def make_leaves(name: str, dtype=torch.float64) -> list[torch.Tensor]:
    torch.manual_seed(0)
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in OPERATORS[name][1]]
    for tensor in tensors:
        if tensor.shape == (B, 3, C):
            tensor[:, 1].abs_()  # den is a sum of exponentials
    return [tensor.to(dtype).requires_grad_() for tensor in tensors]


def compute_loss(outputs, is_linear: bool) -> torch.Tensor:
    """is_linear: the gradient of the loss does not depend on the outputs, so operators receive it as a constant."""
    terms = (y.double() * torch.linspace(-1, 1, y.numel()).view(y.shape) for y in outputs)
    return sum(term.sum() if is_linear else term.square().sum() for term in terms)


def second_derivatives(outputs, leaves, is_linear, in_pairs):
    """The gradient with respect to leaf j of the squared gradient norm of leaf i; None if it raises.

    in_pairs: ask for each pair alone, or for all j at once, which is faster but reaches all errors.
    """
    loss = compute_loss(outputs, is_linear)
    found = {}
    for i, first in enumerate(leaves):
        (gradient,) = torch.autograd.grad(loss, first, create_graph=True)
        if not in_pairs:
            zeros = [torch.zeros_like(x) for x in leaves]
            penalty = gradient.square().sum()
            given = {"retain_graph": True, "materialize_grads": True}
            rows = torch.autograd.grad(penalty, leaves, **given) if gradient.requires_grad else zeros
            found |= {(i, j): row for j, row in enumerate(rows)}
            continue
        for j, second in enumerate(leaves):
            found[i, j] = torch.zeros_like(second)
            if gradient.requires_grad:
                try:
                    (found[i, j],) = torch.autograd.grad(
                        gradient.square().sum(), second, retain_graph=True, materialize_grads=True
                    )
                except RuntimeError as error:
                    assert REFUSED.search(str(error)), error
                    found[i, j] = None
    return found


@cache
def reference(name, is_linear):
    with use_kernel("recurrence"):
        leaves = make_leaves(name)
        return second_derivatives(REFERENCES[name](*leaves), leaves, is_linear, in_pairs=False)


def assert_close(got, expected, tolerance):
    # A value that is 0 in float64 is a rounding error in float32, as large as that of its summands.
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max() + 1))


@pytest.mark.parametrize("is_linear", [True, False], ids=["linear loss", "squared loss"])
@pytest.mark.parametrize("half", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["float32", "autocast"])
@pytest.mark.parametrize(
    "kernel", [k if k in ("compiled", "scan") else pytest.param(k, marks=pytest.mark.slow) for k in KERNELS]
)
@pytest.mark.parametrize("name", OPERATORS)
def test_second_derivative_of_each_pair_of_inputs(name, kernel, half, is_linear, product):
    with use_kernel(kernel):
        leaves = make_leaves(name, torch.float32)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            outputs = OPERATORS[name][0](*leaves)
        # Only compiled operators raise, and linear() in every kernel is a function with its own derivatives.
        got = second_derivatives(outputs, leaves, is_linear, kernel in ("auto", "compiled") or name == "linear")
    for pair, expected in reference(name, is_linear).items():
        if got[pair] is None:
            # The error message names use_kernel('scan').
            assert kernel in ("auto", "compiled") and name != "linear"
        else:
            assert_close(got[pair], expected, 0.1 if half else 1e-4)  # bfloat16 rounds each of several factors by 2^-9


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", OPERATORS)
def test_second_derivative_by_backward_with_create_graph(name, kernel, product):
    """The other way to get second derivatives: accumulate gradients in all leaves, then differentiate."""
    found = []
    for operator, dtype in ((REFERENCES[name], torch.float64), (OPERATORS[name][0], torch.float32)):
        leaves = make_leaves(name, dtype)
        with use_kernel("recurrence" if dtype == torch.float64 else kernel):
            compute_loss(operator(*leaves), False).backward(create_graph=True, inputs=leaves)
        penalty = sum(x.grad.square().sum() for x in leaves)
        for x in leaves:
            x.grad = None
        if dtype == torch.float32 and kernel in ("auto", "compiled") and name != "linear":
            with pytest.raises(RuntimeError, match=REFUSED):
                penalty.backward()
            return
        penalty.backward()
        found.append([x.grad for x in leaves])
    for expected, mine in zip(*found, strict=True):
        assert_close(mine, expected, 1e-4)


@pytest.mark.parametrize("kernel", ["scan", "recurrence"])
@pytest.mark.parametrize("name", [name for name in OPERATORS if name != "cross_entropy"])
def test_plain_forms_match_the_reference_in_float64(name, kernel):
    leaves = make_leaves(name)
    with use_kernel(kernel):
        assert gradgradcheck(OPERATORS[name][0], leaves, fast_mode=True)


def make_model(dtype) -> RWKV4:
    torch.manual_seed(0)
    model = RWKV4(RWKV4Config(vocab_size=11, n_layer=2, n_embd=8)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model.to(dtype)


def gradient_penalties(dtype, kernel, checkpointing=False, half=False):
    """For each parameter of the model, the derivatives of its squared gradient norm; None if that raises."""
    torch.manual_seed(1)
    tokens = torch.randint(11, (B, T + 1))
    model = make_model(dtype)
    model.activation_checkpointing = checkpointing
    parameters = list(model.parameters())
    found = []
    with use_kernel(kernel), torch.autocast("cpu", torch.bfloat16, enabled=half):
        logits, _ = model(tokens[:, :-1])
        loss = cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())[0].mean()
        for parameter in parameters:
            (gradient,) = torch.autograd.grad(loss, parameter, create_graph=True)
            try:
                penalty = gradient.square().sum()
                found.append(torch.autograd.grad(penalty, parameters, retain_graph=True, materialize_grads=True))
            except RuntimeError as error:
                assert REFUSED.search(str(error)), error
                found.append(None)
    return found


@cache
def penalties_in_float64():
    return gradient_penalties(torch.float64, "recurrence")


@pytest.mark.usefixtures("compiled_kernel")
@pytest.mark.parametrize("half", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_gradient_penalty_is_refused_for_every_parameter(checkpointing, half, product):
    assert set(gradient_penalties(torch.float32, "auto", checkpointing, half)) == {None}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_gradient_penalty_of_the_plain_model_is_correct(checkpointing, product):
    references = penalties_in_float64()
    for mine, expected in zip(gradient_penalties(torch.float32, "scan", checkpointing), references, strict=True):
        scale = max(float(x.norm()) for x in expected)
        for x, y in zip(mine, expected, strict=True):
            assert (x.double() - y).norm() <= 1e-4 * scale


@pytest.mark.usefixtures("compiled_kernel")
def test_refused_second_derivative_names_the_operator_and_keeps_infinities():
    """The first derivative is the same with and without create_graph, even for a gradient beyond float32."""
    assert uses_compiled("elementwise", "cpu") and uses_compiled("wkv4", "cpu")
    logits = torch.tensor([[1.0, 2.0]]).requires_grad_()
    loss = (cross_entropy(logits, torch.tensor([0]))[0] * 3e38 * 10).sum()
    plain = torch.autograd.grad(loss, logits, retain_graph=True)
    again = torch.autograd.grad(loss, logits, create_graph=True)
    assert plain[0].isinf().any()
    torch.testing.assert_close(again[0], plain[0], equal_nan=True)
    with pytest.raises(RuntimeError, match=r"_CrossEntropy.* use_kernel\('scan'\)"):
        torch.autograd.grad(again[0].sum(), logits)
