"""The steady state of rwkv-train and of a plain Trainer, compared with a bare loop of the same model, in turns.

    python -m benchmarks loop [--rounds 15] [--settings classic small]

One process runs the command itself and pauses between blocks of steps, in the hook that Lightning calls before each
batch. A second does the same with a script of a library user: LitRWKV and the data module in a Trainer with a CSVLogger
and without a progress bar. The third runs a plain loop with the same config's model, optimizer and batches:
training_step, backward, clipping and the optimizer step, on batches that are read beforehand. A block of each forms a
round; the ratios of their tokens per second are computed per round. Start-up, checkpoints and validations are excluded,
so the difference is the cost of every step: data loading, progress, metrics.csv and TensorBoard.
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
    "quickstart": (["experiment=quickstart"], 30),
    "tiny": (["data=stdlib", "data.ctx_len=32", "model.n_layer=2", "model.n_embd=16"], 10),  # to try the program
}
WARM_UP_BLOCKS = 2  # blocks


def pause_between_blocks(steps: int, pipe: Any) -> None:
    """Make each block of steps start when the pipe says so. What is printed goes nowhere, as into a log."""
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
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)


def run_command(overrides: list[str], steps: int, blocks: int, pipe: Any) -> None:
    """rwkv-train itself."""
    from rwkv_pl.cli.train import main

    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        length = f"trainer.max_steps={steps * (blocks + 2)}"
        sys.argv = ["rwkv-train", *overrides, length, "trainer.val_check_interval=1000000"]
        pause_between_blocks(steps, pipe)
        main()


def run_plain_trainer(overrides: list[str], steps: int, blocks: int, pipe: Any) -> None:
    """LitRWKV and the data module with the same settings, as a script uses them."""
    from lightning.pytorch import Trainer
    from lightning.pytorch.loggers import CSVLogger

    from rwkv_pl.compose import check_config, compose
    from rwkv_pl.limits import limit_threads
    from rwkv_pl.runs.inputs import open_inputs

    config = check_config(compose(overrides))
    limit_threads(1)
    inputs = open_inputs(config, Path.cwd())
    inputs.data.endless = False
    shared = ("accelerator", "precision", "gradient_clip_val", "log_every_n_steps")
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            **{name: inputs.config.trainer[name] for name in shared},
            max_steps=steps * (blocks + 2),
            limit_val_batches=0,
            logger=CSVLogger(folder),
            enable_checkpointing=False,
            enable_progress_bar=False,
        )
        pause_between_blocks(steps, pipe)
        trainer.fit(inputs.module, inputs.data)


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
    """Seconds of each contestant's blocks."""
    blocks = WARM_UP_BLOCKS + rounds
    contestants = {
        "rwkv-train": Contestant(partial(run_command, overrides, steps, blocks)),
        "plain Trainer": Contestant(partial(run_plain_trainer, overrides, steps, blocks)),
        "bare loop": Contestant(partial(run_bare_loop, overrides, steps)),
    }
    return take_blocks(contestants, blocks)


def take_blocks(contestants: dict[str, Contestant], blocks: int) -> dict[str, list[float]]:
    """Seconds of each contestant's blocks, which they take in turns; without the first ones, to warm up."""
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
    title = "The steady state of rwkv-train and of a plain Trainer, compared with a bare loop"
    begin_benchmark(title, options.threads)
    found: dict[str, Any] = {}
    lines = []
    for setting in options.settings:
        overrides, steps = SETTINGS[setting]
        seconds = measure(overrides, steps, options.rounds)
        rows = {name: summarize([taken / steps for taken in each]) for name, each in seconds.items()}
        found[setting] = {"overrides": overrides, "steps_a_block": steps, "seconds_a_step": rows, "shares": {}}
        for name, row in rows.items():
            lines.append([setting, f"{name}, ms per step", *summary_cells(row, 1e3), ""])
        for name, base in (
            ("rwkv-train", "bare loop"),
            ("plain Trainer", "bare loop"),
            ("plain Trainer", "rwkv-train"),
        ):
            ratios = [other / ours for other, ours in zip(seconds[base], seconds[name], strict=True)]
            over_all = sum(seconds[base]) / sum(seconds[name])
            found[setting]["shares"][f"{name} / {base}"] = summarize(ratios) | {"all_blocks": over_all}
            label = f"{name}, % of the tokens/s of {base}"
            lines.append([setting, label, *summary_cells(summarize(ratios), 100, 1), f"{over_all:.1%}"])
    print_table(["", "", "median", "quartiles", "all blocks"], lines)
    save_results(options.results, "loop", title, rounds=options.rounds, settings=found)


if __name__ == "__main__":
    main()
