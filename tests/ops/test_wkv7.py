"""Every implementation of WKV-7 against one reference: the plain recurrence in float64 under autograd."""

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from rwkv_pl.ops.backend import use_kernel
from rwkv_pl.ops.wkv7 import wkv7

FAST = ["scan"]
HALVES = [torch.float16, torch.bfloat16]
NAMES = ["receptance", "decay", "key", "value", "a", "b", "state"]


@pytest.fixture(scope="module", autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def draw(
    B: int, T: int, H: int, N: int = 64, decays: str = "ordinary", size: float = 1.0, io: torch.dtype = torch.float32
) -> list[Tensor]:
    """Arguments in float64 that float32 (all but decay and state: dtype `io`) holds exactly.

    a is minus a unit vector and b the same times a gate from 0 to 1, as in the model: then the state stays bounded.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    r, k, v, kk, gate = (normal(B, T, H, N) for _ in range(5))
    kk = F.normalize(kk, dim=-1)
    low, high = {"ordinary": (-6, 2), "none": (-200, -100), "all": (100, 200), "both": (-100, 100)}[decays]
    decay = low + (high - low) * torch.rand(B, T, H, N, generator=generator)
    inputs = [r.to(io), decay, (size * k).to(io), (size * v).to(io), (-kk).to(io), (kk * gate.sigmoid()).to(io)]
    return [x.double() for x in (*inputs, size * normal(B, H, N, N))]


def results(kernel: Any, arguments: list[Tensor], dtype: torch.dtype, *, with_state: bool = True) -> dict[str, Tensor]:
    """Output, state and the gradient of every argument, of a loss with random weights on output and state.

    dtype: of all arguments but decay and state.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = [x.to(wide, copy=True).requires_grad_() for x in arguments]
    inputs = [x if name == "decay" else x.to(dtype) for name, x in zip(NAMES, leaves[:6], strict=False)]
    operator = partial(select_kernel, kernel) if isinstance(kernel, str) else kernel
    output, state = operator(*inputs, *(leaves[6:] if with_state else []))
    generator = torch.Generator().manual_seed(1)
    # Values that half precisions hold exactly, because the gradient of a half output is rounded to a half.
    weights = torch.randn(output.shape, generator=generator).bfloat16().half().float()
    ((output * weights).sum() + (state * torch.randn(state.shape, generator=generator)).sum()).backward()
    gradients = {name: torch.zeros_like(x) if x.grad is None else x.grad for name, x in zip(NAMES, leaves, strict=True)}
    found = {"output": output, "new state": state, **{f"grad_{name}": x for name, x in gradients.items()}}
    return {name: x.detach().double() for name, x in found.items()}


def select_kernel(kernel: str, *arguments: Tensor) -> Any:
    with use_kernel(kernel):
        return wkv7(*arguments)


def assert_same(
    got: dict[str, Tensor],
    reference: dict[str, Tensor],
    tolerance: float,
    dtype: torch.dtype = torch.float32,
    scale: dict[str, Tensor] | None = None,
) -> None:
    """max |got - reference| <= tolerance max |reference|, tensor by tensor; scale replaces a reference that can be 0.

    Results in a half dtype may err by another half unit in the last place. Decay and state are never in half precision.
    """
    for name, expected in reference.items():
        allowed = tolerance
        if dtype in HALVES and name not in ("new state", "grad_decay", "grad_state"):
            allowed += torch.finfo(dtype).eps / 2
        error, size = (x.abs().max().item() for x in (got[name] - expected, (scale or reference)[name]))
        assert error <= allowed * size + 1e-30, f"{name}: error {error / (size + 1e-30):.1e} > {allowed:.0e}"


CASES = {
    "B": st.integers(1, 2),
    "T": st.sampled_from([1, 2, 15, 16, 17, 33, 100]),
    "H": st.integers(1, 3),
    "decays": st.sampled_from(["ordinary", "none", "all", "both"]),
    "size": st.sampled_from([1e-3, 1.0, 1e4]),
    "with_state": st.booleans(),
    "dtype": st.sampled_from([torch.float32, torch.float64, *HALVES]),
}
# The scan multiplies more factors than the recurrence.
TOLERANCES = {"compiled": 5e-7, "scan": 2e-6}


@pytest.mark.parametrize("kernel", FAST)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(**CASES)
@example(B=1, T=300, H=1, decays="ordinary", size=1.0, with_state=True, dtype=torch.float32)
@example(B=2, T=100, H=2, decays="both", size=1e4, with_state=True, dtype=torch.bfloat16)
def test_operator_agrees_with_the_recurrence(kernel, B, T, H, decays, size, with_state, dtype):
    if dtype == torch.float16:  # the other sizes leave its range
        size = 1.0
    arguments = draw(B, T, H, decays=decays, size=size, io=dtype)
    reference = results("recurrence", arguments, torch.float64, with_state=with_state)
    # The first step of a text does not use its decay and its a.
    scale = results("recurrence", arguments, torch.float64) if (T, with_state) == (1, False) else None
    tolerance = 1e-13 if dtype == torch.float64 else TOLERANCES[kernel]
    assert_same(results(kernel, arguments, dtype, with_state=with_state), reference, tolerance, dtype, scale)


@pytest.mark.parametrize("kernel", ["scan", "recurrence"])
def test_gradcheck(kernel):
    with use_kernel(kernel):
        arguments = [x.requires_grad_() for x in draw(1, 3, 2, N=2)]
        assert torch.autograd.gradcheck(wkv7, arguments)


@pytest.mark.parametrize("kernel", [*FAST, "recurrence"])
def test_state_remembers_a_value_by_its_key_until_it_is_removed(kernel):
    """Three steps without decay: store a value, remove half of it, read only."""
    key, value = torch.zeros(1, 3, 1, 64), torch.zeros(1, 3, 1, 64)
    key[0, 0, 0, 3], value[0, 0, 0, 5] = 1.0, 8.0
    a, b, receptance = torch.zeros_like(key), torch.zeros_like(key), torch.zeros_like(key)
    a[0, 1, 0, 3], b[0, 1, 0, 3] = -1.0, 0.5
    receptance[..., 3] = 1.0
    with use_kernel(kernel):
        output, state = wkv7(receptance, torch.full_like(key, -100.0), key, value, a, b)
    torch.testing.assert_close(output[0, :, 0, 5], torch.tensor([8.0, 4.0, 4.0]))
    assert state[0, 0].nonzero().tolist() == [[5, 3]], "rows are values, columns are keys"
    assert (output != 0).sum() == 3


@pytest.mark.parametrize("kernel", [*FAST, "recurrence"])
def test_decay_is_between_0_545_and_1(kernel):
    state, zeros = torch.ones(1, 1, 64, 64), torch.zeros(1, 1, 1, 64)
    for decay, kept in ((100.0, 0.5452392), (0.0, 0.7384090), (-100.0, 1.0)):
        with use_kernel(kernel):
            _, after = wkv7(zeros, torch.full_like(zeros, decay), zeros, zeros, zeros, zeros, state)
        torch.testing.assert_close(after, torch.full_like(after, kept))


@pytest.mark.parametrize("kernel", FAST)
@pytest.mark.parametrize("cuts", [[1], [7, 8], [16, 40]], ids=str)
def test_text_in_pieces_gives_the_same_results(kernel, cuts):
    *inputs, state = (x.float() for x in draw(2, 50, 2))
    with use_kernel(kernel):
        whole, end = wkv7(*inputs, state)
        outputs = []
        for piece in zip(*(x.tensor_split(cuts, dim=1) for x in inputs), strict=True):
            output, state = wkv7(*piece, state)
            outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs, dim=1), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, end, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", [*FAST, "recurrence"])
def test_wkv7_under_autocast(kernel):
    arguments = [x.float() for x in draw(1, 20, 2)]
    with use_kernel(kernel):
        expected = wkv7(*arguments)
        with torch.autocast("cpu", torch.bfloat16):
            got = wkv7(*arguments)
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


@pytest.mark.parametrize("kernel", [*FAST, "recurrence"])
def test_raw_decay_keeps_its_digits_next_to_bfloat16(kernel):
    arguments = [x.float() for x in draw(1, 40, 1)]
    arguments[1] = arguments[1] - 4
    inputs = [x if name == "decay" else x.bfloat16() for name, x in zip(NAMES[:6], arguments, strict=False)]
    with use_kernel(kernel):
        output, state = wkv7(*inputs)
        _, exact = wkv7(*(x.float() for x in inputs))
        _, rounded = wkv7(*(x.bfloat16().float() for x in inputs))
    assert output.dtype == torch.bfloat16 and state.dtype == torch.float32
    torch.testing.assert_close(state, exact, rtol=1e-5, atol=1e-5)
    assert (rounded - exact).abs().max() > 1e-3


@pytest.mark.parametrize("kernel", [*FAST, "recurrence"])
def test_an_empty_batch(kernel):
    leaves = [x.requires_grad_() for x in draw(0, 4, 2)]
    with use_kernel(kernel):
        output, state = wkv7(*leaves)
    assert output.shape == (0, 4, 2, 64) and state.shape == (0, 2, 64, 64)
    (output.sum() + state.sum()).backward()
    assert all(x.grad is not None and x.grad.shape == x.shape for x in leaves)


@pytest.mark.parametrize("kernel", ["scan", "recurrence"])
def test_plain_kernels_compile_without_graph_breaks(kernel):
    arguments = [x.float() for x in draw(1, 20, 2)]
    with use_kernel(kernel):
        output, state = torch.compile(wkv7, fullgraph=True, backend="eager")(*arguments)
        expected, end = wkv7(*arguments)
    assert torch.equal(output, expected) and torch.equal(state, end)


def test_scan_has_a_second_derivative():
    arguments = [x.requires_grad_() for x in draw(1, 3, 1, N=2)]
    assert torch.autograd.gradgradcheck(partial(select_kernel, "scan"), arguments)


def change(name: str, value: object) -> dict[str, object]:
    return dict(zip(NAMES, draw(2, 4, 3), strict=True)) | {name: value}


@pytest.mark.parametrize(
    ("name", "value", "kind", "words"),
    [
        ("key", torch.zeros(4, 3, 64), ValueError, r"key must be \(B, T, H, N\) .*not \(4, 3, 64\)"),
        ("key", torch.zeros(2, 0, 3, 64), ValueError, r"key must be .*not \(2, 0, 3, 64\)"),
        ("key", torch.zeros(2, 4, 3, 64, dtype=torch.int64), TypeError, r"key must be .*not torch.int64"),
        ("value", torch.zeros(2, 5, 3, 64), ValueError, r"value must be \(2, 4, 3, 64\) .*not \(2, 5, 3, 64\)"),
        ("decay", torch.zeros(3, 64), ValueError, r"decay must be \(2, 4, 3, 64\) .*not \(3, 64\)"),
        ("a", 1.0, TypeError, r"a must be .*not float"),
        ("state", torch.zeros(2, 3, 64), ValueError, r"state must be \(2, 3, 64, 64\) .*not \(2, 3, 64\)"),
        ("b", torch.zeros(2, 4, 3, 64, device="meta"), ValueError, r"b is on meta and key on cpu"),
    ],
)
def test_errors_name_the_argument(name, value, kind, words):
    with pytest.raises(kind, match=words) as caught:
        wkv7(**change(name, value))
    assert "\n" not in str(caught.value)
