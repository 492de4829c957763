"""Tests that need a GPU: `pytest -m gpu`; skipped without one."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_wkv4 import assert_same, draw, ratios, results

from rwkv_pl.ops.backend import load, use_kernel
from rwkv_pl.ops.wkv4 import DOUBLE_SCAN, LONG_SCAN, SCAN, WALK, wkv4

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

KERNELS = (WALK, SCAN, LONG_SCAN)


def on_gpu(tile: int | None, io: torch.dtype):
    """wkv4 on the GPU with key and value in `io`, by the kernel of that tile; None: the tile that wkv4 chooses."""

    def operator(time_decay, time_first, key, value, state=None):
        wide = torch.float64 if io == torch.float64 else torch.float32
        weights = (time_decay.cuda().to(wide), time_first.cuda().to(wide))
        state = None if state is None else state.cuda().to(wide)
        if tile is None:
            with use_kernel("compiled"):
                output, state = wkv4(*weights, key.cuda().to(io), value.cuda().to(io), state)
        else:
            assert load("wkv4", "cuda") == ""
            output, state, _ = torch.ops.rwkv_pl.wkv4_forward(
                *weights, key.cuda().to(io), value.cuda().to(io), state, tile
            )
        return output.cpu(), state.cpu()

    return operator


def check_kernel(tile, io, B, T, C, keys, decays, with_state):
    arguments = draw(B, T, C, keys, decays)
    if io in (torch.float16, torch.bfloat16):
        arguments[2:4] = [x.to(io).double() for x in arguments[2:4]]
    reference = results("recurrence", arguments, torch.float64, with_state=with_state)
    ordinary = results("recurrence", draw(B, T, C), torch.float64)
    # A half output is rounded once: 4e-3 for bfloat16.
    tolerance = {torch.float32: 5e-6, torch.float64: 1e-11}.get(io, 1e-2)
    scale = [torch.maximum(a.norm(), b.norm()) for a, b in zip(reference, ordinary, strict=True)]
    dtype = io if io == torch.float64 else torch.float32
    assert_same(results(on_gpu(tile, io), arguments, dtype, with_state=with_state), reference, tolerance, scale)


@pytest.mark.parametrize("tile", [*KERNELS, None])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    B=st.integers(1, 3),
    T=st.sampled_from([1, 2, 15, 33, 100, 255, 257, 1025]),
    C=st.sampled_from([1, 3, 16, 65, 130]),
    keys=st.sampled_from(["ordinary", "x10", "far apart", "near 1e4", "equal"]),
    decays=st.sampled_from(["ordinary", "none", "all"]),
    with_state=st.booleans(),
    io=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_cuda_operator_agrees_with_the_recurrence(tile, B, T, C, keys, decays, with_state, io):
    if io == torch.float16 and keys in ("far apart", "near 1e4"):
        keys = "x10"
    check_kernel(tile, io, B, T, C, keys, decays, with_state)


@pytest.mark.parametrize("tile", [WALK, DOUBLE_SCAN, None])
@pytest.mark.parametrize("T", [1, 5, 200])
def test_float64_agrees_with_the_recurrence(tile, T):
    check_kernel(tile, torch.float64, 2, T, 5, "ordinary", "ordinary", True)


def test_gradcheck():
    with use_kernel("compiled"):
        assert torch.autograd.gradcheck(partial(ratios, wkv4), [x.cuda().requires_grad_() for x in draw(2, 5, 3)])


def test_second_derivative_is_refused():
    leaves = [x.cuda().requires_grad_() for x in draw(1, 4, 3)]
    with use_kernel("compiled"):
        (grad,) = torch.autograd.grad(wkv4(*leaves)[0].sum(), leaves[2], create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            grad.sum().backward()


@pytest.mark.parametrize("tile", KERNELS)
def test_results_are_bit_identical_every_time(tile):
    arguments = [x.float().cuda().requires_grad_() for x in draw(3, 300, 130)]

    def once():
        output, state, _ = torch.ops.rwkv_pl.wkv4_forward(*arguments, tile)
        return [output, state, *torch.autograd.grad(output.sin().sum() + state[:, :2].sin().sum(), arguments)]

    assert load("wkv4", "cuda") == ""
    first = once()
    for _ in range(5):
        assert all(torch.equal(x, y) for x, y in zip(first, once(), strict=True))


@pytest.mark.parametrize("kernel", ["ordinary", "transposed", "offset"])
def test_strided_and_unaligned_inputs(kernel):
    arguments = [x.bfloat16().cuda() for x in draw(2, 40, 6)]
    with use_kernel("compiled"):
        expected = wkv4(*arguments)
        if kernel == "transposed":
            arguments[2] = arguments[2].transpose(1, 2).contiguous().transpose(1, 2)
        elif kernel == "offset":
            # Contiguous, but two bytes past the alignment of a pair.
            arguments[3] = torch.cat((arguments[3].new_zeros(1), arguments[3].flatten()))[1:].view(2, 40, 6)
        got = wkv4(*arguments)
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


def test_an_empty_batch():
    leaves = [x.float().cuda().requires_grad_() for x in draw(1, 5, 3)]
    key = leaves[2][:0]
    with use_kernel("compiled"):
        output, state = wkv4(leaves[0], leaves[1], key, key)
    assert output.shape == (0, 5, 3) and state.shape == (0, 3, 3)
    output.sum().backward()
    assert leaves[0].grad.abs().sum() == 0


def test_current_stream_and_cuda_graph_are_used():
    arguments = [x.float().cuda() for x in draw(2, 100, 12)[:4]]
    with use_kernel("compiled"):
        expected, _ = wkv4(*arguments)
        with torch.cuda.stream(torch.cuda.Stream()):
            wkv4(*arguments)
            torch.cuda.current_stream().synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output, _ = wkv4(*arguments)
        arguments[3].mul_(2)
        graph.replay()
    torch.testing.assert_close(output, 2 * expected)


def test_compile_autocast_and_checkpointing_work():
    leaves = [x.float().cuda().requires_grad_() for x in draw(2, 100, 12)]

    def loss(operator):
        return operator(*leaves[:4])[0].square().sum()

    with use_kernel("compiled"):
        expected = torch.autograd.grad(loss(wkv4), leaves[:4])
        compiled = torch.autograd.grad(loss(torch.compile(wkv4, fullgraph=True)), leaves[:4])
        again = torch.autograd.grad(
            loss(lambda *x: torch.utils.checkpoint.checkpoint(wkv4, *x, use_reentrant=False)), leaves[:4]
        )
        with torch.autocast("cuda", torch.bfloat16):
            output, state = wkv4(*leaves[:2], leaves[2].bfloat16(), leaves[3].bfloat16())
    assert output.dtype == torch.bfloat16 and state.dtype == torch.float32
    for got in (compiled, again):
        for x, y in zip(got, expected, strict=True):
            torch.testing.assert_close(x, y)


@pytest.mark.parametrize("tile", KERNELS)
@pytest.mark.parametrize("which", ["nan key", "nan value", "minus infinity"])
def test_nan_matches_reference(tile, which):
    arguments = draw(1, 70, 3)
    arguments[3 if which == "nan value" else 2][0, 40, 1] = torch.inf * -1 if which == "minus infinity" else torch.nan
    reference = results("recurrence", arguments, torch.float64)
    got = results(on_gpu(tile, torch.float32), arguments, torch.float32)
    for x, y in zip(got, reference, strict=True):
        assert torch.equal(x.isnan(), y.isnan())
