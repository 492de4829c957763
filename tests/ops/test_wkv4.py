"""Every realisation of the operator against one judge: the plain recurrence in float64 under autograd."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from levels import run_at
from torch import Tensor

from rwkv_pl.ops.build import LEVELS, BuildError, cpu_level
from rwkv_pl.ops.wkv4 import _load, use_kernel, wkv4
from rwkv_pl.ops.wkv4_reference import EMPTY

FAST = ["compiled", "scan"]
NAMES = ["output", "num / den", "max_exp + log den", "time_decay", "time_first", "key", "value", "state"]


@pytest.fixture(scope="module", autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def draw(B: int, T: int, C: int, keys: str = "ordinary", decays: str = "ordinary", seed: int = 0) -> list[Tensor]:
    """Arguments in float64 whose values float32 has too, so that both dtypes are given the same numbers."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    key = normal(B, T, C)
    if keys == "x10":
        key = 10 * key
    elif keys == "far apart":
        key = key + 1e4 * torch.sign(normal(B, T, C))
    elif keys == "near 1e4":
        key = key + 1e4
    elif keys == "equal":
        key = torch.full_like(key, 3.0)
    time_decay = {"ordinary": normal(C) - 1, "none": torch.full((C,), -100.0), "all": torch.full((C,), 100.0)}[decays]
    state = torch.stack((normal(B, C), normal(B, C).abs() + 0.5, normal(B, C)), dim=1)
    return [x.double() for x in (time_decay, normal(C), key, normal(B, T, C), state)]


def results(
    kernel: str | Callable[..., Any], arguments: list[Tensor], dtype: torch.dtype, *, with_state: bool = True
) -> list[Tensor]:
    """Output, what the state stands for, and every gradient of a loss that weighs output, num and den at random."""
    leaves = [x.to(dtype, copy=True).requires_grad_() for x in arguments]
    operator, name = (wkv4, kernel) if isinstance(kernel, str) else (kernel, "auto")
    with use_kernel(name):
        output, state = operator(*leaves) if with_state else operator(*leaves[:4])
    generator = torch.Generator().manual_seed(1)
    loss = (output * torch.randn(output.shape, generator=generator)).sum()
    # num alone means nothing without max_exp, and half an ulp of that is a large factor where it is far from 0.
    if arguments[2].abs().max() < 50:
        loss = loss + (state[:, :2] * torch.randn(state[:, :2].shape, generator=generator)).sum()
    loss.backward()
    gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]
    num, den, max_exp = state.unbind(1)
    return [x.detach().double() for x in (output, num / den, max_exp + den.log(), *gradients)]


def assert_same(got: list[Tensor], judge: list[Tensor], tolerance: float, scale: list[Tensor] | None = None) -> None:
    """Norm-wise: |got - judge| <= tolerance max(|judge|, |scale|), scale being where true gradients may vanish."""
    for name, x, expected, large in zip(NAMES, got, judge, scale or judge, strict=True):
        size = max(expected.norm().item(), large.norm().item())
        error = (x - expected).norm().item()
        assert error <= tolerance * size + 1e-30, f"{name}: error {error / (size + 1e-30):.1e} > {tolerance:.0e}"


@pytest.mark.parametrize("kernel", FAST)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    B=st.integers(1, 3),
    T=st.sampled_from([1, 2, 15, 16, 17, 33, 100]),
    C=st.sampled_from([1, 3, 16, 64, 65, 130]),
    keys=st.sampled_from(["ordinary", "x10", "far apart", "near 1e4", "equal"]),
    decays=st.sampled_from(["ordinary", "none", "all"]),
    with_state=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@example(B=1, T=300, C=65, keys="ordinary", decays="ordinary", with_state=True, dtype=torch.float32)
@example(B=2, T=100, C=3, keys="far apart", decays="ordinary", with_state=True, dtype=torch.float32)
def test_agrees_with_the_recurrence(kernel, B, T, C, keys, decays, with_state, dtype):
    arguments = draw(B, T, C, keys, decays)
    judge = results("recurrence", arguments, torch.float64, with_state=with_state)
    ordinary = results("recurrence", draw(B, T, C), torch.float64)
    # float32 rounds at 6e-8, and a gradient sums hundreds of terms; the scan keeps an exponent in one number, so it
    # also loses half an ulp of the largest: 5e-4 at 1e4.
    tolerance = 5e-6 if dtype == torch.float32 else 1e-12
    if kernel == "scan":
        tolerance *= max(1.0, arguments[2].abs().max().item() / 10)
    scale = [torch.maximum(a.norm(), b.norm()) for a, b in zip(judge, ordinary, strict=True)]
    assert_same(results(kernel, arguments, dtype, with_state=with_state), judge, tolerance, scale)


def ratios(operator: Callable[..., Any], *arguments: Tensor) -> tuple[Tensor, ...]:
    """The output, and what the state stands for."""
    output, state = operator(*arguments)
    num, den, max_exp = state.unbind(1)
    return output, num / den, max_exp + torch.log(den)


@pytest.mark.parametrize("kernel", [*FAST, "recurrence"])
def test_gradcheck(kernel):
    with use_kernel(kernel):
        arguments = [x.requires_grad_() for x in draw(2, 5, 3)]
        assert torch.autograd.gradcheck(partial(ratios, wkv4), arguments)


@pytest.mark.parametrize("kernel", [*FAST, "recurrence"])
def test_a_literal_example(kernel):
    # No decay to speak of, no bonus, equal keys: the output is the mean of the values so far.
    value = torch.tensor([2.0, 4.0, 9.0]).reshape(1, 3, 1)
    with use_kernel(kernel):
        output, state = wkv4(torch.tensor([-100.0]), torch.zeros(1), torch.full((1, 3, 1), 7.0), value)
    torch.testing.assert_close(output.flatten(), torch.tensor([2.0, 3.0, 5.0]))
    torch.testing.assert_close(state.flatten(), torch.tensor([15.0, 3.0, 7.0]))


@pytest.mark.parametrize("kernel", [*FAST, "recurrence"])
def test_gradient_of_max_exp(kernel):
    arguments = [x.requires_grad_() for x in draw(2, 20, 3)]
    with use_kernel(kernel):
        output, state = wkv4(*arguments)
        (grad,) = torch.autograd.grad(output.sum() + state[:, :2].sum(), arguments[4], retain_graph=True)
        num, den, _ = arguments[4].unbind(1)
        torch.testing.assert_close(grad[:, 2], num * grad[:, 0] + den * grad[:, 1])
        for gradient in torch.autograd.grad(state[:, 2].sum() + 0 * output.sum(), arguments):
            assert gradient.abs().max() == 0, "max_exp as a result carries a gradient"


@pytest.mark.parametrize("kernel", FAST)
@pytest.mark.parametrize("cuts", [[1], [7, 8], [16, 40]], ids=str)
def test_pieces_equal_the_whole(kernel, cuts):
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


def test_a_state_of_large_exponents_loses_nothing():
    """Half an ulp of max_exp is 5e-4 at 1e4; num and den take up what its rounding loses."""
    time_decay, time_first, key, value, state = (x.float() for x in draw(2, 50, 6, keys="near 1e4"))
    with use_kernel("compiled"):
        whole, _ = wkv4(time_decay, time_first, key, value, state)
        _, state = wkv4(time_decay, time_first, key[:, :30], value[:, :30], state)
        rest, _ = wkv4(time_decay, time_first, key[:, 30:], value[:, 30:], state)
    torch.testing.assert_close(rest, whole[:, 30:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1024, 8), (2, 700, 3), (1, 500, 70)], ids=str)
def test_chunks_of_time(shape):
    """More threads than blocks of channels: time is cut as well, in both directions."""
    arguments = draw(*shape)
    judge = results("recurrence", arguments, torch.float64)
    torch.set_num_threads(16)
    try:
        chunked = results("compiled", arguments, torch.float32)
        again = results("compiled", arguments, torch.float32)
    finally:
        torch.set_num_threads(2)
    assert_same(chunked, judge, 5e-6)
    assert all(torch.equal(x, y) for x, y in zip(chunked, again, strict=True)), "two runs differ"
    unchunked = results("compiled", arguments, torch.float32)
    assert not all(torch.equal(x, y) for x, y in zip(chunked, unchunked, strict=True)), "time was not cut"


@pytest.mark.parametrize("kernel", FAST)
@pytest.mark.parametrize("place", ["key", "value"])
def test_nan_spreads_as_in_the_recurrence(kernel, place):
    arguments = draw(1, 40, 3)
    arguments[["key", "value"].index(place) + 2][0, 20, 1] = torch.nan
    for got, judge in zip(
        results(kernel, arguments, torch.float32), results("recurrence", arguments, torch.float64), strict=True
    ):
        assert torch.equal(got.isnan(), judge.isnan())
    with use_kernel(kernel):
        max_exp = wkv4(*(x.float() for x in arguments))[1][0, 2]
    assert max_exp.isnan().tolist() == [False, place == "key", False]


@pytest.mark.parametrize("kernel", FAST)
def test_a_key_of_minus_infinity_is_no_step(kernel):
    arguments = draw(1, 40, 3)
    arguments[2][0, 20:] = -torch.inf
    judge = results("recurrence", arguments, torch.float64)
    assert not any(x.isnan().any() for x in judge)
    assert_same(results(kernel, arguments, torch.float32), judge, 5e-6)


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
    # A gradient that comes from a sum is one number with strides of 0.
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
def test_under_autocast(kernel):
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


def test_no_state_is_the_empty_state():
    time_decay, time_first, key, value, _ = draw(2, 10, 3)
    empty = torch.zeros(2, 3, 3, dtype=torch.float64)
    empty[:, 2] = EMPTY
    key = key - 200
    for with_state, without in zip(
        wkv4(time_decay, time_first, key, value, empty), wkv4(time_decay, time_first, key, value), strict=True
    ):
        assert torch.equal(with_state, without) and with_state.isfinite().all()


def test_the_arguments_are_not_written_to():
    arguments = draw(2, 20, 3)
    before = [x.clone() for x in arguments]
    results("compiled", arguments, torch.float64)
    wkv4(*arguments)
    assert all(torch.equal(x, y) for x, y in zip(arguments, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_opcheck(dtype):
    assert _load("cpu") == ""
    for transposed in (False, True):
        arguments = [x.to(dtype) for x in draw(2, 33, 5)]
        if transposed:
            arguments[2] = arguments[2].transpose(1, 2).contiguous().transpose(1, 2)
        leaves = [x.clone().requires_grad_() for x in arguments]
        torch.library.opcheck(torch.ops.rwkv_pl.wkv4_forward, (*leaves, 16))
        output, state, tiles = torch.ops.rwkv_pl.wkv4_forward(*arguments, 16)
        torch.library.opcheck(torch.ops.rwkv_pl.wkv4_backward, (*arguments[:4], tiles, output, state, 16))


def test_a_tile_too_long_is_refused():
    assert _load("cpu") == ""
    with pytest.raises(RuntimeError, match="wkv4: tile must be 1 to 32, not 33"):
        torch.ops.rwkv_pl.wkv4_forward(*(x.float() for x in draw(1, 4, 3)), 33)


def test_compiles_to_one_graph():
    arguments = [x.float().requires_grad_() for x in draw(2, 20, 5)]

    @torch.compile(fullgraph=True, backend="inductor")
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
def test_the_plain_ones_trace_without_a_break(kernel):
    arguments = [x.float() for x in draw(2, 20, 5)]
    with use_kernel(kernel):
        output, state = torch.compile(wkv4, fullgraph=True, backend="eager")(*arguments)
        expected, end = wkv4(*arguments)
    assert torch.equal(output, expected) and torch.equal(state, end)


def test_a_second_derivative_is_refused():
    arguments = [x.requires_grad_() for x in draw(1, 4, 2)]
    with use_kernel("compiled"):
        (grad,) = torch.autograd.grad(wkv4(*arguments)[0].sum(), arguments[2], create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            grad.sum().backward()


def change(name: str, value: object) -> dict[str, object]:
    arguments = dict(zip(["time_decay", "time_first", "key", "value", "state"], draw(2, 4, 3), strict=True))
    return arguments | {name: value}


@pytest.mark.parametrize(
    ("name", "value", "kind", "words"),
    [
        ("key", torch.zeros(4, 3), ValueError, r"key must be \(B, T, C\) .*not \(4, 3\)"),
        ("key", torch.zeros(2, 0, 3), ValueError, r"key must be .*not \(2, 0, 3\)"),
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


def test_use_kernel():
    from rwkv_pl.ops import wkv4 as module

    assert module._kernel == "auto"
    with use_kernel("scan"):
        assert module._kernel == "scan"
        with pytest.raises(ZeroDivisionError), use_kernel("recurrence"):
            raise ZeroDivisionError
        assert module._kernel == "scan"
        use_kernel("compiled")
        assert module._kernel == "compiled"
    assert module._kernel == "auto"
    with pytest.raises(ValueError, match="no kernel named 'fast'; choose one of auto, compiled"):
        use_kernel("fast")
    assert module._kernel == "auto"


def test_a_device_without_the_compiled_operator():
    arguments = [x.to("meta") for x in draw(1, 4, 3)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert wkv4(*arguments)[0].shape == (1, 4, 3)
    with use_kernel("compiled"), pytest.raises(RuntimeError, match="no compiled operator: none is built for meta"):
        wkv4(*arguments)


@pytest.mark.parametrize("level", LEVELS)
def test_every_level_of_this_cpu(level):
    code = (
        "import torch; torch.set_num_threads(2); from test_wkv4 import *\n"
        "for shape in [(1, 100, 130), (2, 33, 5)]:\n"
        "    for dtype, tolerance in [(torch.float32, 5e-6), (torch.float64, 1e-12)]:\n"
        "        arguments = draw(*shape)\n"
        "        assert_same(results('compiled', arguments, dtype), results('recurrence', arguments, torch.float64),"
        " tolerance)\n"
    )
    run_at(level, code)


def test_an_unknown_level_is_refused(monkeypatch):
    monkeypatch.setenv("RWKV_PL_CPU_LEVEL", "x86-64-v9")
    with pytest.raises(BuildError, match="RWKV_PL_CPU_LEVEL=x86-64-v9 is not known; choose one of x86-64-v4"):
        cpu_level()
