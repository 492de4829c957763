"""What every benchmark here shares: the machine's name, contestants that take turns, a table and a JSON file."""

import argparse
import json
import math
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rwkv_pl.files import publish

RESULTS = Path(__file__).parent / "results"

Call = Callable[[], Any]
Maker = Callable[[], Call]
# Low and high are the quartiles.
Summary = dict[str, float]


# A process's first step at 12 x 512 takes a thousand page faults, its second a hundred, and some come up to the tenth.
WARM_UP = 6
# A call from the second that takes so many seconds is the last: minutes of waiting would mend a small part of it.
SLOW = 5.0


def arguments(name: str, about: str | None, rounds: int | None, threads: int = 2) -> argparse.ArgumentParser:
    """The options that every benchmark has; no rounds: each benchmark has its own number of them."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks {name}", description=(about or "").splitlines()[0])
    told = rounds or "each has its own number"
    parser.add_argument("--rounds", type=at_least(1), default=rounds, help=f"turns of each contestant ({told})")
    parser.add_argument("--threads", type=at_least(1), default=threads, help=f"of every contestant ({threads})")
    parser.add_argument("--results", type=folder, default=RESULTS, help="the folder of the JSON file")
    return parser


def at_least(least: int) -> Callable[[str], int]:
    """An argparse type: a whole number from `least`."""

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"{text} is not a whole number from {least:,}")
        return value

    return number


def above_zero(text: str) -> float:
    """An argparse type: a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def folder(text: str) -> Path:
    """An argparse type: a folder to write into, made where there is none: not to fail when all has been measured."""
    path = Path(text)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{path} cannot be made a folder: {error.strerror}") from None
    return path


def begin(title: str, threads: int) -> None:
    """Tells what is measured on what, and sets the threads of this process and of those that it starts."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
    print(f"{title}\n{in_words(machine())}", flush=True)


def machine() -> dict[str, Any]:
    """The device that the figures belong to."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cpu_features": [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags],
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def gpu() -> dict[str, Any]:
    """The GPU that the figures belong to."""
    about = torch.cuda.get_device_properties(0)
    return {
        "gpu": about.name,
        "gpu_memory_bytes": about.total_memory,
        "cuda": torch.version.cuda,
        "multiprocessors": about.multi_processor_count,
    }


def in_words(about: dict[str, Any]) -> str:
    """`machine()` in one line."""
    return f"{about['cpu']} ({', '.join(about['cpu_features'])}), {about['threads']} threads, torch {about['torch']}"


class Failed(Exception):
    """A contestant that cannot take part, and why."""


class Contestant:
    """Work in a process of its own, as it is used, where no other's memory is in its way; it rests until it is asked.

    work: gets the process's end of a pipe, sends one message when it is ready, then one for each that it receives.
    """

    def __init__(self, work: Callable[[Any], None]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_process, args=(work, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def answer(self) -> Any:
        """What it sends next. Raises Failed."""
        try:
            message = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            raise Failed(f"its process ended with exit code {self._process.exitcode}") from None
        if isinstance(message, Failed):
            raise message
        return message

    def ask(self, *about: Any) -> Any:
        """Lets it work on `about`, and returns its answer. Raises Failed."""
        self._pipe.send(about)
        return self.answer()

    def stop(self) -> None:
        self._pipe.close()
        self._process.join(20)
        self._process.kill()


def _process(work: Callable[[Any], None], pipe: Any) -> None:
    try:
        work(pipe)
    except EOFError:  # nothing more is asked
        pass
    except Exception as error:
        pipe.send(Failed(f"{type(error).__name__}: {error}".splitlines()[0]))


def once(function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's result, from a fresh process. Raises Failed."""
    contestant = Contestant(partial(_send_result, partial(function, *arguments)))
    try:
        return contestant.answer()
    finally:
        contestant.stop()


def _send_result(function: Call, pipe: Any) -> None:
    pipe.send(function())


def take_turns(makers: Mapping[str, Maker], rounds: int, seconds_a_turn: float = 0.0) -> dict[str, list[float]]:
    """Seconds of a call of each contestant, in each round.

    Each is made and warmed up in its process, then they take turns, so that a slow minute falls on all, and calls of
    the same round make pairs. A turn is one call, or as many as fill `seconds_a_turn`, of which the mean counts. One
    that cannot take part is left out, which is told.
    """
    contestants: dict[str, Contestant] = {}
    seconds: dict[str, list[float]] = {}
    try:
        for name, maker in makers.items():
            contestant = Contestant(partial(_timed, maker, seconds_a_turn))
            try:
                contestant.answer()
            except Failed as why:
                print(f"left out: {name}: {why}")
            else:
                contestants[name], seconds[name] = contestant, []
        for _ in range(rounds):
            for name, contestant in contestants.items():
                seconds[name].append(contestant.ask())
    finally:
        for contestant in contestants.values():
            contestant.stop()
    return seconds


def _timed(maker: Maker, seconds_a_turn: float, pipe: Any) -> None:
    call = maker()
    call()  # builds and loads what there is to, so its time says nothing
    for _ in range(WARM_UP - 1):
        started = time.perf_counter()
        call()
        taken = time.perf_counter() - started
        if taken >= SLOW:
            break
    calls = max(1, int(seconds_a_turn / taken))
    pipe.send("ready")
    while True:
        pipe.recv()
        started = time.perf_counter()
        for _ in range(calls):
            call()
        pipe.send((time.perf_counter() - started) / calls)


def summary(values: Sequence[float]) -> Summary:
    """The median, the quartiles as low and high, least and most."""
    median = statistics.median(values)
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [median] * 3
    return {"median": median, "low": low, "high": high, "min": min(values), "max": max(values)}


def spread(values: Sequence[float]) -> float:
    """From least to most, as a share of the median."""
    return (max(values) - min(values)) / statistics.median(values)


def cells(of: Summary, factor: float = 1.0, digits: int = 2) -> list[str]:
    """The median and the quartiles, for a table."""
    median, low, high = (f"{factor * of[name]:,.{digits}f}" for name in ("median", "low", "high"))
    return [median, f"{low} to {high}"]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints rows of words below their heads, the first column to the left."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    print()
    for row in (head, *rows):
        padded = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        print("   ".join([row[0].ljust(widths[0]), *padded[1:]]).rstrip(), flush=True)


def save(folder: Path, name: str, title: str, **content: Any) -> None:
    """Writes NAME.json: the title, the machine and the figures. An interrupted write leaves the previous file."""
    folder.mkdir(parents=True, exist_ok=True)
    about = {"title": title, "machine": machine(), **content}
    with publish(folder / f"{name}.json") as file:
        file.write((json.dumps(about, indent=2) + "\n").encode())
