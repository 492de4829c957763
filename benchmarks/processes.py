"""Tokens per second of rwkv-train in two processes of one thread, compared with one process of two threads, in turns.

    python -m benchmarks processes [--rounds 15] [--settings small]

The commands pause between blocks of steps, as in the benchmark `loop`; a block of each forms a round. All have the same
number of tokens in a step, half of them in each of two processes. Start-up, checkpoints and validations are excluded.
"""

import os
from functools import partial
from typing import Any

import torch

from benchmarks.common import (
    Contestant,
    begin_benchmark,
    make_parser,
    print_table,
    save_results,
    summarize,
    summary_cells,
)
from benchmarks.loop import WARM_UP_BLOCKS, run_command, take_blocks

# For each setting: rwkv-train's overrides and the number of steps in a block.
SETTINGS: dict[str, tuple[list[str], int]] = {
    "small": (["data.ctx_len=512", "data.batch_size=2", "model.n_layer=6", "model.n_embd=256"], 10),
    "long": (["data.ctx_len=1024", "data.batch_size=8", "model.n_layer=6", "model.n_embd=256"], 2),
    "tiny": (["data.ctx_len=32", "data.batch_size=2", "model.n_layer=2", "model.n_embd=16"], 10),  # to try the program
}
# Overrides and the threads of each process. The first is the one that the others are compared with.
CONTESTANTS: dict[str, tuple[list[str], int]] = {
    "one process, 2 threads": ([], 2),
    "ddp, 2 processes": (["trainer=ddp", "trainer.devices=2"], 1),
    "fsdp, 2 processes": (["trainer=fsdp", "trainer.devices=2"], 1),
}


def run_processes(overrides: list[str], threads: int, steps: int, blocks: int, pipe: Any) -> None:
    """rwkv-train with this number of threads in each of its processes."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
    run_command(overrides, steps, blocks, pipe)


def measure(overrides: list[str], steps: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each contestant's blocks."""
    blocks = WARM_UP_BLOCKS + rounds
    contestants = {
        name: Contestant(partial(run_processes, ["data=stdlib", *overrides, *extra], threads, steps, blocks))
        for name, (extra, threads) in CONTESTANTS.items()
    }
    return take_blocks(contestants, blocks)


def main() -> None:
    parser = make_parser("processes", __doc__, rounds=15)
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=["small", "long"])
    options = parser.parse_args()
    title = "Two processes of one thread, compared with one of two threads"
    begin_benchmark(title, options.threads)
    found: dict[str, Any] = {}
    lines = []
    for setting in options.settings:
        overrides, steps = SETTINGS[setting]
        seconds = measure(overrides, steps, options.rounds)
        one = next(iter(seconds.values()))
        found[setting] = {"overrides": overrides, "steps_a_block": steps, "seconds_a_step": {}, "shares": {}}
        for name, taken in seconds.items():
            row = found[setting]["seconds_a_step"][name] = summarize([each / steps for each in taken])
            share = found[setting]["shares"][name] = summarize([a / b for a, b in zip(one, taken, strict=True)])
            lines.append([setting, name, f"{1e3 * row['median']:.1f}", *summary_cells(share)])
    print_table(["", "", "step, ms", "tokens/s", "quartiles"], lines)
    save_results(options.results, "processes", title, rounds=options.rounds, settings=found)


if __name__ == "__main__":
    main()
