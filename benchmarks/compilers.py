"""Every operator of the CPU kernel, built by zig compared with the build of the system's compiler, in turns.

    python -m benchmarks compilers [--rounds 15]

One sequence of 1,024 tokens x 512 channels in float32, a vocabulary of 256; the step for one token has 4 layers, with
weights in bfloat16. Only zig from the package ziglang takes part. The ratio is that of two calls in the same round.
"""

import os
from functools import partial
from typing import Any

import torch

from benchmarks.common import (
    Call,
    Maker,
    begin_benchmark,
    make_parser,
    print_table,
    save_results,
    summarize,
    summary_cells,
    take_turns,
)
from benchmarks.generate import random_model
from rwkv_pl.model import MODELS
from rwkv_pl.ops.backend import KernelError, load_all
from rwkv_pl.ops.heap import tune_allocator
from rwkv_pl.ops.linear import cast_linear_weights
from rwkv_pl.ops.toolchain import find_compiler, find_zig

B, T, C, V, TILE = 1, 1024, 512, 256, 32
SECONDS_A_TURN = 0.02


def make_calls() -> dict[str, Call]:
    """A call of each operator, after the kernel is loaded."""
    ops: Any = torch.ops.rwkv_pl
    torch.manual_seed(0)
    x, key, value, grad = (torch.randn(B, T, C) for _ in range(4))
    channel = [torch.randn(C) for _ in range(2)]
    tiles = ops.wkv4_forward(*channel, key, value, None, TILE)[2]
    weight, mixes = torch.randn(C), [torch.rand(C) for _ in range(3)]
    norm = (x, weight, weight, mixes, None)
    mean_rstd = ops.norm_token_shift(*norm, 1e-5, False)[2]
    logits, targets = torch.randn(T, V), torch.randint(V, (T,))
    nats, *saved = ops.cross_entropy(logits, targets)
    token, parameters = torch.zeros(1, dtype=torch.int64), {}
    for version in MODELS:
        model = random_model(layers=4, version=version)
        cast_linear_weights(model, torch.bfloat16)
        parameters[version] = list(model.parameters())
    return {
        "wkv4_forward": lambda: ops.wkv4_forward(*channel, key, value, None, TILE),
        "wkv4_backward": lambda: ops.wkv4_backward(*channel, key, value, tiles, grad, None, TILE),
        "norm_token_shift": lambda: ops.norm_token_shift(*norm, 1e-5, False),
        "norm_token_shift_backward": lambda: ops.norm_token_shift_backward(*norm, mean_rstd, [grad] * 3, grad, None),
        "squared_relu_": lambda: ops.squared_relu_(x.clone()),
        "squared_relu_backward_": lambda: ops.squared_relu_backward_(grad.clone(), x),
        "gate": lambda: ops.gate(x, key, value),
        "gate_backward": lambda: ops.gate_backward(grad, x, key),
        "cross_entropy": lambda: ops.cross_entropy(logits, targets),
        "cross_entropy_backward": lambda: ops.cross_entropy_backward(logits, targets, *saved, nats, nats),
        "rwkv4_step": lambda: ops.rwkv4_step(parameters["rwkv4"], token, []),
        "rwkv7_step": lambda: ops.rwkv7_step(parameters["rwkv7"], token, []),
    }


def make_call(command: str, operator: str) -> Call:
    """The operator, from the kernel that this compiler builds."""
    os.environ["CXX"] = command
    tune_allocator()  # else page faults of the results can take longer than the operator
    failure = load_all("cpu")
    if failure:
        raise KernelError("compilers", failure)
    return make_calls()[operator]


def main() -> None:
    options = make_parser("compilers", __doc__, rounds=15).parse_args()
    title = "The CPU kernel's operators, by compiler"
    begin_benchmark(title, options.threads)
    system, zig = find_compiler(), find_zig()
    if system is None or zig is None or system.is_zig:
        raise SystemExit("it needs a system compiler and the package ziglang")
    print(f"{system.title}, {zig.title}")
    commands = {"system": system.command, "zig": zig.command}
    rows, lines = [], []
    load_all("cpu")
    for operator in make_calls():
        makers: dict[str, Maker] = {name: partial(make_call, command, operator) for name, command in commands.items()}
        seconds = take_turns(makers, options.rounds, SECONDS_A_TURN)
        ratio = summarize([z / s for z, s in zip(seconds["zig"], seconds["system"], strict=True)])
        both = {name: summarize(taken) for name, taken in seconds.items()}
        rows.append({"operator": operator, "seconds": both, "zig_to_system": ratio})
        lines.append([operator, *(f"{1e3 * one['median']:.3f}" for one in both.values()), *summary_cells(ratio)])
    print_table(["", "system, ms", "zig, ms", "ratio", "quartiles"], lines)
    save_results(
        options.results, "compilers", title, compilers=[system.version, zig.title], rounds=options.rounds, rows=rows
    )


if __name__ == "__main__":
    main()
