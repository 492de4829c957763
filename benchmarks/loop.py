"""rwkv-train's steady state compared with a bare loop of the same model, in turns.

    python -m benchmarks loop [--rounds 15] [--settings classic small]

One process runs the command itself and pauses between blocks of steps, in the hook that Lightning calls before each
batch. The other runs a plain loop with the same config's model, optimizer and batches: training_step, backward,
clipping and the optimizer step, on batches that are read beforehand. One block of each forms a pair; the ratio of their
tokens per second is computed per pair. Start-up, checkpoints and validations are excluded, so the difference is the
cost of every step: data loading, progress, metrics.csv and TensorBoard.
"""

import os
import sys
import tempfile
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
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

# For each setting: rwkv-train's overrides and the number of steps in a block.
SETTINGS: dict[str, tuple[list[str], int]] = {
    "classic": (["data=stdlib"], 2),
    "small": (["experiment=quickstart", "model.n_embd=192"], 20),
    "tiny": (["data=stdlib", "data.ctx_len=32", "model.n_layer=2", "model.n_embd=16"], 10),  # to try the program
}
WARM_UP_BLOCKS = 2  # blocks


def run_command(overrides: list[str], steps: int, blocks: int, pipe: Any) -> None:
    """Run rwkv-train; each block starts when the pipe says so."""
    from rwkv_pl.cli.train import main
    from rwkv_pl.training.module import LitRWKV

    before_each = LitRWKV.on_train_batch_start
    started = time.perf_counter()

    def on_train_batch_start(self: LitRWKV, batch: Any, batch_idx: int) -> None:
        nonlocal started
        if batch_idx % steps == 0:
            pipe.send(time.perf_counter() - started)
            pipe.recv()
            started = time.perf_counter()
        before_each(self, batch, batch_idx)

    LitRWKV.on_train_batch_start = on_train_batch_start  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder, Path(os.devnull).open("w") as nowhere:
        os.chdir(folder)
        sys.argv = ["rwkv-train", *overrides, f"trainer.max_steps={steps * (blocks + 2)}"]
        # The progress is written as into a log, and nobody reads it.
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
        main()


def run_bare_loop(overrides: list[str], steps: int, pipe: Any) -> None:
    """The same steps in a plain loop."""
    from rwkv_pl.compose import check_config, compose
    from rwkv_pl.runs.inputs import open_inputs
    from rwkv_pl.runs.train import prepare_process

    config = check_config(compose(overrides))
    prepare_process(config)
    inputs = open_inputs(config, Path.cwd())
    trainer, module = config.trainer, inputs.module
    module.configure_model()
    module.train()
    optimizer = module.configure_optimizers()
    dataset = inputs.data.train_dataloader().dataset
    batches = [dataset[i] for i in range(steps)]
    pipe.send("ready")
    while True:
        pipe.recv()
        started = time.perf_counter()
        for batch in batches:
            mixed = trainer["precision"] == "bf16-mixed"
            with torch.autocast("cpu", torch.bfloat16) if mixed else nullcontext():
                loss = module.training_step(batch, 0)["loss"]
            loss.backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), trainer["gradient_clip_val"])
            optimizer.step()
            optimizer.zero_grad()
        pipe.send(time.perf_counter() - started)


def measure(overrides: list[str], steps: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each block."""
    blocks = WARM_UP_BLOCKS + rounds
    contestants = {
        "rwkv-train": Contestant(partial(run_command, overrides, steps, blocks)),
        "bare loop": Contestant(partial(run_bare_loop, overrides, steps)),
    }
    try:
        for contestant in contestants.values():
            contestant.answer()
        turns = [{name: contestant.ask() for name, contestant in contestants.items()} for _ in range(blocks)]
    finally:
        for contestant in contestants.values():
            contestant.stop()
    return {name: [turn[name] for turn in turns[WARM_UP_BLOCKS:]] for name in contestants}


def main() -> None:
    parser = make_parser("loop", __doc__, rounds=15)
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=["classic", "small"])
    options = parser.parse_args()
    title = "rwkv-train's steady state compared with a bare loop"
    begin_benchmark(title, options.threads)
    found, lines = {}, []
    for setting in options.settings:
        overrides, steps = SETTINGS[setting]
        seconds = measure(overrides, steps, options.rounds)
        ratios = [bare / ours for bare, ours in zip(seconds["bare loop"], seconds["rwkv-train"], strict=True)]
        rows = {name: summarize([taken / steps for taken in each]) for name, each in seconds.items()}
        found[setting] = {
            "overrides": overrides,
            "steps_a_block": steps,
            "seconds_a_step": rows,
            "share_of_the_bare_loop": summarize(ratios),
            "share_over_all_blocks": sum(seconds["bare loop"]) / sum(seconds["rwkv-train"]),
        }
        for name, row in rows.items():
            lines.append([setting, f"{name}, ms per step", *summary_cells(row, 1e3), ""])
        whole = f"{found[setting]['share_over_all_blocks']:.1%}"
        lines.append([setting, "% of the bare loop's tokens/s", *summary_cells(summarize(ratios), 100, 1), whole])
    print_table(["", "", "median", "quartiles", "all blocks"], lines)
    save_results(options.results, "loop", title, rounds=options.rounds, settings=found)


if __name__ == "__main__":
    main()
