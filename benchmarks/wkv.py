"""The WKV-4 operator, forward and backward, beside transformers' loop on the CPU.

    python -m benchmarks.wkv [--rounds N] [--threads N]

At B1 T1024 C512 in float32, as the peer is used: checked against the plain recurrence in float64 first, then timed.
The contestants take turns, one call each a round, so that a change of the machine's mood meets all of them; medians
and quartiles are of whole calls from Python, gradients of all four inputs included. The kernel's other CPU levels run
in processes of their own, since a process holds one library. Writes benchmarks/results/wkv.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import in_words, machine
from rwkv_pl.ops.build import LEVELS, cpu_level
from rwkv_pl.ops.toolchain import find_compiler
from rwkv_pl.ops.wkv4 import use_kernel, wkv4

B, T, C = 1, 1024, 512
RESULTS = Path(__file__).parent / "results" / "wkv.json"

Operator = Callable[..., tuple[Tensor, Any]]


def inputs(
    B: int, T: int, C: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[list[Tensor], Tensor]:
    """time_decay, time_first, key and value, and the gradient in the output, of ordinary size."""
    generator = torch.Generator(device).manual_seed(0)
    shapes = [(C,), (C,), (B, T, C), (B, T, C), (B, T, C)]
    drawn = [torch.randn(shape, generator=generator, device=device) for shape in shapes]
    time_decay, time_first, key, value, grad = drawn
    return [time_decay - 1, time_first, key.to(dtype), value.to(dtype)], grad.to(dtype)


def call(operator: Operator, arguments: list[Tensor], grad: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in arguments]
    output, _ = operator(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)]


def errors(operator: Operator, arguments: list[Tensor], grad: Tensor) -> dict[str, float]:
    """|x - judge| / |judge| for the output and each gradient, the judge being the recurrence in float64."""
    with use_kernel("recurrence"):
        judge = call(wkv4, [x.double() for x in arguments], grad.double())
    names = ["output", "time_decay", "time_first", "key", "value"]
    got = call(operator, arguments, grad)
    return {n: ((x - y).norm() / y.norm()).item() for n, x, y in zip(names, got, judge, strict=True)}


def timings(operators: dict[str, Operator], rounds: int, repeats: dict[str, int]) -> dict[str, list[float]]:
    """Seconds of each call; an operator with repeats makes so many calls a round."""
    arguments, grad = inputs(B, T, C)
    seconds: dict[str, list[float]] = {name: [] for name in operators}
    for turn in range(rounds + 1):
        for name, operator in operators.items():
            for _ in range(repeats.get(name, 1)):
                start = time.perf_counter()
                call(operator, arguments, grad)
                # The first round builds, loads and warms up.
                if turn > 0:
                    seconds[name].append(time.perf_counter() - start)
    return seconds


def summary(seconds: list[float], error: dict[str, float]) -> dict[str, Any]:
    low, median, high = statistics.quantiles(seconds, n=4)
    return {"median_s": median, "quartiles_s": [low, high], "calls": len(seconds), "relative_error": error}


def with_kernel(name: str) -> Operator:
    def operator(*arguments: Tensor) -> tuple[Tensor, Tensor]:
        with use_kernel(name):
            return wkv4(*arguments)

    return operator


def one_level(rounds: int) -> dict[str, Any]:
    operator = with_kernel("compiled")
    return summary(
        timings({"compiled": operator}, rounds, {"compiled": 20})["compiled"], errors(operator, *inputs(B, T, C))
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.wkv", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--one-level", action="store_true", help="only the kernel, as JSON: how the levels are run")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.one_level:
        print(json.dumps(one_level(options.rounds)))
        return

    from transformers.models.rwkv.modeling_rwkv import rwkv_linear_attention_cpu

    best = cpu_level()
    operators: dict[str, Operator] = {
        "transformers": rwkv_linear_attention_cpu,
        "scan": with_kernel("scan"),
        f"compiled {best}": with_kernel("compiled"),
    }
    seconds = timings(operators, options.rounds, {f"compiled {best}": 20})
    rows = {name: summary(seconds[name], errors(operator, *inputs(B, T, C))) for name, operator in operators.items()}
    command = [sys.executable, "-m", "benchmarks.wkv", "--one-level", f"--threads={options.threads}", "--rounds=10"]
    for level in list(LEVELS)[list(LEVELS).index(best) + 1 :]:
        run = subprocess.run(command, env=os.environ | {"RWKV_PL_CPU_LEVEL": level}, stdout=subprocess.PIPE, check=True)
        rows[f"compiled {level}"] = json.loads(run.stdout)

    compiler = find_compiler()
    peer = rows["transformers"]["median_s"]
    rows = {name: row | {"times_transformers": peer / row["median_s"]} for name, row in rows.items()}
    about = machine()
    report = {
        "what": f"WKV-4 forward and backward, B{B} T{T} C{C}, float32",
        "machine": about,
        "compiler": compiler.version if compiler else None,
        "rows": rows,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(report, indent=2) + "\n")

    print(f"{report['what']}\n{in_words(about)}\n")
    print(f"{'':<22}{'median':>11}{'quartiles':>22}{'speed':>9}{'worst error':>13}")
    for name, row in rows.items():
        low, high = (1e3 * x for x in row["quartiles_s"])
        worst = max(row["relative_error"].values())
        print(
            f"{name:<22}{1e3 * row['median_s']:>8.3f} ms{low:>10.3f} to {high:>5.3f} ms"
            f"{row['times_transformers']:>8.0f}x{worst:>13.1e}"
        )


if __name__ == "__main__":
    main()
