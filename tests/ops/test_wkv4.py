"""Every implementation of the operator against one reference: the plain recurrence in float64 under autograd."""

import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from systems import needs_backward_errors
from torch import Tensor

from rwkv_pl.ops.backend import current_kernel, load, load_all, use_kernel
from rwkv_pl.ops.build import BuildError, cpu_level
from rwkv_pl.ops.wkv4 import wkv4
from rwkv_pl.ops.wkv4_reference import EMPTY

pytestmark = pytest.mark.usefixtures("two_threads")

FAST = ["compiled", "scan"]
HALVES = [torch.float16, torch.bfloat16]
DTYPES = [torch.float32, torch.float64, *HALVES]
KEYS = ["ordinary", "x10", "far apart", "near 1e4", "near -1e4", "equal"]
NAMES = ["output", "num / den", "max_exp + log den", "time_decay", "time_first", "key", "value", "state"]


def draw(
    B: int, T: int, C: int, keys: str = "ordinary", decays: str = "ordinary", io: torch.dtype = torch.float32
) -> list[Tensor]:
    """Arguments in float64 that float32 (key and value: dtype `io`) holds exactly, so all kernels get equal inputs."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    key = normal(B, T, C)
    if keys == "x10":
        key = 10 * key
    elif keys == "far apart":
        key = key + 1e4 * torch.sign(normal(B, T, C))
    elif keys in ("near 1e4", "near -1e4"):
        key = key + float(keys.removeprefix("near "))
    elif keys == "equal":
        key = torch.full_like(key, 3.0)
    time_decay = {"ordinary": normal(C) - 1, "none": torch.full((C,), -100.0), "all": torch.full((C,), 100.0)}[decays]
    state = torch.stack((normal(B, C), normal(B, C).abs() + 0.5, normal(B, C)), dim=1)
    time_first, value = normal(C), normal(B, T, C)
    if io in HALVES:
        key, value = key.to(io), value.to(io)
    return [x.double() for x in (time_decay, time_first, key, value, state)]


def select_kernel(kernel: str, *arguments: Tensor) -> Any:
    with use_kernel(kernel):
        return wkv4(*arguments)


def results(
    kernel: str | Callable[..., Any], arguments: list[Tensor], dtype: torch.dtype, *, with_state: bool = True
) -> list[Tensor]:
    """Output, invariants of the state, and every gradient of a loss with random weights on output, num and den.

    dtype: that of key and value.
    """
    wide = torch.float32 if dtype in HALVES else dtype
    leaves = [x.to(wide, copy=True).requires_grad_() for x in arguments]
    given = [*leaves[:2], *(x.to(dtype) for x in leaves[2:4]), *(leaves[4:] if with_state else [])]
    operator = partial(select_kernel, kernel) if isinstance(kernel, str) else kernel
    output, state = operator(*given)
    generator = torch.Generator().manual_seed(1)
    # Values that half precisions hold exactly, because the gradient of a half output is rounded to a half.
    loss = (output * torch.randn(output.shape, generator=generator).bfloat16().half().float()).sum()
    # num alone means nothing without max_exp: if max_exp is far from 0, half an ulp of it is a large factor on num.
    if arguments[2].abs().max() < 50:
        loss = loss + (state[:, :2] * torch.randn(state[:, :2].shape, generator=generator)).sum()
    loss.backward()
    gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]
    num, den, max_exp = state.unbind(1)
    return [x.detach().double() for x in (output, num / den, max_exp + den.log(), *gradients)]


def assert_same(
    got: list[Tensor],
    reference: list[Tensor],
    tolerance: float,
    scale: list[Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Norm-wise: |got - reference| <= tolerance max(|reference|, |scale|); scale is for true gradients that can be 0.

    Results in a half dtype of key may err by another half unit in the last place: 2^-11 relative in float16, 2^-8 in
    bfloat16. Sums over time and the state are never in half precision, so they keep the tolerance.
    """
    for name, x, expected, large in zip(NAMES, got, reference, scale or reference, strict=True):
        allowed = tolerance
        if dtype in HALVES and name in ("output", "key", "value"):
            allowed += torch.finfo(dtype).eps / 2
        size = max(expected.norm().item(), large.norm().item())
        error = (x - expected).norm().item()
        assert error <= allowed * size + 1e-30, f"{name}: error {error / (size + 1e-30):.1e} > {allowed:.0e}"


CASES = {
    "B": st.integers(1, 3),
    "T": st.sampled_from([1, 2, 15, 16, 17, 33, 100]),
    "C": st.sampled_from([1, 3, 16, 64, 65, 130]),
    "keys": st.sampled_from(KEYS),
    "decays": st.sampled_from(["ordinary", "none", "all"]),
    "with_state": st.booleans(),
    "dtype": st.sampled_from(DTYPES),
}


@pytest.mark.parametrize("kernel", FAST)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(**CASES)
@example(B=1, T=300, C=65, keys="ordinary", decays="ordinary", with_state=True, dtype=torch.float32)
@example(B=2, T=100, C=3, keys="far apart", decays="ordinary", with_state=True, dtype=torch.float32)
@example(B=1, T=1, C=1, keys="ordinary", decays="all", with_state=True, dtype=torch.float16)
@example(B=2, T=100, C=3, keys="far apart", decays="ordinary", with_state=True, dtype=torch.float16)
@example(B=2, T=100, C=3, keys="near -1e4", decays="ordinary", with_state=False, dtype=torch.float16)
@example(B=2, T=100, C=3, keys="far apart", decays="ordinary", with_state=True, dtype=torch.bfloat16)
@example(B=2, T=100, C=3, keys="near 1e4", decays="ordinary", with_state=False, dtype=torch.bfloat16)
def test_operator_agrees_with_the_recurrence(kernel, B, T, C, keys, decays, with_state, dtype):
    arguments = draw(B, T, C, keys, decays, dtype)
    reference = results("recurrence", arguments, torch.float64, with_state=with_state)
    ordinary = results("recurrence", draw(B, T, C), torch.float64)
    # float32 rounds to 6e-8, and a gradient sums hundreds of terms. The scan stores an exponent in one number, so it
    # also loses half an ulp of the largest: 5e-4 at 1e4. So does the reference: 1e-12 in float64.
    far = arguments[2].abs().max().item()
    tolerance = 5e-6 if dtype != torch.float64 else 1e-12 if far < 100 else 1e-11
    if kernel == "scan":
        tolerance *= max(1.0, far / 10)
    # If a state outweighs all keys, the gradient of time_decay is a sum of T terms that cancel to 0. They grow with the
    # step, up to T, and each is rounded to 6e-8; the recurrence itself errs by 1.6e-5 in float32.
    if dtype != torch.float64 and (keys, with_state) == ("near -1e4", True):
        tolerance = max(tolerance, 3e-5, 6e-8 * T**2)
    scale = [torch.maximum(a.norm(), b.norm()) for a, b in zip(reference, ordinary, strict=True)]
    assert_same(results(kernel, arguments, dtype, with_state=with_state), reference, tolerance, scale, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", FAST)
@settings(max_examples=100, deadline=None, derandomize=True)
@given(**CASES)
def test_operator_agrees_with_the_recurrence_in_many_cases(kernel, **case):
    test_operator_agrees_with_the_recurrence.hypothesis.inner_test(kernel, **case)


def ratios(operator: Callable[..., Any], *arguments: Tensor) -> tuple[Tensor, ...]:
    """The output, and the ratio and magnitude of the state."""
    output, state = operator(*arguments)
    num, den, max_exp = state.unbind(1)
    return output, num / den, max_exp + torch.log(den)


@pytest.mark.parametrize("kernel", [*FAST, "recurrence"])
def test_gradcheck(kernel):
    with use_kernel(kernel):
        arguments = [x.requires_grad_() for x in draw(2, 5, 3)]
        assert torch.autograd.gradcheck(partial(ratios, wkv4), arguments)


@pytest.mark.parametrize("kernel", [*FAST, "recurrence"])
def test_output_without_decay_is_the_running_mean(kernel):
    # Negligible decay, no bonus, equal keys: the output is the mean of the values so far.
    value = torch.tensor([2.0, 4.0, 9.0]).reshape(1, 3, 1)
    with use_kernel(kernel):
        output, state = wkv4(torch.tensor([-100.0]), torch.zeros(1), torch.full((1, 3, 1), 7.0), value)
    torch.testing.assert_close(output.flatten(), torch.tensor([2.0, 3.0, 5.0]))
    torch.testing.assert_close(state.flatten(), torch.tensor([15.0, 3.0, 7.0]))


@pytest.mark.parametrize("kernel", [*FAST, "recurrence"])
def test_gradient_of_the_given_and_the_returned_max_exp(kernel):
    arguments = [x.requires_grad_() for x in draw(2, 20, 3)]
    with use_kernel(kernel):
        output, state = wkv4(*arguments)
        (grad,) = torch.autograd.grad(output.sum() + state[:, :2].sum(), arguments[4], retain_graph=True)
        num, den, _ = arguments[4].unbind(1)
        torch.testing.assert_close(grad[:, 2], num * grad[:, 0] + den * grad[:, 1])
        for gradient in torch.autograd.grad(state[:, 2].sum() + 0 * output.sum(), arguments):
            assert gradient.abs().max() == 0, "the returned max_exp has a gradient"


@pytest.mark.parametrize("kernel", FAST)
@pytest.mark.parametrize("cuts", [[1], [7, 8], [16, 40]], ids=str)
def test_text_in_pieces_gives_the_same_results(kernel, cuts):
    time_decay, time_first, key, value, state = (x.float() for x in draw(2, 50, 6))
    with use_kernel(kernel):
        whole, end = wkv4(time_decay, time_first, key, value, state)
        outputs = []
        for k, v in zip(key.tensor_split(cuts, dim=1), value.tensor_split(cuts, dim=1), strict=True):
            output, state = wkv4(time_decay, time_first, k, v, state)
            outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs, dim=1), whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state[:, 0] / state[:, 1], end[:, 0] / end[:, 1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state[:, 2] + state[:, 1].log(), end[:, 2] + end[:, 1].log(), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("compiled_kernel")
def test_state_with_large_exponents_loses_no_precision():
    """Half an ulp of max_exp is 5e-4 at 1e4; num and den absorb that rounding error."""
    time_decay, time_first, key, value, state = (x.float() for x in draw(2, 50, 6, keys="near 1e4"))
    with use_kernel("compiled"):
        whole, _ = wkv4(time_decay, time_first, key, value, state)
        _, state = wkv4(time_decay, time_first, key[:, :30], value[:, :30], state)
        rest, _ = wkv4(time_decay, time_first, key[:, 30:], value[:, 30:], state)
    torch.testing.assert_close(rest, whole[:, 30:], rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("compiled_kernel")
@pytest.mark.parametrize("shape", [(1, 1024, 8), (2, 700, 3), (1, 500, 70)], ids=str)
def test_time_is_split_if_there_are_more_threads_than_channel_blocks(shape):
    """With more threads than blocks of channels, time is split as well, in both directions."""
    arguments = draw(*shape)
    reference = results("recurrence", arguments, torch.float64)
    torch.set_num_threads(16)
    try:
        chunked = results("compiled", arguments, torch.float32)
        again = results("compiled", arguments, torch.float32)
    finally:
        torch.set_num_threads(2)
    assert_same(chunked, reference, 5e-6)
    assert all(torch.equal(x, y) for x, y in zip(chunked, again, strict=True)), "two runs differ"
    unchunked = results("compiled", arguments, torch.float32)
    assert not all(torch.equal(x, y) for x, y in zip(chunked, unchunked, strict=True)), "time was not split"


# In draw(1, 40, 3): argument, index, value.
NOT_NUMBERS = {
    "nan time_first": (1, 1, torch.nan),
    "nan key": (2, (0, 20, 1), torch.nan),
    "nan value": (3, (0, 20, 1), torch.nan),
    "nan num": (4, (0, 0, 1), torch.nan),
    "nan den": (4, (0, 1, 1), torch.nan),
    "nan max_exp": (4, (0, 2, 1), torch.nan),
    "-inf key": (2, (0, 20, 1), -torch.inf),
    "-inf keys at first": (2, (0, slice(0, 5)), -torch.inf),
    "-inf keys at last": (2, (0, slice(20, 40)), -torch.inf),
}


def make_nonfinite(which: str) -> list[Tensor]:
    arguments = draw(1, 40, 3)
    argument, where, number = NOT_NUMBERS[which]
    arguments[argument][where] = number
    return arguments


def assert_nan_matches_reference(kernel: str | Callable[..., Any], which: str) -> None:
    """Elsewhere the numbers match the reference too; a step whose key is -inf has no effect."""
    arguments = make_nonfinite(which)
    reference, got = results("recurrence", arguments, torch.float64), results(kernel, arguments, torch.float32)
    for name, x, expected in zip(NAMES, got, reference, strict=True):
        assert torch.equal(x.isnan(), expected.isnan()), name
    assert any(x.isnan().any() for x in reference) == which.startswith("nan")
    # After 20 steps of pure decay max_exp is far from 0, and num contains half an ulp of it.
    assert_same([x.nan_to_num() for x in got], [x.nan_to_num() for x in reference], 1e-5)


def assert_nan_gradient_spreads_as_in_reference(operator: Callable[..., Any]) -> None:
    grad = torch.ones(1, 40, 3)
    grad[0, 20, 1] = torch.nan
    spread = []
    for each in (operator, partial(select_kernel, "recurrence")):
        leaves = [x.float().requires_grad_() for x in draw(1, 40, 3)]
        gradients = torch.autograd.grad(each(*leaves)[0], leaves, grad)
        spread.append(torch.cat([x.isnan().flatten() for x in gradients]))
    assert spread[1].any() and torch.equal(*spread)


def assert_plus_infinity_has_its_limit(operator: Callable[..., Any]) -> None:
    """From a key of +inf on, the output is that step's value or NaN, as in the reference; all else is unchanged."""
    arguments = draw(1, 40, 3)
    plain, _ = wkv4(*arguments)
    arguments[2][0, 20, 1] = torch.inf
    output, _ = operator(*arguments)
    torch.testing.assert_close(output[:, :20], plain[:, :20])
    torch.testing.assert_close(output[..., [0, 2]], plain[..., [0, 2]])
    after = output[0, 20:, 1]
    assert (after.isnan() | (after == arguments[3][0, 20, 1])).all()


@pytest.mark.parametrize("kernel", FAST)
@pytest.mark.parametrize("which", NOT_NUMBERS)
def test_nan_matches_reference(kernel, which):
    if (kernel, which) == ("scan", "nan max_exp"):
        pytest.skip("the clamp of the scan has no gradient for it")
    assert_nan_matches_reference(kernel, which)
    if which in ("nan key", "nan value"):
        max_exp = select_kernel(kernel, *(x.float() for x in make_nonfinite(which)))[1][0, 2]
        assert max_exp.isnan().tolist() == [False, which == "nan key", False]


@pytest.mark.parametrize("kernel", FAST)
def test_nan_decay_stays_in_its_channel(kernel):
    arguments = draw(1, 40, 3)
    arguments[0][1] = torch.nan
    reference, got = results("recurrence", arguments, torch.float64), results(kernel, arguments, torch.float32)
    # The first step does not use the decay, and only the reference has a finite gradient of time_decay.
    for x, expected in zip(got, reference, strict=True):
        assert not (expected.isnan() & ~x.isnan()).any()
    assert not got[0][..., [0, 2]].isnan().any() and got[0][0, 1:, 1].isnan().all()


@pytest.mark.parametrize("kernel", FAST)
def test_nan_gradient_spreads_as_in_reference(kernel):
    assert_nan_gradient_spreads_as_in_reference(partial(select_kernel, kernel))


@pytest.mark.parametrize("kernel", FAST)
def test_plus_infinity_key_has_its_limit(kernel):
    assert_plus_infinity_has_its_limit(partial(select_kernel, kernel))


@pytest.mark.parametrize("kernel", FAST)
def test_strided_inputs(kernel):
    time_decay, time_first, key, value, state = draw(3, 20, 4)
    strided = [
        time_decay.repeat_interleave(2)[::2],
        time_first.flip(0).flip(0),
        key.permute(2, 1, 0).contiguous().permute(2, 1, 0),
        value.transpose(1, 2).contiguous().transpose(1, 2),
        state.transpose(0, 1).contiguous().transpose(0, 1),
    ]
    dense = results(kernel, [time_decay, time_first, key, value, state], torch.float64)
    assert_same(results(kernel, strided, torch.float64), dense, 1e-12)
    # The gradient of a sum is one number with strides of 0.
    leaves = [x.detach().requires_grad_() for x in strided]
    with use_kernel(kernel):
        wkv4(*leaves)[0].sum().backward()
    assert all(x.grad is not None and x.grad.shape == x.shape for x in leaves)


@pytest.mark.parametrize("kernel", FAST)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves_are_computed_in_float32(kernel, dtype):
    time_decay, time_first, key, value, _ = (x.float() for x in draw(2, 30, 5))
    key, value = key.to(dtype).requires_grad_(), value.to(dtype).requires_grad_()
    with use_kernel(kernel):
        output, state = wkv4(time_decay, time_first, key, value)
        expected, _ = wkv4(time_decay, time_first, key.float(), value.float())
    assert output.dtype == dtype and state.dtype == torch.float32
    assert torch.equal(output, expected.to(dtype))
    output.float().sum().backward()
    assert key.grad is not None and key.grad.dtype == dtype


@pytest.mark.parametrize("kernel", FAST)
def test_wkv4_under_autocast(kernel):
    arguments = [x.float().requires_grad_() for x in draw(2, 30, 5)]
    with use_kernel(kernel):
        expected, _ = wkv4(*arguments)
        with torch.autocast("cpu", torch.bfloat16):
            output, _ = wkv4(*arguments)
    assert torch.equal(output, expected)


@pytest.mark.parametrize("kernel", [*FAST, "recurrence"])
def test_an_empty_batch(kernel):
    leaves = [x.requires_grad_() for x in draw(0, 4, 3)]
    with use_kernel(kernel):
        output, state = wkv4(*leaves)
    assert output.shape == (0, 4, 3) and state.shape == (0, 3, 3)
    (output.sum() + state.sum()).backward()
    assert leaves[0].grad is not None and leaves[0].grad.abs().sum() == 0


@pytest.mark.usefixtures("compiled_kernel")
def test_missing_state_equals_the_empty_state():
    time_decay, time_first, key, value, _ = draw(2, 10, 3)
    empty = torch.zeros(2, 3, 3, dtype=torch.float64)
    empty[:, 2] = EMPTY
    key = key - 200
    for with_state, without in zip(
        wkv4(time_decay, time_first, key, value, empty), wkv4(time_decay, time_first, key, value), strict=True
    ):
        assert torch.equal(with_state, without) and with_state.isfinite().all()


@pytest.mark.usefixtures("compiled_kernel")
def test_wkv4_does_not_modify_its_arguments():
    arguments = draw(2, 20, 3)
    before = [x.clone() for x in arguments]
    results("compiled", arguments, torch.float64)
    wkv4(*arguments)
    assert all(torch.equal(x, y) for x, y in zip(arguments, before, strict=True))


@pytest.mark.usefixtures("compiled_kernel")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_opcheck(dtype):
    assert load("wkv4", "cpu") == ""
    for transposed in (False, True):
        arguments = [x.to(dtype) for x in draw(2, 33, 5)]
        if transposed:
            arguments[2] = arguments[2].transpose(1, 2).contiguous().transpose(1, 2)
        leaves = [x.clone().requires_grad_() for x in arguments]
        torch.library.opcheck(torch.ops.rwkv_pl.wkv4_forward, (*leaves, 16))
        output, state, tiles = torch.ops.rwkv_pl.wkv4_forward(*arguments, 16)
        torch.library.opcheck(torch.ops.rwkv_pl.wkv4_backward, (*arguments[:4], tiles, output, state, 16))


@pytest.mark.usefixtures("compiled_kernel")
def test_compiled_operator_refuses_what_it_cannot_compute():
    assert load("wkv4", "cpu") == ""
    *inputs, state = (x.float() for x in draw(1, 4, 3))
    forward, backward = torch.ops.rwkv_pl.wkv4_forward, torch.ops.rwkv_pl.wkv4_backward
    with pytest.raises(RuntimeError, match="wkv4: tile must be 1 to 32, not 33"):
        forward(*inputs, state, 33)
    output, new_state, tiles = forward(*inputs, state, 8)
    for wrong in (state[:, :1], state[..., :1], torch.zeros(1, 2, 8, 8), state.double()):
        with pytest.raises(RuntimeError, match="wkv4: state has not the shape or the dtype"):
            forward(*inputs, wrong, 8)
        with pytest.raises(RuntimeError, match="wkv4: grad_new_state has not the shape or the dtype"):
            backward(*inputs, tiles, output, wrong, 8)
    with pytest.raises(RuntimeError, match="wkv4: tiles has not the shape or the dtype"):
        backward(*inputs, tiles[:, :1], output, new_state, 8)


@pytest.mark.usefixtures("compiled_kernel")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_to_one_graph(backend):
    arguments = [x.float().requires_grad_() for x in draw(2, 20, 5)]

    @torch.compile(fullgraph=True, backend=backend)
    def compiled(*arguments: Tensor) -> Tensor:
        output, state = wkv4(*arguments)
        return output.sum() + state[:, 0].sum()

    with use_kernel("compiled"):
        output, state = wkv4(*arguments)
        expected = torch.autograd.grad(output.sum() + state[:, 0].sum(), arguments)
        got = torch.autograd.grad(compiled(*arguments), arguments)
    for name, x, y in zip(NAMES[3:], got, expected, strict=True):
        torch.testing.assert_close(x, y, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("kernel", ["scan", "recurrence"])
def test_plain_kernels_compile_without_graph_breaks(kernel):
    arguments = [x.float() for x in draw(2, 20, 5)]
    with use_kernel(kernel):
        output, state = torch.compile(wkv4, fullgraph=True, backend="eager")(*arguments)
        expected, end = wkv4(*arguments)
    assert torch.equal(output, expected) and torch.equal(state, end)


@needs_backward_errors
@pytest.mark.usefixtures("compiled_kernel")
def test_second_derivative_needs_the_scan():
    arguments = [x.requires_grad_() for x in draw(1, 3, 2)]
    words = r"wkv4: the compiled operator has no second derivative; use_kernel\('scan'\) has one"
    with pytest.raises(RuntimeError, match=words):
        torch.autograd.gradgradcheck(partial(select_kernel, "compiled"), arguments)
    assert torch.autograd.gradgradcheck(partial(ratios, partial(select_kernel, "scan")), arguments)


def change(name: str, value: object) -> dict[str, object]:
    arguments = dict(zip(["time_decay", "time_first", "key", "value", "state"], draw(2, 4, 3), strict=True))
    return arguments | {name: value}


@pytest.mark.parametrize(
    ("name", "value", "kind", "words"),
    [
        ("key", torch.zeros(4, 3), ValueError, r"key must be \(B, T, C\) .*not \(4, 3\)"),
        ("key", torch.zeros(2, 0, 3), ValueError, r"key must be .*not \(2, 0, 3\)"),
        ("key", None, TypeError, r"key must be .*not NoneType"),
        ("key", torch.zeros(2, 4, 3).to(torch.float8_e5m2), TypeError, r"key must be .*not torch.float8"),
        ("key", torch.zeros(2, 4, 3, dtype=torch.int64), TypeError, r"key must be .*not torch.int64"),
        ("value", torch.zeros(2, 5, 3), ValueError, r"value must be \(2, 4, 3\) .*not \(2, 5, 3\)"),
        ("time_decay", torch.zeros(4), ValueError, r"time_decay must be \(3,\) .*not \(4,\)"),
        ("time_first", 1.0, TypeError, r"time_first must be .*not float"),
        ("state", torch.zeros(2, 3), ValueError, r"state must be \(2, 3, 3\) .*not \(2, 3\)"),
        ("value", torch.zeros(2, 4, 3, device="meta"), ValueError, r"value is on meta and key on cpu"),
    ],
)
def test_errors_name_the_argument(name, value, kind, words):
    with pytest.raises(kind, match=words) as caught:
        wkv4(**change(name, value))
    assert "\n" not in str(caught.value)


def test_use_kernel_is_scoped_and_validated():
    assert current_kernel() == "auto"
    with use_kernel("scan"):
        assert current_kernel() == "scan"
        with pytest.raises(ZeroDivisionError), use_kernel("recurrence"):
            raise ZeroDivisionError
        assert current_kernel() == "scan"
        use_kernel("compiled")
        assert current_kernel() == "compiled"
    assert current_kernel() == "auto"
    with pytest.raises(ValueError, match="no kernel named 'fast'; choose one of auto, compiled"):
        use_kernel("fast")
    assert current_kernel() == "auto"


def test_device_without_the_compiled_operator_uses_the_scan():
    arguments = [x.to("meta") for x in draw(1, 4, 3)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert wkv4(*arguments)[0].shape == (1, 4, 3)
    with use_kernel("compiled"), pytest.raises(RuntimeError, match="no compiled operator: not supported on meta"):
        wkv4(*arguments)


@pytest.mark.usefixtures("compiled_kernel")
@pytest.mark.parametrize("shape", [(1, 0, 4), (1, 4, 0)])
def test_compiled_operators_refuse_no_steps_and_no_channels(shape):
    assert load_all("cpu") == ""
    x, channels = torch.zeros(shape), torch.zeros(shape[2])
    with pytest.raises(RuntimeError, match=f"key has {shape[1]} steps and {shape[2]} channels"):
        torch.ops.rwkv_pl.wkv4_forward(channels, channels, x, x, None, 32)
    with pytest.raises(RuntimeError, match=f"x has {shape[1]} steps, {shape[2]} channels"):
        torch.ops.rwkv_pl.norm_token_shift(x, channels, channels, [channels] * 3, None, 1e-5, False)


def test_operators_can_be_loaded_before_their_modules():
    code = "from rwkv_pl.ops.backend import load_all; load_all('cpu'); import rwkv_pl.ops.wkv4, rwkv_pl.ops.step"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_cpu_level_is_an_error(monkeypatch):
    monkeypatch.setenv("RWKV_PL_CPU_LEVEL", "x86-64-v9")
    with pytest.raises(BuildError, match="RWKV_PL_CPU_LEVEL=x86-64-v9 is unknown; use one of x86-64-v4"):
        cpu_level()
