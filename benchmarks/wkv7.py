"""The WKV-7 operator, forward and backward, compared with a matrix product, the torch forms and the package rwkv7-hf.

    python -m benchmarks wkv7 [--rounds 10] [--threads 1]

At B1 T1024 and 8 heads of 64 in float32, each checked against the plain recurrence in float64; rwkv7-hf is left out if
it is not installed. Whole calls from Python are timed, with gradients of all six inputs. The contestants take turns,
and the product of two matrices of 512 x 512 is one of them, since it says how fast the machine is at that moment.
"""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.common import (
    Call,
    Maker,
    begin_benchmark,
    make_parser,
    print_table,
    run_once,
    save_results,
    summarize,
    summary_cells,
    take_turns,
)
from rwkv_pl.ops.backend import use_kernel
from rwkv_pl.ops.heap import tune_allocator
from rwkv_pl.ops.toolchain import find_compiler
from rwkv_pl.ops.wkv7 import wkv7
from rwkv_pl.ops.wkv7_reference import DECAY_RATE

B, T, H, N = 1, 1024, 8, 64
PRODUCT = "512 x 512 x 512 product"

# Short calls: a turn is as many as fill this time.
SECONDS_A_TURN = 0.05


def make_inputs() -> tuple[list[Tensor], Tensor]:
    """The six inputs, of the sizes that they have in a model, and the gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    receptance, key, value, removed, gate, grad = torch.randn(6, B, T, H, N, generator=generator).unbind()
    decay = 8 * torch.rand(B, T, H, N, generator=generator) - 6
    a = -F.normalize(removed, dim=-1)
    return [receptance, decay, key, value, a, -a * gate.sigmoid()], grad


def run_rwkv7_hf(
    receptance: Tensor, decay: Tensor, key: Tensor, value: Tensor, a: Tensor, b: Tensor
) -> tuple[Tensor, Tensor]:
    rwkv7_recurrent = import_module("rwkv7_hf.ops_rwkv7").rwkv7_recurrent
    w = torch.exp(-DECAY_RATE * torch.sigmoid(decay))
    result: tuple[Tensor, Tensor] = rwkv7_recurrent(receptance, w, key, value, a, b, key.new_zeros(B, H, N, N))
    return result


def make_operator(name: str) -> Callable[..., tuple[Tensor, Any]]:
    """rwkv7-hf, or the name of a kernel."""
    if name == "rwkv7-hf":
        import_module("rwkv7_hf.ops_rwkv7")  # an error here leaves it out
        return run_rwkv7_hf

    def operator(*arguments: Tensor) -> tuple[Tensor, Tensor]:
        with use_kernel(name):
            return wkv7(*arguments)

    return operator


def run_both_ways(operator: Callable[..., tuple[Tensor, Any]], arguments: list[Tensor], grad: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in arguments]
    output, _ = operator(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)]


def make_both_ways(name: str, dtype: torch.dtype) -> Call:
    tune_allocator()  # else page faults of the results take as long as the operator
    arguments, grad = make_inputs()
    cast = [x if i == 1 else x.to(dtype) for i, x in enumerate(arguments)]
    return partial(run_both_ways, make_operator(name), cast, grad.to(dtype))


def make_product() -> Call:
    left, right = torch.randn(2, 512, 512).unbind()
    return partial(torch.mm, left, right)


def measure_worst_error(name: str) -> float:
    """max |x - reference| / max |reference|, the worst of the output and the gradients."""
    arguments, grad = make_inputs()
    reference = run_both_ways(make_operator("recurrence"), [x.double() for x in arguments], grad.double())
    got = run_both_ways(make_operator(name), arguments, grad)
    return max(float((x - y).abs().max() / y.abs().max()) for x, y in zip(got, reference, strict=True))


def main() -> None:
    options = make_parser("wkv7", __doc__, rounds=10).parse_args()
    title = "WKV-7 forward and backward"
    begin_benchmark(title, options.threads)
    contestants = [("compiled", torch.float32), ("compiled", torch.bfloat16)]
    contestants += [(name, torch.float32) for name in ("scan", "recurrence", "rwkv7-hf")]
    makers: dict[str, Maker] = {PRODUCT: make_product}
    for name, dtype in contestants:
        makers[f"{name}, {str(dtype).removeprefix('torch.')}"] = partial(make_both_ways, name, dtype)
    seconds = take_turns(makers, options.rounds, SECONDS_A_TURN)
    rows: dict[str, dict[str, Any]] = {}
    lines = []
    for name, taken in seconds.items():
        ratio = summarize([x / product for x, product in zip(taken, seconds[PRODUCT], strict=True)])
        rows[name] = {"seconds": summarize(taken), "products": ratio}
        kernel, _, dtype_name = name.partition(", ")
        if dtype_name == "float32":
            rows[name]["worst_error"] = run_once(measure_worst_error, kernel)
        error = f"{rows[name]['worst_error']:.1e}" if "worst_error" in rows[name] else ""
        lines.append([name, *summary_cells(rows[name]["seconds"], 1e3), *summary_cells(ratio), error])
    print_table([f"B{B} T{T} H{H}", "ms", "quartiles", "products", "quartiles", "worst error"], lines)
    compiler = find_compiler()
    save_results(
        options.results,
        "wkv7",
        title,
        compiler=compiler.version if compiler else None,
        rounds=options.rounds,
        rows=rows,
    )


if __name__ == "__main__":
    main()
