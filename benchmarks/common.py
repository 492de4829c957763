"""What every benchmark here shares: the machine's name, interleaved runs, a table and a JSON file."""

import json
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """The device that the figures belong to."""
    cpu = Path("/proc/cpuinfo")
    names = (
        [line.split(":")[1].strip() for line in cpu.read_text().splitlines() if "model name" in line]
        if cpu.exists()
        else []
    )
    flags = (
        next((line for line in cpu.read_text().splitlines() if line.startswith("flags")), "") if cpu.exists() else ""
    )
    features = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {flag}" in flags]
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cpu_features": features,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def in_words(about: dict[str, Any]) -> str:
    """`machine()` in one line."""
    return f"{about['cpu']} ({', '.join(about['cpu_features'])}), {about['threads']} threads, torch {about['torch']}"


def interleaved(makers: dict[str, Callable[[], Callable[[], Any]]], rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of each contestant's call, median with least and most.

    Each lives in a process of its own, as it is used, where no other's memory is in its way. It is made and called
    twice there, then they take turns, one call each a round, so that a slow minute falls on all.
    """
    context = multiprocessing.get_context("spawn")
    seconds: dict[str, list[float]] = {name: [] for name in makers}
    pipes, processes = {}, []
    for name, maker in makers.items():
        pipes[name], theirs = context.Pipe()
        processes.append(context.Process(target=_contestant, args=(maker, theirs), daemon=True))
        processes[-1].start()
        pipes[name].recv()
    for _ in range(rounds):
        for name, pipe in pipes.items():
            pipe.send("go")
            seconds[name].append(pipe.recv())
    for process in processes:
        process.terminate()
    return {
        name: {"median": statistics.median(taken), "min": min(taken), "max": max(taken)}
        for name, taken in seconds.items()
    }


def _contestant(maker: Callable[[], Callable[[], Any]], pipe: Any) -> None:
    call = maker()
    call()
    call()
    pipe.send("ready")
    while True:
        pipe.recv()
        started = time.perf_counter()
        call()
        pipe.send(time.perf_counter() - started)


def report(name: str, title: str, times: dict[str, dict[str, float]], against: str, **more: Any) -> None:
    """Prints a table of milliseconds, with each median as a multiple of `against`'s, and writes results/NAME.json."""
    about = machine()
    print(title)
    print(f"{in_words(about)}\n")
    print(f"{'':34}{'median ms':>12}{'least':>12}{'most':>12}{'x ' + against:>14}")
    for row, taken in times.items():
        ratio = taken["median"] / times[against]["median"]
        print(f"{row:34}" + "".join(f"{1e3 * taken[k]:12.2f}" for k in ("median", "min", "max")) + f"{ratio:14.2f}")
    RESULTS.mkdir(exist_ok=True)
    content = {"title": title, "machine": about, "seconds": times, **more}
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
