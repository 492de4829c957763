"""Start-up time of each command: whole processes, compared with the bare imports of torch and lightning.

    python -m benchmarks startup [--rounds 7]

Each round runs all of them once; the first round is not counted.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.common import begin_benchmark, make_parser, print_table, save_results, summarize, summary_cells

TINY = [
    "data=text", "data.path=text.txt", "data.ctx_len=64", "model.n_layer=2", "model.n_embd=64",
    "trainer.max_steps=1", "trainer.limit_val_batches=1",
]  # fmt: skip
TRAIN = ["-m", "rwkv_pl.cli.train"]

# Like the commands in the README, with the current interpreter.
COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "import torch": ["-c", "import torch"],
    "import lightning.pytorch": ["-c", "import lightning.pytorch"],
    "import rwkv_pl": ["-c", "import rwkv_pl"],
    "rwkv-train --help": [*TRAIN, "--help"],
    "rwkv-train --cfg job": [*TRAIN, "--cfg", "job"],
    "rwkv-train, a tiny run of one step": [*TRAIN, *TINY],
    "rwkv-generate, 8 tokens of a tiny run": ["-m", "rwkv_pl.cli.generate", "run", "def ", "--max-tokens=8"],
}


def run_python(folder: Path, arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])


def main() -> None:
    options = make_parser("startup", __doc__, rounds=7).parse_args()
    title = "start to end of a command"
    begin_benchmark(title, options.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "text.txt").write_bytes(bytes(range(32, 127)) * 50)
        run_python(folder, [*TRAIN, *TINY, "hydra.run.dir=run"])
        seconds: dict[str, list[float]] = {about: [] for about in COMMANDS}
        for turn in range(options.rounds + 1):
            for about, words in COMMANDS.items():
                started = time.perf_counter()
                run_python(folder, words)
                if turn:  # the first round reads the files from the disk
                    seconds[about].append(time.perf_counter() - started)
    rows = {about: summarize(taken) for about, taken in seconds.items()}
    print_table(["", "s", "quartiles"], [[about, *summary_cells(row)] for about, row in rows.items()])
    save_results(options.results, "startup", title, rounds=options.rounds, seconds=rows)


if __name__ == "__main__":
    main()
