"""Measure a GPU in one command, within nine minutes: tests, speed, memory, peers, bit-exact resume.

    python -m benchmarks gpu [--parts step wkv] [--budget 540]
    python -m benchmarks gpu --device cpu --tiny     tries the program where there is no GPU

Prints a table, and rewrites benchmarks/results/gpu_NAME.json (the GPU's name) after each run. The most valuable runs
come first. Each run has a separate process and a time limit. A run that fails, times out, lacks its tool or peer, or
finds no time left is a row with the reason.

    kernels     the build, and `pytest -m gpu`
    step        a training step of 12 x 512 on 1,024 tokens by rwkv-train, batch 1: time, peak memory, MFU; with
                compile=true; a plain loop's step in a CUDA graph; transformers' Rwkv, eager
    batch       the same at batch 64
    resume      SIGTERM, then resume=, with trainer.deterministic=true: are the checkpoints bit-identical?
    wkv         the benchmark wkv_gpu
    profile     a step's time by parts, and how long the GPU is idle
    generate    greedy tokens per second
    doctor      rwkv-doctor
    sanitizer   compute-sanitizer's memcheck and racecheck on small shapes

In float32, matrix products use TF32, rwkv-train's default.

A bare machine has Python 3.12, torch 2.11 for CUDA 13, lightning, tokenizers, tensorboard, transformers, pytest and
hypothesis, but no package index. The missing packages are 2 MB of wheels. Collect them in this checkout, on a machine
with an index:

    pip download --no-deps --only-binary=:all: --python-version 3.12 -d wheels \\
        hydra-core==1.3.8 omegaconf==2.3.1 platformdirs==4.14.8 fla-core==0.6.0
    pip wheel --no-deps -w wheels antlr4-python3-runtime==4.9.3 .

Copy the checkout, wheels included, and run there (--no-deps never replaces torch):

    python3 -m pip install --no-index --no-deps --target site wheels/*.whl
    PYTHONPATH=$PWD/site python3 -m benchmarks gpu
"""

import contextlib
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_runs as runs
from benchmarks.common import (
    begin_benchmark,
    describe_gpu,
    describe_machine,
    make_parser,
    positive_float,
    print_table,
    save_results,
)
from benchmarks.gpu_runs import Finding, Scale, Unavailable

BUDGET = 540.0
LINES_OF_A_LOG = 30
SECONDS_TO_EXIT = 5.0  # for a process that has answered

FLOAT32, MIXED = "float32", "bf16-mixed"
COMPILED = partial(runs.training, compiled=True)


@dataclass(frozen=True)
class Run:
    """A measurement in a separate process, killed after `seconds`.

    not_tiny: skipped at tiny sizes, because compiling is slow on a CPU and another run takes the same path.
    """

    part: str
    name: str
    measure: Callable[[Scale], Finding]
    seconds: float
    needs_gpu: bool = False
    not_tiny: bool = False


# The most valuable first.
RUNS = (
    Run("kernels", "build", runs.build, 90),
    Run("step", "rwkv-train, float32", partial(runs.training, precision=FLOAT32), 60),
    Run("step", "rwkv-train, bf16", partial(runs.training, precision=MIXED), 60),
    Run("batch", "rwkv-train, bf16", partial(runs.training, precision=MIXED, large=True), 60),
    Run("kernels", "pytest -m gpu", runs.gpu_tests, 150),
    Run("resume", "SIGTERM, resume=", runs.resume, 90),
    Run("wkv", "wkv_gpu", runs.operator, 90, needs_gpu=True),
    Run("profile", "step, bf16", partial(runs.profile, precision=MIXED), 40),
    Run("profile", "batch, bf16", partial(runs.profile, precision=MIXED, large=True), 40),
    Run("step", "CUDA graph, float32", partial(runs.cuda_graph, precision=FLOAT32), 40, needs_gpu=True),
    Run("step", "CUDA graph, bf16", partial(runs.cuda_graph, precision=MIXED), 40, needs_gpu=True),
    Run("step", "transformers, float32", partial(runs.transformers, precision=FLOAT32), 40),
    Run("step", "transformers, bf16", partial(runs.transformers, precision=MIXED), 40),
    Run("batch", "transformers, bf16", partial(runs.transformers, precision=MIXED, large=True), 90),
    Run("generate", "float32", partial(runs.generation, dtype=torch.float32), 30),
    Run("generate", "bfloat16", partial(runs.generation, dtype=torch.bfloat16), 30),
    Run("doctor", "rwkv-doctor", runs.rwkv_doctor, 40),
    Run("sanitizer", "memcheck", partial(runs.sanitizer, tool="memcheck"), 90),
    Run("sanitizer", "racecheck", partial(runs.sanitizer, tool="racecheck"), 90),
    Run("step", "rwkv-train compile=true, bf16", partial(COMPILED, precision=MIXED), 90),
    Run("step", "rwkv-train compile=true, float32", partial(COMPILED, precision=FLOAT32), 90, not_tiny=True),
    Run("batch", "rwkv-train compile=true, bf16", partial(COMPILED, precision=MIXED, large=True), 90, not_tiny=True),
)
PARTS = tuple(dict.fromkeys(run.part for run in RUNS))

# Each run is forked from a server that has these imports already. No import initialises CUDA.
CAN_FORK = "forkserver" in multiprocessing.get_all_start_methods()  # Windows can't
CONTEXT: Any = multiprocessing.get_context("forkserver" if CAN_FORK else "spawn")
PRELOADED = [
    "benchmarks.gpu",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "rwkv_pl.runs.train",
    "rwkv_pl.training.callbacks.signals",
    "rwkv_pl.training.callbacks.progress",
    "rwkv_pl.training.callbacks.sample_text",
    "torch.utils.tensorboard",
]


@dataclass
class Row:
    """A row of the table.

    status: ok, failed, timeout, unavailable (a tool, a peer or the GPU is missing) or skipped.
    log: the last lines of its output, unless the status is ok.
    """

    part: str
    name: str
    status: str
    summary: str
    seconds: float
    figures: dict[str, Any]
    log: str = ""


def run_measurement(run: Run, scale: Scale, seconds: float) -> Row:
    """Executes a run. seconds: the time that is left for it, besides its own limit."""
    if run.needs_gpu and scale.device != "cuda":
        return Row(run.part, run.name, "unavailable", "needs a GPU", 0.0, {})
    if run.not_tiny and scale.tiny:
        return Row(run.part, run.name, "skipped", "not at tiny sizes", 0.0, {})
    limit = min(run.seconds, seconds)
    if limit <= 0:
        return Row(run.part, run.name, "skipped", "no time is left", 0.0, {})
    started = time.perf_counter()
    with tempfile.NamedTemporaryFile() as log:
        status, summary, figures = run_isolated(run.measure, scale, limit, Path(log.name))
        end = Path(log.name).read_text(errors="replace").splitlines()[-LINES_OF_A_LOG:]
    taken = time.perf_counter() - started
    return Row(run.part, run.name, status, summary, taken, figures, "" if status == "ok" else "\n".join(end))


def run_isolated(
    measure: Callable[[Scale], Finding], scale: Scale, seconds: float, log: Path
) -> tuple[str, str, dict[str, Any]]:
    """Status, summary and figures of a measurement in a separate process. Kills the processes that it leaves."""
    pipe, theirs = CONTEXT.Pipe()
    process = CONTEXT.Process(target=_measure, args=(measure, scale, log, theirs))
    process.start()
    theirs.close()
    try:
        if not pipe.poll(seconds):
            return "timeout", f"stopped at its limit of {seconds:.0f} s", {}
        answer = pipe.recv()
        process.join(SECONDS_TO_EXIT)
        return answer
    except (EOFError, ConnectionResetError):
        process.join()
        return "failed", f"its process ended with exit code {process.exitcode}", {}
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid or 0, signal.SIGKILL)
        process.kill()
        process.join()


def _measure(measure: Callable[[Scale], Finding], scale: Scale, log: Path, pipe: Any) -> None:
    os.setsid()  # a process group, to kill it together with its children
    sys.stdout = sys.stderr = output = log.open("a", buffering=1)
    for stream in (1, 2):
        os.dup2(output.fileno(), stream)
    try:
        summary, figures = measure(scale)
        answer: tuple[str, str, dict[str, Any]] = ("ok", summary, figures)
    except Unavailable as why:
        answer = ("unavailable", str(why), {})
    except BaseException as error:  # SystemExit too: commands end with it
        traceback.print_exc()
        answer = ("failed", f"{type(error).__name__}: {error}".splitlines()[0], {})
    pipe.send(answer)


def ratios_to_transformers(rows: Sequence[Row]) -> dict[str, float]:
    """Each step's speed relative to transformers' at the same batch and precision."""
    seconds = {
        (row.part, row.name): row.figures["seconds_a_step"]["median"] for row in rows if "seconds_a_step" in row.figures
    }
    found = {}
    for (part, name), taken in seconds.items():
        peer = seconds.get((part, f"transformers, {name.rpartition(', ')[2]}"))
        if peer and not name.startswith("transformers"):
            found[f"{part}: {name}"] = peer / taken
    return found


def main() -> None:
    tiny = "--tiny" in sys.argv
    parser = make_parser("gpu", __doc__, rounds=2 if tiny else 5, threads=1 if tiny else min(8, os.cpu_count() or 1))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu tries the program (cuda)")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to try the program")
    parser.add_argument(
        "--budget", type=positive_float, default=BUDGET, help=f"seconds for all runs together ({BUDGET:.0f})"
    )
    options = parser.parse_args()
    if not CAN_FORK:
        parser.exit(2, "benchmarks gpu: this system can't fork processes; use Linux\n")
    # Ask NVML instead of CUDA: a process that has initialised CUDA cannot be forked.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.exit(2, "benchmarks gpu: torch finds no GPU; --device cpu --tiny tries the program\n")
    started = time.perf_counter()
    begin_benchmark("GPU benchmark", options.threads)
    about = describe_machine() | (describe_gpu() if options.device == "cuda" else {})
    device = about.get("gpu", "CPU")
    print(f"device: {device}\n")
    print(f"{'part':11}{'run':35}{'status':13}{'time':>6}  result", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of `finally`, which kills the current run
    CONTEXT.set_forkserver_preload(PRELOADED)
    scale = Scale(options.device, options.tiny, options.rounds)
    rows: list[Row] = []
    for run in [run for run in RUNS if run.part in options.parts]:
        row = run_measurement(run, scale, options.budget - (time.perf_counter() - started))
        rows.append(row)
        head = f"{row.part:11}{row.name:35}{row.status:13}{row.seconds:4.0f} s  "
        print(head + row.summary.replace("\n", "\n" + " " * len(head)), flush=True)
        save_results(
            options.results,
            f"gpu_{re.sub('[^a-z0-9]+', '_', device.lower())}",
            f"GPU benchmark: {device}",
            **{"machine": about},
            scale=asdict(scale),
            times_transformers=ratios_to_transformers(rows),
            rows=[asdict(row) for row in rows],
        )
    if ratios := ratios_to_transformers(rows):
        print_table(["", "x transformers"], [[name, f"{times:,.1f}"] for name, times in ratios.items()])
    print(f"\n{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
