"""Shared by every benchmark: the machine's name, contestants that take turns, a table and a JSON file."""

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

from rwkv_pl.files import atomic_write

RESULTS = Path(__file__).parent / "results"

Call = Callable[[], Any]
Maker = Callable[[], Call]
# Low and high are the quartiles.
Summary = dict[str, float]


# A process's first step at 12 x 512 has a thousand page faults, its second a hundred, and some occur up to the tenth.
WARM_UP_CALLS = 6
# If a call takes this many seconds, warm-up ends with it: minutes of waiting would change the result little.
SLOW_SECONDS = 5.0


def make_parser(name: str, doc: str | None, rounds: int | None, threads: int = 2) -> argparse.ArgumentParser:
    """The options of every benchmark. rounds=None: each benchmark has its own default."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks {name}", description=(doc or "").splitlines()[0])
    default = rounds or "each has its own number"
    parser.add_argument("--rounds", type=int_at_least(1), default=rounds, help=f"turns of each contestant ({default})")
    parser.add_argument("--threads", type=int_at_least(1), default=threads, help=f"of each contestant ({threads})")
    parser.add_argument("--results", type=output_folder, default=RESULTS, help="the folder of the JSON file")
    return parser


def int_at_least(least: int) -> Callable[[str], int]:
    """An argparse type: a whole number from `least`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"{text} is not a whole number from {least:,}")
        return value

    return parse


def positive_float(text: str) -> float:
    """An argparse type: a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def existing_folder(text: str) -> Path:
    """An argparse type: a folder that exists."""
    path = Path(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path}")
    return path


def output_folder(text: str) -> Path:
    """An argparse type: an output folder, created if missing, so that an error comes before the measurement."""
    path = Path(text)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{path} cannot be made a folder: {error.strerror}") from None
    return path


def begin_benchmark(title: str, threads: int) -> None:
    """Print the title and the machine; set the threads of this process and of its child processes."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
    print(f"{title}\n{format_machine(describe_machine())}", flush=True)


def describe_machine() -> dict[str, Any]:
    """The CPU and the software of this machine, as stored with the results."""
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


def describe_gpu() -> dict[str, Any]:
    """The GPU, as stored with the results."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "gpu_memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
        "multiprocessors": properties.multi_processor_count,
    }


def format_machine(info: dict[str, Any]) -> str:
    """`describe_machine()` in one line."""
    return f"{info['cpu']} ({', '.join(info['cpu_features'])}), {info['threads']} threads, torch {info['torch']}"


class ContestantError(Exception):
    """A contestant cannot take part; the message says why."""


class Contestant:
    """Work in a separate process, as in real use, without other contestants' memory; it sleeps until asked.

    work: gets the process's end of a pipe, sends a message when it is ready, then one for each message it receives.
    """

    def __init__(self, work: Callable[[Any], None]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_process, args=(work, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def answer(self) -> Any:
        """The next message of the process. Raises ContestantError."""
        try:
            message = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            raise ContestantError(f"its process ended with exit code {self._process.exitcode}") from None
        if isinstance(message, ContestantError):
            raise message
        return message

    def ask(self, *about: Any) -> Any:
        """Send `about` to the process and return its answer. Raises ContestantError."""
        self._pipe.send(about)
        return self.answer()

    def stop(self) -> None:
        self._pipe.close()
        self._process.join(20)
        self._process.kill()


def _process(work: Callable[[Any], None], pipe: Any) -> None:
    try:
        work(pipe)
    except EOFError:  # no more questions
        pass
    except Exception as error:
        pipe.send(ContestantError(f"{type(error).__name__}: {error}".splitlines()[0]))


def run_once(function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's result, from a fresh process. Raises ContestantError."""
    contestant = Contestant(partial(_send_result, partial(function, *arguments)))
    try:
        return contestant.answer()
    finally:
        contestant.stop()


def _send_result(function: Call, pipe: Any) -> None:
    pipe.send(function())


def take_turns(makers: Mapping[str, Maker], rounds: int, seconds_a_turn: float = 0.0) -> dict[str, list[float]]:
    """Seconds per call of each contestant, in each round.

    Each contestant is started and warmed up in its process. Then they take turns, so that a slow minute affects all of
    them, and calls of the same round form pairs. A turn is one call, or as many calls as fill `seconds_a_turn`; then it
    counts their mean. A contestant that cannot take part is left out with a message.
    """
    contestants: dict[str, Contestant] = {}
    seconds: dict[str, list[float]] = {}
    try:
        for name, maker in makers.items():
            contestant = Contestant(partial(_timed, maker, seconds_a_turn))
            try:
                contestant.answer()
            except ContestantError as why:
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
    call()  # includes building and loading, so its time says nothing
    for _ in range(WARM_UP_CALLS - 1):
        started = time.perf_counter()
        call()
        taken = time.perf_counter() - started
        if taken >= SLOW_SECONDS:
            break
    calls = max(1, int(seconds_a_turn / taken))
    pipe.send("ready")
    while True:
        pipe.recv()
        started = time.perf_counter()
        for _ in range(calls):
            call()
        pipe.send((time.perf_counter() - started) / calls)


def summarize(values: Sequence[float]) -> Summary:
    """The median, the quartiles as low and high, minimum and maximum."""
    median = statistics.median(values)
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [median] * 3
    return {"median": median, "low": low, "high": high, "min": min(values), "max": max(values)}


def relative_spread(values: Sequence[float]) -> float:
    """Maximum minus minimum, relative to the median."""
    return (max(values) - min(values)) / statistics.median(values)


def summary_cells(values: Summary, factor: float = 1.0, digits: int = 2) -> list[str]:
    """The median and the quartiles, for a table."""
    median, low, high = (f"{factor * values[name]:,.{digits}f}" for name in ("median", "low", "high"))
    return [median, f"{low} to {high}"]


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows of words below their heads, the first column left-aligned."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    print()
    for row in (head, *rows):
        padded = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        print("   ".join([row[0].ljust(widths[0]), *padded[1:]]).rstrip(), flush=True)


def save_results(folder: Path, name: str, title: str, **content: Any) -> None:
    """Write NAME.json: the title, the machine and the content. An interrupted write leaves the previous file."""
    folder.mkdir(parents=True, exist_ok=True)
    about = {"title": title, "machine": describe_machine(), **content}
    with atomic_write(folder / f"{name}.json") as file:
        file.write((json.dumps(about, indent=2) + "\n").encode())
