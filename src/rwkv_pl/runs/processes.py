"""Starts the other processes of a run on this machine, one per device, unless torchrun or SLURM has done so.

Lightning would start them at the beginning of the training, when this process has already loaded everything, so that a
start would take twice as long.
"""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rwkv_pl import windows
from rwkv_pl.errors import UserError
from rwkv_pl.runs import ranks
from rwkv_pl.terminal import FAILED, exit_at_once, is_called_from_python

# Set in the environment of the processes that this file starts: the id of the process that started them.
PARENT_ENV = "RWKV_PL_PARENT"

# Seconds in which a process reports that it has lost another one. After that, it is ended: NCCL can wait for ever.
GRACE = 12.0

_is_watching = threading.Event()


def count_devices(trainer: dict[str, Any]) -> int:
    """Return the number of devices that the run uses on this machine. Imports torch if it depends on the machine."""
    devices = trainer["devices"]
    if isinstance(devices, str) and devices not in ("auto", "-1"):
        devices = int(devices) if devices.isdecimal() else [part for part in devices.split(",") if part]
    if isinstance(devices, list):
        return len(devices)
    if isinstance(devices, int) and devices >= 0:
        return devices
    import torch

    on_gpu = trainer["accelerator"] in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return torch.cuda.device_count() if on_gpu else 1


@contextmanager
def start_processes(trainer: dict[str, Any]) -> Iterator[None]:
    """Start the other processes with this one's command line, and end them at the end of the block."""
    watch_parent()
    n_nodes, n_devices = trainer["num_nodes"], count_devices(trainer)
    group = ranks.current_group()
    if n_nodes > 1 and group is None:
        raise UserError(
            f"trainer.num_nodes={n_nodes} needs torchrun or srun, or WORLD_SIZE, NODE_RANK, MASTER_ADDR and "
            "MASTER_PORT in the environment of one command on each machine"
        )
    if n_devices < 2 or is_called_from_python() or "LOCAL_RANK" in os.environ or (group and group.by_slurm):
        yield
        return
    before = os.environ.copy()
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(_free_port()))
    os.environ |= {"WORLD_SIZE": str(n_devices * n_nodes), "NODE_RANK": before.get("NODE_RANK", "0")}
    first = int(os.environ["NODE_RANK"]) * n_devices
    others = [_start(first + local, local) for local in range(1, n_devices)]
    os.environ |= {"RANK": str(first), "LOCAL_RANK": "0"}
    _is_watching.set()
    threading.Thread(target=_watch, args=(first, others), daemon=True).start()
    try:
        yield
    finally:
        stop_watching()
        _end(others)
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ |= before


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _start(rank: int, local_rank: int) -> "subprocess.Popen[str]":
    environment = {"RANK": str(rank), "LOCAL_RANK": str(local_rank), PARENT_ENV: str(os.getpid())}
    command = [sys.executable, "-m", "rwkv_pl.cli.train", *sys.argv[1:]]
    process = subprocess.Popen(command, env=os.environ | environment, stdin=subprocess.DEVNULL, text=True)
    if sys.platform == "win32":
        windows.end_with_this_process(process)
    return process


def stop_watching() -> None:
    """Call this when this process knows why the run ends: to report it may take long."""
    _is_watching.clear()


def _watch(first: int, others: list["subprocess.Popen[str]"]) -> None:
    """If one of the others ends with an error and this process does not notice, end all."""
    while not any(process.poll() for process in others):
        if all(process.poll() == 0 for process in others):
            return
        time.sleep(0.5)
    time.sleep(GRACE)
    if not _is_watching.is_set():
        return
    ended = [(first + number, code) for number, process in enumerate(others, 1) if (code := process.poll())]
    for process in others:
        process.kill()
    rank, code = ended[0]
    exit_at_once(
        f"process {rank} ended without a word ({f'signal {-code}' if code < 0 else f'exit code {code}'})", FAILED
    )


def _end(others: list["subprocess.Popen[str]"]) -> None:
    """Wait until the others have ended, and kill those that do not."""
    deadline = time.monotonic() + GRACE
    for process in others:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def watch_parent() -> None:
    """End this process if the one that has started it has ended, once it had the time to report that."""
    parent = os.environ.pop(PARENT_ENV, None)  # not for the processes that this one starts
    if parent is None or sys.platform == "win32":
        return

    def watch() -> None:
        while os.getppid() == int(parent):
            time.sleep(0.5)
        time.sleep(GRACE)
        os._exit(FAILED)

    threading.Thread(target=watch, daemon=True).start()
