"""The measurements of `python -m benchmarks gpu`, one function each, called in separate processes.

They return a Finding, or raise Unavailable if a tool or a peer is missing. Any other exception is a failure.
"""

import contextlib
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks import generate, train_step, wkv_gpu
from benchmarks.common import Call, summarize
from benchmarks.train_step import Setting
from benchmarks.wkv import make_inputs
from rwkv_pl import LitRWKV
from rwkv_pl.cli import doctor, train
from rwkv_pl.ops.backend import load, load_all
from rwkv_pl.training.callbacks.metrics import MetricsRecorder
from rwkv_pl.training.memory import format_si

ROOT = Path(__file__).parents[1]
GOAL_BYTES = 2e9  # of a classic step at batch 1
LARGE_BATCH = 64


class Unavailable(Exception):
    """A tool or a peer is missing; the message names it."""


class Finding(NamedTuple):
    """summary: one line for the table. figures: JSON types."""

    summary: str
    figures: dict[str, Any]


@dataclass(frozen=True)
class Scale:
    """The device and the sizes: 12 x 512 on 1,024 tokens, or tiny ones to try the program. rounds: blocks of steps."""

    device: str
    tiny: bool
    rounds: int

    def setting(self, large: bool = False) -> Setting:
        """Batch 1, or the large batch."""
        if self.tiny:
            return Setting(2, 32, 4 if large else 1, 64)
        return replace(train_step.SETTINGS["classic"], rows=LARGE_BATCH if large else 1)

    def steps(self, large: bool = False) -> int:
        """The number of steps in a block."""
        return 2 if self.tiny else 4 if large else 20


class Blocks:
    """Times blocks of steps; the first block is warm-up. Keeps the GPU's peak memory since it was made."""

    def __init__(self, device: str, steps: int) -> None:
        self._device, self._steps, self._count = device, steps, 0
        self._starts: list[float] = []
        self._memory: dict[str, float] = {}
        if device == "cuda":
            torch.cuda.init()
            torch.cuda.empty_cache()  # rwkv-train has measured its peak FLOP/s with products of a gigabyte
            torch.cuda.reset_peak_memory_stats()

    def step_begins(self) -> None:
        """Call before each step, and once after the last."""
        if self._count % self._steps == 0:
            if self._device == "cuda":
                torch.cuda.synchronize()
                self._memory = {
                    "peak_bytes": torch.cuda.max_memory_allocated(),
                    "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
                }
            self._starts.append(time.perf_counter())
        self._count += 1

    def run(self, step: Call, rounds: int) -> None:
        for _ in range(self._steps * (rounds + 1)):
            self.step_begins()
            step()
        self.step_begins()

    def figures(self, tokens: int) -> dict[str, Any]:
        """tokens: their number in one step."""
        seconds = summarize([(end - start) / self._steps for start, end in pairwise(self._starts[1:])])
        return {"seconds_a_step": seconds, "tokens_per_second": tokens / seconds["median"], **self._memory}


def format_step(figures: dict[str, Any]) -> str:
    """A step's figures in one line."""
    line = f"{1e3 * figures['seconds_a_step']['median']:,.2f} ms, {figures['tokens_per_second']:,.0f} tokens/s"
    if "mfu" in figures:
        line += f", MFU {figures['mfu']:.1%} of {format_si(figures['peak_flops_per_second'], 'FLOP/s')}"
    if "peak_bytes" in figures:
        line += f", peak {format_si(figures['peak_bytes'])} ({format_si(figures['peak_reserved_bytes'])} reserved)"
    return line


# rwkv-train


@contextlib.contextmanager
def temporary_corpus() -> Iterator[Path]:
    """A folder with 2 MB of random printable text in corpus.txt."""
    with tempfile.TemporaryDirectory() as folder:
        letters = np.random.default_rng(0).integers(32, 127, 2_000_000, dtype=np.uint8)
        Path(folder, "corpus.txt").write_bytes(letters.tobytes())
        yield Path(folder)


def make_overrides(scale: Scale, setting: Setting, precision: str, steps: int, run: str = "run") -> list[str]:
    """rwkv-train's overrides, for a folder with corpus.txt."""
    return [
        "data=text",
        "data.path=corpus.txt",
        f"data.batch_size={setting.rows}",
        f"data.ctx_len={setting.steps}",
        f"model.n_layer={setting.n_layer}",
        f"model.n_embd={setting.n_embd}",
        f"trainer.accelerator={scale.device}",
        f"trainer.precision={'32-true' if precision == 'float32' else precision}",
        f"trainer.max_steps={steps}",
        "trainer.limit_val_batches=1",
        f"hydra.run.dir={run}",
    ]


def training(scale: Scale, precision: str, large: bool = False, compiled: bool = False) -> Finding:
    """rwkv-train in its steady state: the real command, timed in the hook that Lightning calls before each batch."""
    setting = scale.setting(large)
    if scale.tiny and compiled:
        setting = replace(setting, n_layer=1)  # the second block's graph differs: another half minute on a CPU
    steps = scale.steps(large) * (scale.rounds + 1)
    before_each = LitRWKV.on_train_batch_start
    blocks: Blocks | None = None
    costs: dict[str, float] = {}

    def on_train_batch_start(self: LitRWKV, batch: Any, batch_idx: int) -> None:
        nonlocal blocks
        if blocks is None:
            blocks = Blocks(scale.device, scale.steps(large))
            history = next(c for c in self.trainer.callbacks if isinstance(c, MetricsRecorder))
            assert history.flops_per_token and history.peak
            costs.update(flops_per_token=history.flops_per_token, peak_flops_per_second=history.peak)
        blocks.step_begins()
        before_each(self, batch, batch_idx)

    LitRWKV.on_train_batch_start = on_train_batch_start
    with temporary_corpus() as folder:
        # The last block ends before one more step.
        words = [*make_overrides(scale, setting, precision, steps + 1), f"compile={str(compiled).lower()}"]
        rwkv_train(folder, words)
        log = (folder / "run" / "train.log").read_text()
        os.chdir(ROOT)
    if eager := re.search(r"compile off: .*", log):
        raise RuntimeError(eager[0])
    assert blocks is not None
    figures = blocks.figures(setting.rows * setting.steps) | costs
    figures["mfu"] = figures["tokens_per_second"] * costs["flops_per_token"] / costs["peak_flops_per_second"]
    line = format_step(figures)
    if "peak_bytes" in figures and not large:
        line += f", goal {format_si(GOAL_BYTES)}: {'met' if figures['peak_bytes'] < GOAL_BYTES else 'missed'}"
    return Finding(line, {"setting": str(setting), "goal_bytes": GOAL_BYTES} | figures)


def rwkv_train(folder: Path, words: Sequence[str]) -> None:
    """Runs the command in this process."""
    os.chdir(folder)
    sys.argv = ["rwkv-train", *words]
    train.main()


def resume(scale: Scale) -> Finding:
    """Compares a run stopped by SIGTERM and resumed with an uninterrupted one: weights and optimizer, bit for bit."""
    steps, stop_after = 200, 20

    def start(*words: str) -> BaseProcess:
        # Forked, to save the imports. This process has not initialised CUDA.
        process = multiprocessing.get_context("fork").Process(target=rwkv_train, args=(folder, words))
        process.start()
        return process

    def run(name: str) -> list[str]:
        words = make_overrides(scale, scale.setting(), "bf16-mixed", steps, name)
        return [*words, "trainer.deterministic=true", "trainer.log_every_n_steps=1"]

    with temporary_corpus() as folder:
        whole, stopped = start(*run("whole")), start(*run("stopped"))
        metrics = folder / "stopped" / "metrics.csv"
        while stopped.is_alive() and not (metrics.exists() and metrics.read_bytes().count(b"\n") > stop_after):
            time.sleep(0.01)
        stopped.terminate()
        check_exit_code(stopped, 143)
        done = load_checkpoint(folder / "stopped")["global_step"]
        check_exit_code(start("resume=stopped"), 0)
        check_exit_code(whole, 0)
        expected, found = (
            select_tensors(load_checkpoint(folder / "whole")),
            select_tensors(load_checkpoint(folder / "stopped")),
        )
    differing = [name for name in expected if name not in found or not torch.equal(expected[name], found[name])]
    figures = {"steps": steps, "stopped_after": done, "tensors": len(expected), "differing": differing}
    if differing or expected.keys() != found.keys():
        raise RuntimeError(f"{len(differing)} of {len(expected)} tensors differ, the first {differing[:1]}")
    line = f"stopped after step {done}, resumed to {steps}: all {len(expected)} tensors of last.ckpt are bit-identical"
    return Finding(line, figures | {"exact": True})


def check_exit_code(process: BaseProcess, expected: int) -> None:
    process.join()
    if process.exitcode != expected:
        raise RuntimeError(f"rwkv-train ended with exit code {process.exitcode}, expected {expected}")


def load_checkpoint(run: Path) -> dict[str, Any]:
    return torch.load(run / "checkpoints" / "last.ckpt", map_location="cpu", weights_only=True)


def select_tensors(content: dict[str, Any]) -> dict[str, Tensor]:
    """Weights and the optimizer's moments."""
    moments = content["optimizer_states"][0]["state"]
    return content["state_dict"] | {f"{n}.{name}": value for n, of in moments.items() for name, value in of.items()}


# A step in a plain loop


def bare_step(step: Call, blocks: Blocks, setting: Setting, rounds: int) -> Finding:
    blocks.run(step, rounds)
    figures = blocks.figures(setting.rows * setting.steps)
    return Finding(format_step(figures), {"setting": str(setting)} | figures)


def use_tensor_cores() -> None:
    """TF32 products in float32, rwkv-train's default on a GPU."""
    torch.set_float32_matmul_precision("high")


def cuda_graph(scale: Scale, precision: str, large: bool = False) -> Finding:
    """A plain loop's step (with gradient clipping and L2Wrap) captured in a CUDA graph: the time without Python."""
    use_tensor_cores()
    # A replay allocates nothing, so the peak is that of the capture.
    setting, blocks = scale.setting(large), Blocks(scale.device, scale.steps(large))
    step = train_step.make_our_step(setting, precision, full=True, device=scale.device)
    torch.cuda.synchronize()
    return bare_step(wkv_gpu.capture_graph(step, calls=1).replay, blocks, setting, scale.rounds)


def transformers(scale: Scale, precision: str, large: bool = False) -> Finding:
    """transformers' Rwkv, eager: its loop over time in Python, not the CUDA kernel that it can download."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        import transformers as _  # noqa: F401
    except ImportError as error:
        raise Unavailable(f"transformers cannot be imported: {error}") from error
    use_tensor_cores()
    setting, blocks = scale.setting(large), Blocks(scale.device, steps=1)
    step = train_step.make_transformers_step(setting, precision, scale.device)
    return bare_step(step, blocks, setting, rounds=1 if large else min(2, scale.rounds))


def profile(scale: Scale, precision: str, large: bool = False) -> Finding:
    """A step's time by parts; on a GPU also the share of the time in which the GPU is idle."""
    use_tensor_cores()
    setting, blocks = scale.setting(large), Blocks(scale.device, scale.steps(large))
    blocks.run(train_step.make_our_step(setting, precision, full=True, device=scale.device), scale.rounds)
    wall = 1e3 * blocks.figures(1)["seconds_a_step"]["median"]
    figures = train_step.profile(setting, precision, full=True, device=scale.device)
    parts = figures["milliseconds"]
    total = sum(parts.values())
    figures |= {"setting": str(setting), "wall_milliseconds": wall}
    figures["not_a_matrix_product"] = 1 - parts["matrix products"] / total
    line = f"{figures['not_a_matrix_product']:.0%} outside of matrix products: "
    line += ", ".join(f"{part} {taken:.2f}" for part, taken in parts.items() if taken / total > 0.02) + " ms"
    if scale.device == "cuda":
        figures["idle"] = max(0.0, 1 - total / wall)
        line += f"; the GPU is idle {figures['idle']:.0%} of {wall:.2f} ms"
    return Finding(line, figures)


def generation(scale: Scale, dtype: torch.dtype) -> Finding:
    """Greedy tokens per second at batch 1."""
    setting = scale.setting()
    model = generate.random_model(setting.n_layer, setting.n_embd).to(scale.device)
    blocks = Blocks(scale.device, steps=1)
    blocks.run(generate.make_writer(model, dtype), scale.rounds)
    figures = blocks.figures(generate.TOKENS)
    return Finding(f"{figures['tokens_per_second']:,.0f} tokens/s", {"tokens_per_second": figures["tokens_per_second"]})


# The kernels


def build(scale: Scale) -> Finding:
    """Builds the operators, or loads them from the cache."""
    started = time.perf_counter()
    if failure := load_all(scale.device):
        raise RuntimeError(failure)
    seconds = time.perf_counter() - started
    return Finding(f"the {scale.device} operators load after {seconds:.1f} s", {"seconds": seconds})


def gpu_tests(scale: Scale) -> Finding:
    """`pytest -m gpu`."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "gpu",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/ops/test_wkv4_cuda.py",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout, done.stderr, sep="\n")
    figures = {name: int(count) for count, name in re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout)}
    line = ", ".join(f"{count} {name}" for name, count in figures.items())
    if done.returncode:
        first = re.search(r"^(FAILED|ERROR) .*", done.stdout, re.MULTILINE)
        raise RuntimeError(f"{line or f'exit code {done.returncode}'}; {first[0] if first else done.stderr[-200:]}")
    if not figures.get("passed"):
        raise Unavailable(f"{line}: needs a GPU")
    return Finding(line, figures)


def rwkv_doctor(scale: Scale) -> Finding:
    """rwkv-doctor's exit code and its verdict on each device."""
    done = subprocess.run([sys.executable, "-m", doctor.__name__], cwd=ROOT, capture_output=True, text=True)
    print(done.stdout, done.stderr, sep="\n")
    verdicts = [line for line in done.stdout.splitlines() if re.match("(cpu|cuda): ", line)]
    if not verdicts:
        raise RuntimeError(f"exit code {done.returncode}: {done.stderr.strip()[-200:]}")
    return Finding(f"exit code {done.returncode}; {verdicts[-1]}", {"code": done.returncode, "verdicts": verdicts})


def sanitizer(scale: Scale, tool: str) -> Finding:
    """Runs every kernel at small shapes under compute-sanitizer's memcheck or racecheck."""
    path = shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"]))
    if path is None:
        raise Unavailable("compute-sanitizer is not on PATH")
    if scale.device != "cuda":
        raise Unavailable("needs a GPU")
    code = "from benchmarks.gpu_runs import every_kernel; every_kernel()"
    command = [path, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", code]
    # torch's cached blocks would hide an access past the end of a tensor.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    print(done.stdout, done.stderr, sep="\n")
    lines = [line.removeprefix("=========").strip() for line in done.stdout.splitlines()]
    verdict = next((line for line in reversed(lines) if "SUMMARY" in line or "Error" in line), "no summary")
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}: {verdict}")
    return Finding(verdict, {"verdict": verdict})


def every_kernel() -> None:
    """Runs each WKV-4 kernel forward and backward. Inputs come from the CPU, so that no torch kernel runs."""
    if failure := load("wkv4", "cuda"):
        raise RuntimeError(failure)
    for dtype in (torch.float32, torch.bfloat16):
        for B, T, C in ((1, 1, 1), (2, 70, 33), (1, 1100, 16)):
            arguments, grad = make_inputs(B, T, C, dtype)
            on_gpu = [x.cuda() for x in (*arguments, grad)]
            for tile in wkv_gpu.TILES:
                for work in wkv_gpu.make_ours(on_gpu[:-1], on_gpu[-1], tile):
                    work()
    torch.cuda.synchronize()


def operator(scale: Scale) -> Finding:
    """`python -m benchmarks wkv_gpu`: a line for each shape."""
    with tempfile.TemporaryDirectory() as folder:
        sys.argv = ["benchmarks wkv_gpu", f"--results={folder}"]
        wkv_gpu.main()
        figures = json.loads(Path(folder, "wkv_gpu.json").read_text())
    lines = [*map(format_operator, figures["rows"]), *(f"left out: {reason}" for reason in figures["left_out"])]
    return Finding("\n".join(lines), figures)


def format_operator(row: dict[str, Any]) -> str:
    """Times of a shape, and the share of a copy's bandwidth, in one line."""
    times = row["microseconds"]
    line = [f"{name} {taken:,.1f} us" for name, taken in times.items() if name not in ("forward", "backward")]
    share = ", ".join(f"{name} {part:.0%}" for name, part in row["bandwidth"].items())
    B, T, C = row["shape"]
    dtype = row["dtype"].removeprefix("torch.")
    return f"B{B} T{T:,} C{C} {dtype}: {', '.join(line)}; share of a copy's bandwidth: {share}"
