"""Every implementation of WKV-7 against one reference: the plain recurrence in float64 under autograd."""

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from levels import run_at
from systems import needs_backward_errors
from torch import Tensor
from torch.nn import functional as F

from rwkv_pl.ops.backend import KernelError, load, use_kernel
from rwkv_pl.ops.build import LEVELS
from rwkv_pl.ops.wkv7 import wkv7

pytestmark = pytest.mark.usefixtures("two_threads")

FAST = ["compiled", "scan"]
HALVES = [torch.float16, torch.bfloat16]
NAMES = ["receptance", "decay", "key", "value", "a", "b", "state"]


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
    "T": st.sampled_from([1, 2, 15, 16, 17, 33, 70]),
    "H": st.integers(1, 3),
    "decays": st.sampled_from(["ordinary", "none", "all", "both"]),
    "size": st.sampled_from([1e-3, 1.0, 1e4]),
    "with_state": st.booleans(),
    "dtype": st.sampled_from([torch.float32, torch.float64, *HALVES]),
}
# The scan multiplies more factors than the recurrence.
TOLERANCES = {"compiled": 5e-7, "scan": 2e-6}


@pytest.mark.parametrize("kernel", FAST)
@settings(max_examples=4, deadline=None, derandomize=True)
@given(**CASES)
@example(B=1, T=140, H=1, decays="ordinary", size=1.0, with_state=True, dtype=torch.float32)
@example(B=1, T=70, H=2, decays="both", size=1e4, with_state=True, dtype=torch.bfloat16)
def test_operator_agrees_with_the_recurrence(kernel, B, T, H, decays, size, with_state, dtype):
    if dtype == torch.float16:  # the other sizes leave its range
        size = 1.0
    arguments = draw(B, T, H, decays=decays, size=size, io=dtype)
    reference = results("recurrence", arguments, torch.float64, with_state=with_state)
    # The first step of a text does not use its decay and its a.
    scale = results("recurrence", arguments, torch.float64) if (T, with_state) == (1, False) else None
    tolerance = 1e-13 if dtype == torch.float64 else TOLERANCES[kernel]
    assert_same(results(kernel, arguments, dtype, with_state=with_state), reference, tolerance, dtype, scale)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", FAST)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(**CASES)
def test_operator_agrees_with_the_recurrence_in_many_cases(kernel, **case):
    test_operator_agrees_with_the_recurrence.hypothesis.inner_test(kernel, **case)


@pytest.mark.usefixtures("compiled_kernel")
def test_gradcheck_of_the_compiled_operator():
    # In random directions: test_operator_agrees_with_the_recurrence compares every single gradient.
    with use_kernel("compiled"):
        arguments = [x.requires_grad_() for x in draw(1, 20, 1)]
        assert torch.autograd.gradcheck(wkv7, arguments, fast_mode=True)


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


@needs_backward_errors
@pytest.mark.usefixtures("compiled_kernel")
def test_second_derivative_needs_the_scan():
    arguments = [x.requires_grad_() for x in draw(1, 2, 1)]
    words = r"wkv7: the compiled operator has no second derivative; use_kernel\('scan'\) has one"
    for i in (1, 6):  # also if only one argument is asked for
        with use_kernel("compiled"), pytest.raises(RuntimeError, match=words):
            (grad,) = torch.autograd.grad(wkv7(*arguments)[0].square().sum(), arguments[i], create_graph=True)
            torch.autograd.grad(grad.sum(), arguments[0])
    arguments = [x.requires_grad_() for x in draw(1, 3, 1, N=2)]
    assert torch.autograd.gradgradcheck(partial(select_kernel, "scan"), arguments)


@pytest.mark.usefixtures("compiled_kernel")
@pytest.mark.parametrize("shape", [(1, 70, 1), (1, 40, 2), (2, 20, 3)], ids=str)
def test_rows_are_split_if_there_are_more_threads_than_heads(shape):
    arguments = draw(*shape)
    reference = results("recurrence", arguments, torch.float64)
    torch.set_num_threads(4)
    try:
        split, again = (results("compiled", arguments, torch.float32) for _ in range(2))
    finally:
        torch.set_num_threads(2)
    assert_same(split, reference, TOLERANCES["compiled"])
    assert all(torch.equal(split[name], again[name]) for name in split), "two runs differ"


@pytest.mark.usefixtures("compiled_kernel")
def test_without_gradients_nothing_is_saved():
    assert load("wkv7", "cpu") == ""
    arguments = [x.float() for x in draw(1, 70, 2)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.shape) or x, lambda x: x):
        with use_kernel("compiled"), torch.no_grad():
            expected = wkv7(*arguments)
        assert saved == []
        with use_kernel("compiled"):
            got = wkv7(*(x.requires_grad_() for x in arguments))
    assert (1, 2, 2, 64, 64) in saved and (1, 70, 2, 64) in saved
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))
    *_, states, sa = torch.ops.rwkv_pl.wkv7_forward(*(x.detach() for x in arguments), 0)
    assert states.numel() == sa.numel() == 0


@pytest.mark.usefixtures("compiled_kernel")
@pytest.mark.parametrize("which", NAMES)
def test_nan_matches_reference(which):
    arguments = draw(1, 40, 2)
    arguments[NAMES.index(which)][0, 1 if which == "state" else 20, 1, 5] = torch.nan
    reference, got = results("recurrence", arguments, torch.float64), results("compiled", arguments, torch.float32)
    for name, expected in reference.items():
        assert torch.equal(got[name].isnan(), expected.isnan()), name
    assert any(x.isnan().any() for x in reference.values())
    numbers = [{name: x.nan_to_num() for name, x in found.items()} for found in (got, reference)]
    assert_same(*numbers, TOLERANCES["compiled"])


@pytest.mark.parametrize("kernel", FAST)
def test_strided_inputs(kernel):
    arguments = draw(2, 20, 2)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in arguments[:6]]
    strided.append(arguments[6].mT.contiguous().mT)
    dense = results(kernel, arguments, torch.float64)
    assert_same(results(kernel, strided, torch.float64), dense, 1e-13)
    # The gradient of a sum is one number with strides of 0.
    leaves = [x.detach().requires_grad_() for x in strided]
    with use_kernel(kernel):
        wkv7(*leaves)[0].sum().backward()
    assert all(x.grad is not None and x.grad.shape == x.shape for x in leaves)


@pytest.mark.usefixtures("compiled_kernel")
def test_opcheck():
    assert load("wkv7", "cpu") == ""
    arguments = [x.float() for x in draw(1, 33, 2)]
    arguments[2] = arguments[2].transpose(1, 2).contiguous().transpose(1, 2)
    leaves = [x.clone().requires_grad_() for x in arguments]
    torch.library.opcheck(torch.ops.rwkv_pl.wkv7_forward, (*leaves, 16))
    output, state, *saved = torch.ops.rwkv_pl.wkv7_forward(*arguments, 16)
    torch.library.opcheck(torch.ops.rwkv_pl.wkv7_backward, (*arguments[:6], *saved, output, state, 16))


@pytest.mark.usefixtures("compiled_kernel")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_to_one_graph(backend):
    arguments = [x.float().requires_grad_() for x in draw(1, 20, 2)]

    @torch.compile(fullgraph=True, backend=backend)
    def compiled(*arguments: Tensor) -> Tensor:
        output, state = wkv7(*arguments)
        return output.sum() + state.square().sum()

    with use_kernel("compiled"):
        output, state = wkv7(*arguments)
        expected = torch.autograd.grad(output.sum() + state.square().sum(), arguments)
        got = torch.autograd.grad(compiled(*arguments), arguments)
    for name, x, y in zip(NAMES, got, expected, strict=True):
        torch.testing.assert_close(x, y, msg=lambda text, name=name: f"{name}: {text}")


def test_compiled_kernel_is_never_replaced_by_another():
    """`use_kernel("compiled")` raises an error; `auto` computes the same in plain torch."""
    arguments = draw(1, 3, 1, N=32)
    with use_kernel("auto"):
        wkv7(*arguments)
    with (
        use_kernel("compiled"),
        pytest.raises(KernelError, match="none for heads of 32 channels"),
    ):
        wkv7(*arguments)


def test_meta_tensors_give_shapes():
    output, state = wkv7(*(x.to("meta") for x in draw(2, 5, 3)))
    assert (output.shape, state.shape) == ((2, 5, 3, 64), (2, 3, 64, 64))


@pytest.mark.usefixtures("compiled_kernel")
def test_compiled_operator_refuses_what_it_cannot_compute():
    assert load("wkv7", "cpu") == ""
    *inputs, state = (x.float() for x in draw(1, 4, 1))
    forward = torch.ops.rwkv_pl.wkv7_forward
    with pytest.raises(RuntimeError, match="wkv7: stretch must be 0 to 64, not 65"):
        forward(*inputs, state, 65)
    with pytest.raises(RuntimeError, match=r"wkv7: key must be \(B, T, H, 64\)"):
        forward(*(x[..., :32] for x in inputs), None, 0)
    with pytest.raises(RuntimeError, match="wkv7: state has not the shape"):
        forward(*inputs, state[:, :, :32], 0)
    with pytest.raises(RuntimeError, match="wkv7: decay has not the shape or the dtype"):
        forward(*(x.bfloat16() for x in inputs), None, 0)


AT_A_LEVEL = """
import torch
from test_wkv7 import TOLERANCES, assert_same, draw, results
torch.set_num_threads(2)
for shape in [(1, 100, 2), (1, 33, 1)]:
    for dtype, tolerance in [(torch.float32, TOLERANCES["compiled"]), (torch.float64, 1e-13), (torch.bfloat16, 5e-7)]:
        arguments = draw(*shape, io=dtype if dtype == torch.bfloat16 else torch.float32)
        reference = results("recurrence", arguments, torch.float64)
        assert_same(results("compiled", arguments, dtype), reference, tolerance, dtype)
"""


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
def test_every_level_agrees_with_the_recurrence(level):
    run_at(level, AT_A_LEVEL)


def change(name: str, value: object) -> dict[str, object]:
    return dict(zip(NAMES, draw(2, 4, 3), strict=True)) | {name: value}


@pytest.mark.parametrize(
    ("name", "value", "kind", "words"),
    [
        ("key", torch.zeros(4, 3, 64), ValueError, r"key must be \(B, T, H, N\) .*not \(4, 3, 64\)"),
        ("key", torch.zeros(2, 0, 3, 64), ValueError, r"key must be .*not \(2, 0, 3, 64\)"),
        ("key", None, TypeError, r"key must be .*not NoneType"),
        ("key", torch.zeros(2, 4, 3, 64).to(torch.float8_e5m2), TypeError, r"key must be .*not torch.float8"),
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
