"""Memory and time of a training step as the context grows: both grow linearly.

    python -m benchmarks memory [--rounds 3] [--longest 16384]

12 x 512, one row of 128 to 16,384 tokens, bf16-mixed, with and without activation checkpointing; transformers' Rwkv up
to 1,024 tokens; then 2 x 192 with 1 to 64 rows of 1,024 tokens. Each length runs in a fresh process, which first takes
a step of a few tokens to allocate the optimizer's memory. The peak is the maximum during a step minus the memory before
it: activations, and gradients as large as the weights. Steady is the peak including later steps, which find a
fragmented heap; the time is that of the later steps. Every round measures all lengths again; the table has medians.
"""

import ctypes
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.common import (
    ContestantError,
    begin_benchmark,
    int_at_least,
    make_parser,
    print_table,
    run_once,
    save_results,
    summarize,
)
from benchmarks.train_step import SETTINGS, Setting, autocast, make_our_module, make_transformers_model, random_tokens

LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
ROWS = (1, 4, 16, 64)
LONGEST_OF_TRANSFORMERS = 1024  # each step of its loop copies the whole gradient, so the time grows with the square
STATUS = Path("/proc/self/status")


def read_megabytes(field: str) -> float:
    """VmRSS, the current memory of the process, or VmHWM, its maximum since `forget_peak`."""
    return next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith(field)) / 1024


def forget_peak() -> None:
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


# The model, its loss on a batch (B, T+1), and its optimizer.
Trained = tuple[Any, Callable[[Tensor], Tensor], torch.optim.Optimizer]


def make_ours(setting: Setting, checkpointing: bool = False) -> Trained:
    module = make_our_module(setting)
    if checkpointing:
        if not hasattr(module.model, "activation_checkpointing"):
            raise ContestantError("the model has no activation checkpointing")
        module.model.activation_checkpointing = True
    return module, lambda tokens: module.training_step(tokens, 0)["loss"], module.configure_optimizers()


def make_transformers(setting: Setting) -> Trained:
    model = make_transformers_model(setting)

    def loss(tokens: Tensor) -> Tensor:
        logits = model(tokens[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())

    return model, loss, torch.optim.Adam(model.parameters(), lr=1e-5, fused=True)


CONTESTANTS: dict[str, Callable[[Setting], Trained]] = {
    "rwkv_pl": make_ours,
    "rwkv_pl, checkpointing": partial(make_ours, checkpointing=True),
    "transformers": make_transformers,
}


def measure(contestant: str, setting: Setting, precision: str) -> dict[str, float]:
    """Megabytes: the peak of a step, the peak with later steps, the gradients in both; seconds of a later step."""
    module, loss, optimizer = CONTESTANTS[contestant](setting)

    def step(tokens: Tensor) -> None:
        with autocast(precision):
            result = loss(tokens)
        result.backward()
        optimizer.step()
        optimizer.zero_grad()

    tokens = random_tokens(setting)
    step(tokens[:1, :17])
    forget_peak()
    before = read_megabytes("VmRSS")
    step(tokens)
    peak = read_megabytes("VmHWM") - before
    if contestant != "transformers":  # one step of it takes as long as all steps of rwkv_pl
        step(tokens)
        step(tokens)
    started = time.perf_counter()
    for _ in range(steps := max(1, 2048 // tokens.numel())):
        step(tokens)
    seconds = (time.perf_counter() - started) / steps
    steady = read_megabytes("VmHWM") - before
    gradients = sum(p.numel() * p.element_size() for p in module.parameters()) / 2**20
    return {"peak_mb": peak, "steady_mb": steady, "gradients_mb": gradients, "seconds": seconds}


def growth_exponent(tokens: list[float], values: list[float]) -> float:
    """The exponent with which the values grow with the tokens, over the upper half of the sizes: 1 is linear."""
    half = len(tokens) // 2
    x, y = ([math.log(value) for value in each[half:]] for each in (tokens, values))
    return statistics.linear_regression(x, y).slope


def sweep(settings: list[Setting], contestants: list[str], precision: str, rounds: int) -> list[dict[str, Any]]:
    """A row for each contestant and setting; printed at the end."""
    taken: dict[tuple[str, Setting], list[dict[str, float]]] = {}
    left_out: set[str] = set()
    for _, setting, name in itertools.product(range(rounds), settings, contestants):
        if name in left_out or (name == "transformers" and setting.steps > LONGEST_OF_TRANSFORMERS):
            continue
        try:
            taken.setdefault((name, setting), []).append(run_once(measure, name, setting, precision))
        except ContestantError as why:
            print(f"left out: {name}: {why}", flush=True)
            left_out.add(name)
    rows = []
    for name, setting in sorted((key for key in taken if taken[key]), key=lambda key: contestants.index(key[0])):
        tokens = setting.rows * setting.steps
        figures = {key: [one[key] for one in taken[name, setting]] for key in taken[name, setting][0]}
        rows.append(
            {
                "contestant": name,
                **asdict(setting),
                "tokens": tokens,
                "peak_mb": summarize(figures["peak_mb"]),
                "steady_mb": summarize(figures["steady_mb"]),
                "gradients_mb": figures["gradients_mb"][0],
                "seconds": summarize(figures["seconds"]),
            }
        )
    lines = []
    for row in rows:
        peak, seconds, tokens = row["peak_mb"]["median"], row["seconds"]["median"], row["tokens"]
        a_token = 1024 * (peak - row["gradients_mb"]) / tokens
        steady = row["steady_mb"]["median"]
        numbers = [
            f"{peak:,.0f}",
            f"{steady:,.0f}",
            f"{a_token:,.1f}",
            f"{1e3 * seconds:,.1f}",
            f"{1e6 * seconds / tokens:,.1f}",
        ]
        lines.append([row["contestant"], f"{row['rows']} x {row['steps']:,}", *numbers])
    head = ["", "tokens", "peak MB", "steady MB", "KB per token, without gradients", "ms per step", "us per token"]
    print_table(head, lines)
    return rows


def growth_exponents(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """For each contestant with at least four sizes: exponents of memory without gradients, and of time."""
    found = {}
    for name in dict.fromkeys(row["contestant"] for row in rows):
        own = [row for row in rows if row["contestant"] == name]
        if len(own) < 4:
            continue
        tokens = [float(row["tokens"]) for row in own]
        memory = [max(row["peak_mb"]["median"] - row["gradients_mb"], 1e-3) for row in own]
        found[name] = {
            "memory": growth_exponent(tokens, memory),
            "time": growth_exponent(tokens, [r["seconds"]["median"] for r in own]),
        }
        powers = ", ".join(f"{of} {power:.2f}" for of, power in found[name].items())
        print(f"{name}: exponent of the growth with the number of tokens: {powers} (1 is linear)")
    return found


def main() -> None:
    parser = make_parser("memory", __doc__, rounds=3)
    parser.add_argument("--longest", type=int_at_least(LENGTHS[0]), default=LENGTHS[-1], help="skip longer contexts")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the program")
    options = parser.parse_args()
    if not STATUS.exists():
        sys.exit("memory is measured through /proc, which this system lacks")
    title, precision = "memory and time of a training step, bf16-mixed", "bf16-mixed"
    begin_benchmark(title, options.threads)
    classic, small = (SETTINGS["tiny" if options.tiny else name] for name in ("classic", "small"))
    lengths = [replace(classic, rows=1, steps=T) for T in LENGTHS if options.longest >= T]
    batches = [replace(small, rows=B, steps=min(1024, options.longest)) for B in ROWS]
    by_length = sweep(lengths, list(CONTESTANTS), precision, options.rounds)
    by_batch = sweep(batches, ["rwkv_pl"], precision, options.rounds)
    found = {"by_length": growth_exponents(by_length), "by_batch": growth_exponents(by_batch)}
    save_results(
        options.results, "memory", title, rounds=options.rounds, by_length=by_length, by_batch=by_batch, growth=found
    )


if __name__ == "__main__":
    main()
