"""How long a checkpoint blocks training and a resume takes, at the classic setting (12 x 512, 1 x 1,024 bytes, Adam).

    python -m benchmarks checkpoint [--rounds 5]

Both are measured in the command itself, on the standard library's text. A save blocks from the last instruction of the
training to its next: collecting the state, flushing logs and file to the disk, renaming the file. A resume is timed
from the command's first line to the first optimizer step; the imports are reported separately.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import begin_benchmark, make_parser, save_results, summarize

SETTINGS = ("data=stdlib", "trainer.limit_val_batches=1", "trainer.log_every_n_steps=1")

# Runs in a separate process: the imports, then the command, with timestamps.
CHILD = """
import json, sys, time
began = time.perf_counter()
import rwkv_pl.cli.train, rwkv_pl.runs.train, rwkv_pl.training.callbacks.metrics, rwkv_pl.training.callbacks.signals
import rwkv_pl.training.callbacks.progress, rwkv_pl.training.callbacks.sample_text
import torch.utils.tensorboard, tensorboard.backend
imported = time.perf_counter()
from rwkv_pl.training.callbacks.checkpoints import LastCheckpoint
from rwkv_pl.training.module import LitRWKV
blocked, steps, whole, step = [], [], LastCheckpoint.save_now, LitRWKV.on_train_batch_start
def save_now(self, trainer):
    started = time.perf_counter()
    whole(self, trainer)
    blocked.append(time.perf_counter() - started)
def on_train_batch_start(self, batch, batch_idx):
    steps.append(time.perf_counter())
    step(self, batch, batch_idx)
LastCheckpoint.save_now, LitRWKV.on_train_batch_start = save_now, on_train_batch_start
sys.argv = ["rwkv-train", *sys.argv[2:]]
started = time.perf_counter()
rwkv_pl.cli.train.main()
times = {"imports": imported - began, "to_first_step": steps[0] - started, "blocked": blocked, "steps": steps}
open("times.json", "w").write(json.dumps(times))
"""


def run_command(folder: Path, *arguments: str) -> dict[str, Any]:
    """Run rwkv-train in `folder`; return its times in seconds."""
    subprocess.run([sys.executable, "-c", CHILD, "-", *arguments], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return json.loads((folder / "times.json").read_text())


def main() -> None:
    options = make_parser("checkpoint", __doc__, rounds=5).parse_args()
    saves, title = options.rounds, "a checkpoint at the classic setting"
    begin_benchmark(title, options.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        every = "callbacks.last.every_n_train_steps=3"
        first = run_command(folder, *SETTINGS, every, f"trainer.max_steps={3 * saves}", "hydra.run.dir=run")
        size = (folder / "run" / "checkpoints" / "last.ckpt").stat().st_size
        longer = [f"trainer.max_steps={3 * saves + more}" for more in (1, 2, 3)]
        resumed = [run_command(folder, "resume=run", length)["to_first_step"] for length in longer]
        fresh = [run_command(folder, *SETTINGS, "trainer.max_steps=1")["to_first_step"] for _ in range(3)]
        started = time.perf_counter()
        (folder / "copy").write_bytes((folder / "run" / "checkpoints" / "last.ckpt").read_bytes())
        copied = time.perf_counter() - started
    steps = [b - a for a, b in zip(first["steps"], first["steps"][1:], strict=False)]
    step, blocked = statistics.median(steps), summarize(first["blocked"])
    share = blocked["median"] / (1000 * step + blocked["median"])
    to_first_step = {"resumed": statistics.median(resumed), "fresh": statistics.median(fresh)}
    print(
        f"\n{size / 1e6:,.0f} MB, blocks for {blocked['median']:.2f} s ({blocked['min']:.2f} to {blocked['max']:.2f}); "
        f"a step takes {step:.2f} s: saving every 1,000 steps takes {share:.2%} of the time\n"
        f"time to the first step: resumed {to_first_step['resumed']:.2f} s, fresh {to_first_step['fresh']:.2f} s, plus "
        f"{first['imports']:.2f} s for the imports; copying the file takes {copied:.2f} s"
    )
    save_results(
        options.results,
        "checkpoint",
        title,
        checkpoint_bytes=size,
        seconds_blocked=blocked,
        seconds_a_step=step,
        share_of_time_every_1000_steps=share,
        seconds_of_imports=first["imports"],
        seconds_to_first_step=to_first_step,
        seconds_to_copy_the_file=copied,
    )


if __name__ == "__main__":
    main()
