"""The compiled CPU operators under the compiler's sanitizers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import rwkv_pl.cuda
from levels import TESTS

from rwkv_pl.ops.build import STABLE_ABI, cpu_command
from rwkv_pl.ops.libraries import LIBRARIES
from rwkv_pl.ops.toolchain import find_compiler

SANITIZED = """
import sys, torch
for library in sys.argv[1:]:
    torch.ops.load_library(library)
torch.set_num_threads(3)
for B, T, C in [(0, 3, 2), (1, 1, 1), (2, 33, 5), (3, 100, 65), (1, 700, 33)]:
    for dtype in (torch.float32, torch.float64):
        for state in (None, torch.rand(B, 3, C, dtype=dtype)):
            w, u = torch.randn(2, C, dtype=dtype)
            k, v = torch.randn(2, B, T, C, dtype=dtype)
            output, last, tiles = torch.ops.rwkv_pl.wkv4_forward(w, u, k, v, state, 16)
            torch.ops.rwkv_pl.wkv4_backward(w, u, k, v, tiles, output, last if state is not None else None, 16)
        if dtype == torch.float32:
            half = k.bfloat16(), v.bfloat16()
            output, last, tiles = torch.ops.rwkv_pl.wkv4_forward(w, u, *half, None, 16)
            torch.ops.rwkv_pl.wkv4_backward(w, u, *half, tiles, output, None, 16)
ops = torch.ops.rwkv_pl
for B, T, H in [(0, 3, 2), (1, 1, 1), (1, 70, 2), (2, 17, 3)]:
    for dtype in (torch.float32, torch.float64):
        for state in (None, torch.rand(B, H, 64, 64, dtype=dtype)):
            x = [0.1 * torch.randn(B, T, H, 64, dtype=dtype) for _ in range(6)]
            for io in [dtype, torch.bfloat16][: 2 if dtype == torch.float32 else 1]:
                x = [y if i == 1 else y.to(io) for i, y in enumerate(x)]
                ops.wkv7_forward(*x, state, 0)
                output, last, *saved = ops.wkv7_forward(*x, state, 64)
                ops.wkv7_backward(*x, *saved, output, last if state is not None else None, 64)
for B, T, C, J in [(0, 3, 2, 2), (1, 1, 1, 2), (2, 65, 5, 3), (1, 200, 33, 2)]:
    for half in (False, True):
        dtype = torch.bfloat16 if half else torch.float32
        x, w, b, last, mix = torch.randn(B, T, C), *torch.randn(2, C), torch.randn(B, C), list(torch.randn(J, C))
        for before in (None, last):
            mixed, after, figures = ops.norm_token_shift(x, w, b, mix, before, 1e-5, half)
            ops.norm_token_shift_backward(x, w, b, mix, before, figures, mixed, x, after if half else None)
        r, y = torch.randn(2, B, T, C).to(dtype)
        ops.gate_backward(ops.gate(r, y, x), r, y)
        ops.gate_backward(ops.gate(r, y, None), r, y)
        ops.squared_relu_(y)
        ops.squared_relu_backward_(r, y)
        logits, targets = torch.randn(B * T, C).to(dtype), torch.randint(-1, C, (B * T,))
        nats, largest, *kept = ops.cross_entropy(logits, targets)
        ops.cross_entropy_backward(logits, targets, largest, *kept, nats, largest)
from test_step import draw_parameters, draw_state
sizes = [(0, 2, 3, 5, 7), (1, 1, 1, 1, 1), (1, 2, 64, 9, 256), (13, 1, 33, 5, 70), (5, 2, 128, 40, 500)]
for version in ("rwkv4", "rwkv7"):
    for B, L, C, V, F in sizes:
        for dtype in (torch.float32, torch.bfloat16):
            for state in ([], draw_state(version, L, B, C)):
                parameters = [x.to(dtype) for x in draw_parameters(version, L, C, V, F)]
                getattr(ops, version + "_step")(parameters, torch.randint(V, (B,)), state)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs gcc's sanitizer libraries on Linux")
def test_no_access_out_of_bounds(tmp_path):
    """The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer."""
    compiler = find_compiler()
    assert compiler is not None
    where = subprocess.run(
        [compiler.path, "-print-file-name=libasan.so"], capture_output=True, text=True
    ).stdout.strip()
    if not Path(where).is_absolute():
        pytest.skip(f"{compiler.version} has no libasan")
    flags = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", STABLE_ABI]
    built = []
    for library in LIBRARIES.values():
        built.append(str(tmp_path / f"{library.name}.so"))
        folder = Path(rwkv_pl.cuda.__path__[0])
        subprocess.run(cpu_command(compiler, flags, folder, library.cpu_sources, Path(built[-1])), check=True)
    # Python itself does not free all its memory.
    environment = os.environ | {
        "LD_PRELOAD": where,
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONPATH": TESTS,
    }
    run = subprocess.run(
        [sys.executable, "-c", SANITIZED, *built], env=environment, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr[-3000:]
