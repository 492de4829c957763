"""The CUDA kernels without a GPU: compiled by g++ and executed unchanged, one CPU thread per CUDA thread.

This verifies the algebra, the indexing, the carries and (under ThreadSanitizer) the barriers, but not the GPU's own
exponential and rounding: `pytest -m gpu` does.
"""

import ctypes
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from hypothesis import example, given, settings
from hypothesis import strategies as st
from systems import WINDOWS
from test_wkv4 import CASES as CPU_CASES
from test_wkv4 import (
    DTYPES,
    NOT_NUMBERS,
    assert_nan_gradient_spreads_as_in_reference,
    assert_nan_matches_reference,
    assert_plus_infinity_has_its_limit,
    assert_same,
    draw,
    ratios,
    results,
)
from torch import Tensor

from rwkv_pl.ops.build import CUDA_FLAGS, chip_flags, nvcc_command
from rwkv_pl.ops.prebuilt import CHIPS
from rwkv_pl.ops.toolchain import find_compiler, find_nvcc

HOST = Path(__file__).parent / "host"
CUDA = Path(__file__).parents[2] / "cuda"

# Numbered as in wkv4_on_host.cpp: a kernel and its tile.
WALK = (0, 64)
SMALL_SCANS = [(1, 8), (2, 32), (3, 256)]


def build(folder: Path, *flags: str, source: str = "wkv4_on_host.cpp", cuda: Path = CUDA) -> Path:
    if WINDOWS:
        pytest.skip("the kernels are compiled for the host with the flags of gcc")
    compiler = find_compiler()
    assert compiler is not None
    built = folder / "built"
    command = [
        compiler.path, "-std=c++20", "-O1", "-fPIC", "-pthread", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas",
        "-isystem", str(Path(torch.__path__[0], "include")), f"-I{cuda}", *flags, str(HOST / source), "-o", str(built),
    ]  # fmt: skip
    subprocess.run(command, check=True)
    return built


def load_once(tmp_path_factory, source: str) -> ctypes.CDLL:
    """The kernels as a library, compiled by the first test worker that needs them."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"host {source}"
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "lock"):
        if not (folder / "library.so").exists():
            build(folder, "-shared", source=source).rename(folder / "library.so")
    return ctypes.CDLL(str(folder / "library.so"))


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return load_once(tmp_path_factory, "wkv4_on_host.cpp")


class OnHost(torch.autograd.Function):
    @staticmethod
    def forward(ctx, library, kernel, tile, time_decay, time_first, key, value, state):
        B, T, C = key.shape
        ctx.call, ctx.tile = partial(library.wkv4, DTYPES.index(key.dtype), kernel), tile
        saved = time_decay.new_full((B, -(-T // tile) + 1, 4, C), torch.nan)
        output, new_state = torch.full_like(key, torch.nan), time_decay.new_full((B, 3, C), torch.nan)
        run(ctx.call, key, tile, 0, time_decay, time_first, key, value, saved, state, output, new_state)
        ctx.save_for_backward(time_decay, time_first, key, value, saved)
        ctx.set_materialize_grads(False)
        return output, new_state

    @staticmethod
    def backward(ctx, grad_output, grad_state):
        time_decay, time_first, key, value, saved = ctx.saved_tensors
        B, _, C = key.shape
        grads = [torch.full_like(x, torch.nan) for x in (key, value)]
        grads.append(time_decay.new_full((B, 3, C), torch.nan))
        shares = [time_decay.new_full((B, C), torch.nan) for _ in range(2)]
        sums = [time_decay.new_full((C,), torch.nan) for _ in range(2)]
        if grad_output is None:
            grad_output = torch.zeros_like(key)
        grad_output = grad_output.contiguous()
        arguments = (time_decay, time_first, key, value, saved, grad_output, grad_state, *grads, *shares, *sums)
        run(ctx.call, key, ctx.tile, 1, *arguments)
        state = grads[2] if ctx.needs_input_grad[7] else None
        return None, None, None, sums[1], sums[0], *grads[:2], state


def run(call, key: Tensor, tile: int, backward: int, *tensors: Tensor | None) -> None:
    sizes = (ctypes.c_int64 * 5)(*key.shape, tile, backward)
    pointers = (ctypes.c_void_p * len(tensors))(*(0 if x is None else x.data_ptr() for x in tensors))
    assert all(x is None or x.is_contiguous() for x in tensors)
    assert call(sizes, pointers) == 0


def operator(library, kernel: tuple[int, int], io: torch.dtype):
    def wkv4(time_decay, time_first, key, value, state=None):
        wide = [x if io == torch.float64 else x.float() for x in (time_decay, time_first)]
        if state is not None:
            state = state.to(wide[0].dtype)
        return OnHost.apply(library, *kernel, *wide, key.to(io), value.to(io), state)

    return wkv4


CASES = CPU_CASES | {
    "B": st.integers(1, 2),
    "T": st.sampled_from([1, 2, 7, 8, 9, 31, 33, 64, 70, 136]),
    "C": st.sampled_from([1, 3, 4, 8, 17]),
}


@pytest.mark.parametrize("kernel", [WALK, *SMALL_SCANS], ids=str)
@settings(max_examples=2, deadline=None, derandomize=True)
@given(**CASES)
@example(B=1, T=300, C=3, keys="ordinary", decays="ordinary", with_state=True, dtype=torch.float32)
@example(B=1, T=1, C=1, keys="ordinary", decays="all", with_state=True, dtype=torch.float16)
@example(B=2, T=70, C=3, keys="far apart", decays="ordinary", with_state=True, dtype=torch.float16)
@example(B=2, T=70, C=3, keys="near -1e4", decays="ordinary", with_state=False, dtype=torch.float16)
@example(B=2, T=70, C=3, keys="far apart", decays="ordinary", with_state=True, dtype=torch.bfloat16)
@example(B=2, T=70, C=3, keys="near 1e4", decays="ordinary", with_state=False, dtype=torch.bfloat16)
def test_cuda_kernels_agree_with_the_recurrence(library, kernel, B, T, C, keys, decays, with_state, dtype):
    arguments = draw(B, T, C, keys, decays, dtype)
    reference = results("recurrence", arguments, torch.float64, with_state=with_state)
    ordinary = results("recurrence", draw(B, T, C), torch.float64)
    # float32 as for the CPU's kernel, which has the same arithmetic. In float64 the reference is less exact at keys of
    # 1e4: it stores an exponent in one number, so half an ulp is 1e-12.
    tolerance = 1e-11 if dtype == torch.float64 else 5e-6
    if dtype != torch.float64 and (keys, with_state) == ("near -1e4", True):  # as for the CPU's
        tolerance = 3e-5
    scale = [torch.maximum(a.norm(), b.norm()) for a, b in zip(reference, ordinary, strict=True)]
    got = results(operator(library, kernel, dtype), arguments, dtype, with_state=with_state)
    assert_same(got, reference, tolerance, scale, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", [WALK, *SMALL_SCANS], ids=str)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(**CASES)
def test_cuda_kernels_agree_with_the_recurrence_in_many_cases(library, kernel, **case):
    test_cuda_kernels_agree_with_the_recurrence.hypothesis.inner_test(library, kernel, **case)


# The kernels in the GPU's configuration, each with a truncated tile.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tile", [WALK[1], 128, 256, 1024])
def test_kernels_in_gpu_configuration_agree(library, tile, dtype):
    if (tile == 128) != (dtype == torch.float64) and tile != WALK[1]:
        pytest.skip("a scan of another dtype")
    arguments = draw(1, 75, 6, io=dtype)
    reference = results("recurrence", arguments, torch.float64)
    tolerance = 1e-11 if dtype == torch.float64 else 5e-6
    assert_same(results(operator(library, (0, tile), dtype), arguments, dtype), reference, tolerance, dtype=dtype)


def test_unaligned_pairs_agree(library):
    arguments = [x.bfloat16() if i in (2, 3) else x.float() for i, x in enumerate(draw(1, 20, 4))]
    expected = operator(library, WALK, torch.bfloat16)(*arguments)
    arguments[3] = torch.cat((arguments[3].new_zeros(1), arguments[3].flatten()))[1:].view(1, 20, 4)
    got = operator(library, WALK, torch.bfloat16)(*arguments)
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


@pytest.mark.parametrize("kernel", [WALK, *SMALL_SCANS], ids=str)
def test_an_empty_batch(library, kernel):
    arguments = [x.float().requires_grad_() for x in draw(0, 5, 3)]
    output, state = operator(library, kernel, torch.float32)(*arguments)
    assert output.shape == (0, 5, 3) and state.shape == (0, 3, 3)
    output.sum().backward()
    assert arguments[0].grad.abs().sum() == 0


@pytest.mark.parametrize("kernel", [WALK, *SMALL_SCANS], ids=str)
@pytest.mark.parametrize("which", NOT_NUMBERS)
def test_nan_matches_reference(library, kernel, which):
    assert_nan_matches_reference(operator(library, kernel, torch.float32), which)


@pytest.mark.parametrize("kernel", [WALK, *SMALL_SCANS], ids=str)
def test_nan_gradient_spreads_as_in_reference(library, kernel):
    assert_nan_gradient_spreads_as_in_reference(operator(library, kernel, torch.float32))


# The scans share one source, and a dtype changes only how values are read and written.
@pytest.mark.parametrize(
    ("kernel", "dtype"),
    [
        (WALK, torch.float32),
        (WALK, torch.bfloat16),
        (SMALL_SCANS[0], torch.float32),
        (SMALL_SCANS[2], torch.bfloat16),
    ],
    ids=str,
)
def test_results_are_bit_identical_every_time(library, kernel, dtype):
    called, arguments = operator(library, kernel, dtype), draw(2, 75, 3, io=dtype)
    once, again = (results(called, arguments, dtype) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(once, again, strict=True))


def test_launch_errors_are_reported(library):
    with pytest.raises(AssertionError):
        operator(library, (0, 48), torch.float32)(*draw(1, 5, 3))


PLANTED = {
    "as it is": ("", ""),
    "the barrier before the scan over warps": (
        "__syncthreads();\n  if (thread < CH * WARPS)",
        "if (thread < CH * WARPS)",
    ),
    "the barrier after it": ("  __syncthreads();\n  return {in_warp", "  return {in_warp"),
    "one buffer for two tiles": ("totals[tile % 2]", "totals[0]"),
    "the barrier before the sums": ("sum_w;\n  __syncthreads();", "sum_w;"),
}


@pytest.mark.slow
@pytest.mark.parametrize("race", PLANTED)
def test_only_planted_races_are_found(tmp_path, race):
    """ThreadSanitizer reports no race in the kernels, and finds each planted race."""
    cuda = tmp_path / "cuda"
    shutil.copytree(CUDA, cuda)
    scan = cuda / "wkv4_scan.cuh"
    old, new = PLANTED[race]
    assert old in scan.read_text()
    scan.write_text(scan.read_text().replace(old, new, 1) if old else scan.read_text())
    program = build(tmp_path, "-fsanitize=thread", "-g", source="races.cpp", cuda=cuda)
    run = subprocess.run([str(program)], capture_output=True, text=True, timeout=600)
    # The sanitizer ends a program with exit code 66 if it saw a race.
    assert run.returncode == (66 if old else 0), run.stderr[-2000:]


@pytest.mark.skipif(find_nvcc("13") is None, reason="needs nvcc")
@pytest.mark.slow
def test_every_architecture_compiles_without_spills_and_loads(tmp_path):
    nvcc, chips = find_nvcc("13"), (75, 80, 86, 89, 90, 100, 120)
    assert chips == CHIPS
    library = tmp_path / "wkv4_cuda.so"
    command = nvcc_command(
        nvcc, [*CUDA_FLAGS, *chip_flags(chips), "-Xptxas=-v", "--threads=2"], CUDA / "wkv4_cuda.cu", library
    )
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert set(re.findall(r"for 'sm_(\d+)'", run.stderr)) == {str(chip) for chip in chips}
    spills = re.findall(r"(\d+) bytes spill stores", run.stderr)
    assert len(spills) > 14 * len(chips) and set(spills) == {"0"}
    # Load it with a torch without CUDA too: linking alone proves nothing.
    load = "import torch; from rwkv_pl.ops.backend import load; assert not load('wkv4', 'cpu'); "
    load += f"torch.ops.load_library({str(library)!r})"
    subprocess.run([sys.executable, "-c", load], check=True)


@pytest.mark.slow
def test_no_access_out_of_bounds(tmp_path):
    program = build(tmp_path, "-fsanitize=address,undefined", "-fno-sanitize-recover=all", source="races.cpp")
    run = subprocess.run([str(program)], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-2000:]


@pytest.mark.parametrize("kernel", [WALK, *SMALL_SCANS], ids=str)
def test_gradcheck(library, kernel):
    # In random directions: test_cuda_kernels_agree_with_the_recurrence compares every single gradient.
    reference_ratios = partial(ratios, operator(library, kernel, torch.float64))
    assert torch.autograd.gradcheck(reference_ratios, [x.requires_grad_() for x in draw(1, 11, 2)], fast_mode=True)


@pytest.mark.parametrize("kernel", [WALK, *SMALL_SCANS], ids=str)
def test_plus_infinity_key_has_its_limit(library, kernel):
    assert_plus_infinity_has_its_limit(operator(library, kernel, torch.float64))
