"""The WKV-4 operator, forward and backward, compared with transformers' loop, torch's scan and the memory's speed.

    python -m benchmarks wkv [--rounds 10] [--longest 16384]

First at B1 T1024 C512 in float32, as the peer uses it, each checked against the plain recurrence in float64. This
includes the kernel's levels for other CPUs, one per process. Then rwkv_pl at other sizes, compared with the lower
bound: the bytes that must be moved (forward: key, value and output; backward: key, value, the output's gradient and
both their gradients) at the speed of a large copy. The contestants take turns. Whole calls from Python are timed, with
gradients of all four inputs.
"""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import (
    Call,
    Maker,
    begin_benchmark,
    int_at_least,
    make_parser,
    print_table,
    run_once,
    save_results,
    summarize,
    summary_cells,
    take_turns,
)
from rwkv_pl.ops.backend import use_kernel
from rwkv_pl.ops.build import LEVELS, cpu_level
from rwkv_pl.ops.toolchain import find_compiler
from rwkv_pl.ops.wkv4 import wkv4

Operator = Callable[..., tuple[Tensor, Any]]
Shape = tuple[int, int, int]

CLASSIC: Shape = (1, 1024, 512)
LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
OTHERS: tuple[Shape, ...] = ((6, 256, 192), (8, 1024, 512), (64, 1024, 512))
MAX_SCAN_LENGTH = 4096

# Short calls: a turn is as many as fill this time.
SECONDS_A_TURN = 0.05


def make_inputs(
    B: int, T: int, C: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[list[Tensor], Tensor]:
    """time_decay, time_first, key and value, and the gradient of the output, of ordinary size."""
    generator = torch.Generator(device).manual_seed(0)
    shapes = [(C,), (C,), (B, T, C), (B, T, C), (B, T, C)]
    drawn = [torch.randn(shape, generator=generator, device=device) for shape in shapes]
    time_decay, time_first, key, value, grad = drawn
    return [time_decay - 1, time_first, key.to(dtype), value.to(dtype)], grad.to(dtype)


def run_both_ways(operator: Operator, arguments: list[Tensor], grad: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in arguments]
    output, _ = operator(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)]


def relative_errors(operator: Operator, arguments: list[Tensor], grad: Tensor) -> dict[str, float]:
    """|x - reference| / |reference| for the output and each gradient; the reference is the recurrence in float64."""
    with use_kernel("recurrence"):
        reference = run_both_ways(wkv4, [x.double() for x in arguments], grad.double())
    names = ["output", "time_decay", "time_first", "key", "value"]
    got = run_both_ways(operator, arguments, grad)
    return {n: ((x - y).norm() / y.norm()).item() for n, x, y in zip(names, got, reference, strict=True)}


def with_kernel(name: str) -> Operator:
    def operator(*arguments: Tensor) -> tuple[Tensor, Tensor]:
        with use_kernel(name):
            return wkv4(*arguments)

    return operator


def make_operator(name: str) -> Operator:
    """transformers, scan, or compiled LEVEL; a process can load only one level."""
    if name == "transformers":
        from transformers.models.rwkv.modeling_rwkv import rwkv_linear_attention_cpu

        return rwkv_linear_attention_cpu
    kernel, _, level = name.partition(" ")
    if level:
        os.environ["RWKV_PL_CPU_LEVEL"] = level
    return with_kernel(kernel)


def make_both_ways(name: str, shape: Shape, dtype: torch.dtype = torch.float32) -> Call:
    return partial(run_both_ways, make_operator(name), *make_inputs(*shape, dtype))


def measure_worst_error(name: str, shape: Shape) -> float:
    return max(relative_errors(make_operator(name), *make_inputs(*shape)).values())


def make_copy() -> Call:
    source = torch.randn(2**26)
    return partial(torch.empty_like(source).copy_, source)


def bytes_moved(shape: Shape, dtype: torch.dtype) -> int:
    """Bytes that forward and backward must read and write."""
    B, T, C = shape
    return 8 * B * T * C * dtype.itemsize


def measure_peers(shape: Shape, rounds: int) -> dict[str, dict[str, Any]]:
    """All implementations, at one shape."""
    levels = list(LEVELS)
    compiled = [f"compiled {level}" for level in levels[levels.index(cpu_level()) :]]
    makers: dict[str, Maker] = {
        name: partial(make_both_ways, name, shape) for name in ("transformers", "scan", *compiled)
    }
    seconds = take_turns(makers, rounds, SECONDS_A_TURN)
    rows: dict[str, dict[str, Any]] = {}
    for name, taken in seconds.items():
        rows[name] = {"seconds": summarize(taken), "worst_relative_error": run_once(measure_worst_error, name, shape)}
    best = rows[compiled[0]]["seconds"]["median"]
    lines = []
    for name, row in rows.items():
        row["times_ours"] = row["seconds"]["median"] / best
        lines.append(
            [
                name,
                *summary_cells(row["seconds"], 1e3, 3),
                f"{row['times_ours']:.2f}",
                f"{row['worst_relative_error']:.1e}",
            ]
        )
    print_table(["B{} T{} C{}, float32".format(*shape), "ms", "quartiles", "x ours", "worst error"], lines)
    return rows


def measure_sizes(shapes: list[Shape], rounds: int) -> tuple[float, list[dict[str, Any]]]:
    """Bytes per second of a copy, read and written, and a row for each shape, operator and dtype."""
    contestants = [
        (name, shape, dtype)
        for shape in shapes
        for name, dtype in (("compiled", torch.float32), ("compiled", torch.bfloat16), ("scan", torch.float32))
        if name == "compiled" or shape[0] * shape[1] <= MAX_SCAN_LENGTH
    ]
    rows: list[dict[str, Any]] = []
    bandwidths = []
    # A few at a time: each is a process.
    for shape in shapes:
        own = {str(one[:1] + one[2:]): one for one in contestants if one[1] == shape}
        makers: dict[str, Maker] = {key: partial(make_both_ways, *one) for key, one in own.items()}
        seconds = take_turns({"copy": make_copy, **makers}, rounds, SECONDS_A_TURN)
        bandwidths.append(2 * 4 * 2**26 / summarize(seconds.pop("copy"))["median"])
        for key, taken in seconds.items():
            name, _, dtype = own[key]
            floor = bytes_moved(shape, dtype) / bandwidths[-1]
            rows.append(
                {
                    "operator": name,
                    "shape": list(shape),
                    "dtype": str(dtype).removeprefix("torch."),
                    "seconds": summarize(taken),
                    "floor_seconds": floor,
                    "microseconds_a_token": 1e6 * summarize(taken)["median"] / (shape[0] * shape[1]),
                }
            )
    lines = [
        [
            "B{} T{:,} C{}".format(*row["shape"]),
            f"{row['operator']}, {row['dtype']}",
            *summary_cells(row["seconds"], 1e3, 3),
            f"{row['microseconds_a_token']:.3f}",
            f"{1e3 * row['floor_seconds']:.3f}",
        ]
        for row in rows
    ]
    bandwidth = summarize(bandwidths)["median"]
    print_table(["", "", "ms", "quartiles", "us per token", "floor, ms"], lines)
    print(f"a copy moves {bandwidth / 1e9:.1f} GB/s, read plus written; sizes that fit the caches can beat the floor")
    return bandwidth, rows


def main() -> None:
    parser = make_parser("wkv", __doc__, rounds=10)
    parser.add_argument("--longest", type=int_at_least(LENGTHS[0]), default=LENGTHS[-1], help="skip longer texts")
    options = parser.parse_args()
    title = "WKV-4 forward and backward"
    begin_benchmark(title, options.threads)
    longest = options.longest
    rows = measure_peers((1, min(longest, CLASSIC[1]), CLASSIC[2]), options.rounds)
    shapes = [(1, T, 512) for T in LENGTHS if longest >= T] + [one for one in OTHERS if one[0] * one[1] <= longest * 8]
    bandwidth, by_size = measure_sizes(shapes, options.rounds)
    compiler = find_compiler()
    save_results(
        options.results,
        "wkv",
        title,
        compiler=compiler.version if compiler else None,
        rounds=options.rounds,
        rows=rows,
        copy_bytes_per_second=bandwidth,
        by_size=by_size,
    )


if __name__ == "__main__":
    main()
