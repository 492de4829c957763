"""The WKV-4 operator on a GPU, compared with public kernels and with the memory's own speed.

    python -m benchmarks wkv_gpu [--rounds 15] [--tiles]

Each contestant's calls are captured in a CUDA graph, and the GPU itself times its replays, so the overhead of Python is
excluded. Contestants take turns; the table has medians. `bandwidth` is the bytes that a call must move (forward: key,
value and output; backward: key, value, the output's gradient and both their gradients) over the time, relative to the
faster of two large copies in the same run. --tiles also times every tile at many shapes; `_tile` in rwkv_pl/ops/wkv4.py
was chosen from that. Writes benchmarks/results/wkv_gpu.json.

Two of the peers need fla-core and nvcc; a peer that is not available is left out and named.
"""

import ctypes
import statistics
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import common
from benchmarks.wkv import make_inputs, relative_errors, with_kernel
from rwkv_pl.ops.backend import load
from rwkv_pl.ops.toolchain import find_nvcc
from rwkv_pl.ops.wkv4 import LONG_SCAN, SCAN, WALK, _choose_tile, wkv4

SHAPES = [
    (1, 1024, 512, torch.float32),
    (64, 1024, 768, torch.bfloat16),
    (64, 1024, 768, torch.float32),
    (1, 65536, 512, torch.float32),
    (1, 65536, 512, torch.bfloat16),
    (8, 1024, 768, torch.bfloat16),
]
TILES = (WALK, SCAN, LONG_SCAN)

Work = Callable[[], Any]


def capture_graph(work: Work, calls: int) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            work()
    return graph


def measure_microseconds(works: dict[str, Work], rounds: int = 15, calls: int = 10) -> dict[str, float]:
    """The median time of each contestant's call, in turns; calls of more than 20 ms are made once per round."""
    graphs, counts = {}, {}
    for name, work in works.items():
        work()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        counts[name] = calls if start.elapsed_time(end) < 20 else 1
        graphs[name] = capture_graph(work, counts[name])
    taken: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(rounds + 2):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if turn > 1:
                taken[name].append(1e3 * start.elapsed_time(end) / counts[name])
    return {name: statistics.median(times) for name, times in taken.items()}


def measure_copy_bandwidth() -> dict[str, float]:
    """Bytes per second, read and written, of a large copy: by the driver, and by a kernel that reads and writes."""
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    copies: dict[str, Work] = {
        "driver": lambda: target.copy_(source),
        "kernel": lambda: torch.mul(source, 1, out=target),
    }
    return {name: 8e6 * source.numel() / taken for name, taken in measure_microseconds(copies, calls=3).items()}


def make_ours(arguments: list[Tensor], grad: Tensor, tile: int) -> tuple[Work, Work]:
    """The forward and the backward operator separately."""
    _, _, saved = torch.ops.rwkv_pl.wkv4_forward(*arguments, None, tile)
    return (
        lambda: torch.ops.rwkv_pl.wkv4_forward(*arguments, None, tile),
        lambda: torch.ops.rwkv_pl.wkv4_backward(*arguments, saved, grad, None, tile),
    )


def make_autograd(operator: Callable[..., tuple[Tensor, Any]], arguments: list[Tensor], grad: Tensor) -> Work:
    leaves = [x.detach().requires_grad_() for x in arguments]
    return lambda: torch.autograd.grad(operator(*leaves)[0], leaves, grad)


def flash_linear_attention() -> Callable[..., tuple[Tensor, Tensor]] | str:
    """The peer's operator, tried once; or a line that says why it cannot be used."""

    def operator(time_decay: Tensor, time_first: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        from fla.ops.rwkv4 import fused_recurrent_rwkv4  # type: ignore[import-not-found]

        state = key.new_zeros(key.shape[0], 3, 1, key.shape[2])
        state[:, 2] = -1e38
        return fused_recurrent_rwkv4(time_decay, time_first, key, value, state)

    try:
        make_autograd(operator, *make_inputs(1, 2, 32, torch.float32, "cuda"))()
    except Exception as error:  # Triton compiles it with tools that may be missing
        return f"fla-core cannot be used: {error}".splitlines()[0]
    return operator


class ClassicKernels:
    """benchmarks/classic_wkv4.cu through ctypes."""

    def __init__(self) -> None:
        nvcc = find_nvcc(str(torch.version.cuda))
        if nvcc is None:
            raise RuntimeError("no nvcc")
        folder = Path(tempfile.mkdtemp())
        source, library = Path(__file__).parent / "classic_wkv4.cu", folder / "classic.so"
        chip = "{}{}".format(*torch.cuda.get_device_capability())
        command = [nvcc.path, "-O3", "--use_fast_math", f"-arch=sm_{chip}", "-Xcompiler", "-fPIC", "-shared"]
        subprocess.run([*command, str(source), "-o", str(library)], check=True)
        self.library = ctypes.CDLL(str(library))

    def works(self, arguments: list[Tensor], grad: Tensor) -> tuple[Work, Work]:
        B, T, C = grad.shape
        output, grad_key, grad_value = (torch.empty_like(grad) for _ in range(3))
        shares = [torch.empty(B, C, device="cuda") for _ in range(2)]

        def call(function: Any, *tensors: Tensor) -> None:
            stream = torch.cuda.current_stream().cuda_stream
            function(B, T, C, *(ctypes.c_void_p(x.data_ptr()) for x in tensors), ctypes.c_void_p(stream))

        return (
            lambda: call(self.library.classic_forward, *arguments, output),
            lambda: call(self.library.classic_backward, *arguments, output, grad, *shares, grad_key, grad_value),
        )


def main() -> None:
    parser = common.make_parser("wkv_gpu", __doc__, rounds=15)
    parser.add_argument("--tiles", action="store_true", help="also time every tile at many shapes")
    options = parser.parse_args()
    if failure := load("wkv4", "cuda"):
        parser.error(failure)
    title = "WKV-4 on a GPU"
    common.begin_benchmark(title, options.threads)

    copies = measure_copy_bandwidth()
    bandwidth = max(copies.values())
    about = common.describe_machine() | common.describe_gpu() | {"copy_bytes_per_second": copies}
    print(f"{about['gpu']}, CUDA {about['cuda']}")
    print("a copy moves " + ", ".join(f"{x / 1e12:.2f} TB/s ({name})" for name, x in copies.items()) + "\n")
    left_out = []
    peer = flash_linear_attention()
    if isinstance(peer, str):
        left_out.append(peer)
    try:
        classic = ClassicKernels()
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        classic = None
        left_out.append(f"the classic kernel cannot be built: {error}")

    rows = []
    for B, T, C, dtype in SHAPES:
        arguments, grad = make_inputs(B, T, C, dtype, "cuda")
        moved = B * T * C * grad.element_size()
        tile = _choose_tile(arguments[2])
        forward, backward = make_ours(arguments, grad, tile)
        works = {"forward": forward, "backward": backward, "forward + backward": make_autograd(wkv4, arguments, grad)}
        small = B * T * C < 2**22
        if not isinstance(peer, str):
            works["fla-core fused_recurrent_rwkv4"] = make_autograd(peer, arguments, grad)
        if small:
            if classic:
                works["classic forward"], works["classic backward"] = classic.works(arguments, grad)
            works["scan in torch"] = make_autograd(with_kernel("scan"), arguments, grad)
        times = measure_microseconds(works, options.rounds)
        row: dict[str, Any] = {"shape": [B, T, C], "dtype": str(dtype), "tile": tile, "microseconds": times}
        row["bandwidth"] = {
            "forward": 3e6 * moved / times["forward"] / bandwidth,
            "backward": 5e6 * moved / times["backward"] / bandwidth,
        }
        if small:
            row["relative_error"] = relative_errors(wkv4, arguments, grad)
        rows.append(row)
        print(f"B{B} T{T} C{C} {str(dtype).removeprefix('torch.')}, tile {tile}")
        for name, taken in times.items():
            share = f"{row['bandwidth'][name]:8.0%} of the copy" if name in row["bandwidth"] else ""
            print(f"    {name:34}{taken:12.1f} us{share}")
        if small:
            print("    relative error " + ", ".join(f"{k} {v:.1e}" for k, v in row["relative_error"].items()))
        del arguments, grad, works, forward, backward
        torch.cuda.empty_cache()

    report: dict[str, Any] = {"machine": about, "rounds": options.rounds, "rows": rows, "left_out": left_out}
    if options.tiles:
        report["tiles"] = measure_tiles()
    for line in left_out:
        print(line)
    common.save_results(options.results, "wkv_gpu", title, **report)


def measure_tiles() -> list[dict[str, Any]]:
    rows = []
    print(f"\n{'forward / backward, us':32}" + "".join(f"{tile:>18}" for tile in TILES))
    for dtype in (torch.float32, torch.bfloat16):
        for channels, T in [
            (512, 64), (512, 256), (512, 1024), (2048, 256), (2048, 1024), (8192, 64), (8192, 256), (8192, 1024),
            (16384, 1024), (32768, 256), (32768, 1024), (65536, 256), (512, 8192), (4096, 8192),
        ]:  # fmt: skip
            B, C = max(1, channels // 512), 512
            arguments, grad = make_inputs(B, T, C, dtype, "cuda")
            works = {}
            for tile in TILES:
                works[f"{tile} forward"], works[f"{tile} backward"] = make_ours(arguments, grad, tile)
            times = measure_microseconds(works, rounds=5, calls=3)
            rows.append({"shape": [B, T, C], "dtype": str(dtype), "microseconds": times})
            cells = (f"{times[f'{tile} forward']:8.1f} / {times[f'{tile} backward']:7.1f}" for tile in TILES)
            print(f"{f'B{B} T{T} C{C} ' + str(dtype).removeprefix('torch.'):32}" + "".join(cells))
    return rows


if __name__ == "__main__":
    main()
