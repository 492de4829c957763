"""The CUDA kernels of WKV-7 without a GPU, as in test_wkv4_cuda_on_host.py. They have never run on a GPU."""

import ctypes
import re
import shutil
import subprocess
import sys

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_wkv4_cuda_on_host import CUDA, build, load_once
from test_wkv7 import CASES as CPU_CASES
from test_wkv7 import NAMES, TOLERANCES, assert_same, draw, results
from torch import Tensor

from rwkv_pl.ops.build import CUDA_FLAGS, chip_flags, nvcc_command
from rwkv_pl.ops.prebuilt import CHIPS
from rwkv_pl.ops.toolchain import find_nvcc
from rwkv_pl.ops.wkv7 import CUDA_STRETCH

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return load_once(tmp_path_factory, "wkv7_on_host.cpp")


class OnHost(torch.autograd.Function):
    @staticmethod
    def forward(ctx, library, *arguments):
        *inputs, state = arguments
        key = inputs[2]
        B, T, H, N = key.shape
        ctx.library = library
        saved = [torch.full((B, H, -(-T // CUDA_STRETCH), N, N), torch.nan), torch.full((B, T, H, N), torch.nan)]
        output, new_state = torch.full_like(key, torch.nan), torch.full((B, H, N, N), torch.nan)
        run(library, key, 0, *inputs, *saved, state, output, new_state)
        ctx.save_for_backward(*inputs, *saved)
        ctx.set_materialize_grads(False)
        return output, new_state

    @staticmethod
    def backward(ctx, grad_output, grad_state):
        saved = ctx.saved_tensors
        key = saved[2]
        B, _, H, N = key.shape
        grads = [torch.full_like(x, torch.nan) for x in saved[:6]]
        grads.append(torch.full((B, H, N, N), torch.nan))
        scratch = torch.full((B, H, 4, N, N), torch.nan)
        grad_output = torch.zeros_like(key) if grad_output is None else grad_output.contiguous()
        run(ctx.library, key, 1, *saved, grad_output, grad_state, *grads, scratch)
        return None, *grads[:6], grads[6] if ctx.needs_input_grad[7] else None


def run(library, key: Tensor, backward: int, *tensors: Tensor | None) -> None:
    sizes = (ctypes.c_int64 * 4)(*key.shape[:3], backward)
    pointers = (ctypes.c_void_p * len(tensors))(*(0 if x is None else x.data_ptr() for x in tensors))
    assert all(x is None or x.is_contiguous() for x in tensors)
    assert library.call_wkv7(DTYPES.index(key.dtype), sizes, pointers) == 0


def operator(library):
    return lambda *inputs: OnHost.apply(library, *inputs, *([None] * (7 - len(inputs))))


CASES = CPU_CASES | {"B": st.just(1), "H": st.integers(1, 2), "T": st.sampled_from([1, 3, 16, 17, 33])}
CASES["dtype"] = st.sampled_from(DTYPES)


@settings(max_examples=2, deadline=None, derandomize=True)
@given(**CASES)
@example(B=2, T=37, H=1, decays="ordinary", size=1.0, with_state=True, dtype=torch.float32)
@example(B=1, T=18, H=2, decays="both", size=1.0, with_state=False, dtype=torch.float16)
@example(B=1, T=18, H=1, decays="both", size=1e4, with_state=True, dtype=torch.bfloat16)
def test_cuda_kernels_agree_with_the_recurrence(library, B, T, H, decays, size, with_state, dtype):
    if dtype == torch.float16:  # the other sizes leave its range
        size = 1.0
    arguments = draw(B, T, H, decays=decays, size=size, io=dtype)
    reference = results("recurrence", arguments, torch.float64, with_state=with_state)
    # The first step of a text does not use its decay and its a.
    scale = results("recurrence", arguments, torch.float64) if (T, with_state) == (1, False) else None
    got = results(operator(library), arguments, dtype, with_state=with_state)
    assert_same(got, reference, TOLERANCES["compiled"], dtype, scale)


@pytest.mark.slow
@settings(max_examples=20, deadline=None, derandomize=True)
@given(**CASES)
def test_cuda_kernels_agree_with_the_recurrence_in_many_cases(library, **case):
    test_cuda_kernels_agree_with_the_recurrence.hypothesis.inner_test(library, **case)


def test_an_empty_batch(library):
    arguments = [x.float().requires_grad_() for x in draw(0, 5, 1)]
    output, state = operator(library)(*arguments)
    assert output.shape == (0, 5, 1, 64) and state.shape == (0, 1, 64, 64)
    output.sum().backward()


@pytest.mark.parametrize("which", NAMES)
def test_nan_matches_reference(library, which):
    arguments = draw(1, 20, 1)
    arguments[NAMES.index(which)][0, 0 if which == "state" else 12, 0, 5] = torch.nan
    reference, got = (
        results("recurrence", arguments, torch.float64),
        results(operator(library), arguments, torch.float32),
    )
    for name, expected in reference.items():
        assert torch.equal(got[name].isnan(), expected.isnan()), name


PLANTED = {
    "as it is": ("", ""),
    "the barrier after the inputs": ("value;\n    __syncthreads();", "value;"),
    "the barrier before g_sa is written": ("__syncthreads();\n      g_sa[j] = my_g_sa;", "g_sa[j] = my_g_sa;"),
    "the barrier after it": ("g_sa[j] = my_g_sa;\n      __syncthreads();", "g_sa[j] = my_g_sa;"),
    "the barrier before a tile": (": TILE;\n    __syncthreads();", ": TILE;"),
}


@pytest.mark.slow
@pytest.mark.parametrize("race", PLANTED)
def test_only_planted_races_are_found(tmp_path, race):
    """ThreadSanitizer reports no race in the kernels, and finds each planted race."""
    cuda = tmp_path / "cuda"
    shutil.copytree(CUDA, cuda)
    walk = cuda / "wkv7_walk.cuh"
    old, new = PLANTED[race]
    assert old in walk.read_text()
    walk.write_text(walk.read_text().replace(old, new, 1) if old else walk.read_text())
    program = build(tmp_path, "-fsanitize=thread", "-g", source="wkv7_races.cpp", cuda=cuda)
    run = subprocess.run([str(program)], capture_output=True, text=True, timeout=600)
    # The sanitizer ends a program with exit code 66 if it saw a race.
    assert run.returncode == (66 if old else 0), run.stderr[-2000:]


@pytest.mark.slow
def test_no_access_out_of_bounds(tmp_path):
    program = build(tmp_path, "-fsanitize=address,undefined", "-fno-sanitize-recover=all", source="wkv7_races.cpp")
    run = subprocess.run([str(program)], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-2000:]


@pytest.mark.skipif(find_nvcc("13") is None, reason="needs nvcc")
@pytest.mark.slow
def test_every_architecture_compiles_without_spills_and_loads(tmp_path):
    library = tmp_path / "wkv7_cuda.so"
    flags = [*CUDA_FLAGS, *chip_flags(CHIPS), "-Xptxas=-v", "--threads=2"]
    run = subprocess.run(
        nvcc_command(find_nvcc("13"), flags, CUDA / "wkv7_cuda.cu", library), capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert set(re.findall(r"for 'sm_(\d+)'", run.stderr)) == {str(chip) for chip in CHIPS}
    spills = re.findall(r"(\d+) bytes spill stores", run.stderr)
    # Forward and backward in three dtypes.
    assert len(spills) == 6 * len(CHIPS) and set(spills) == {"0"}
    # Load it with a torch without CUDA too: linking alone proves nothing.
    load = "import torch; from rwkv_pl.ops.backend import load; assert not load('wkv7', 'cpu'); "
    load += f"torch.ops.load_library({str(library)!r})"
    subprocess.run([sys.executable, "-c", load], check=True)
