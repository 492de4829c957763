"""The processes of a run agree on its start: rank 0 decides, and the others receive its decisions.

They meet in a store of torch.distributed before the Trainer is built. Until the training starts, an error in one
process ends all of them; from then on, runs/rank_errors.py reports the errors.
"""

import functools
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from rwkv_pl.errors import RunError, UserError, one_line
from rwkv_pl.runs.ranks import Group, check_world_size, current_group, name_processes
from rwkv_pl.terminal import BAD_INPUT, FAILED

if TYPE_CHECKING:
    from torch.distributed import Store

# Seconds until the other processes have to be there.
TIMEOUT = 120.0

# Seconds that a process with an error waits until the others know of it.
PATIENCE = 10.0


@dataclass
class _Start:
    """How far the start is. number: of this process's runs. timeout: of an answer in seconds, once all have joined."""

    number: int = 0
    timeout: float | None = None
    uses_store: bool = False
    is_ready: bool = False


_start = _Start()


def begin_run() -> None:
    """Forget an earlier run in this process. Call it before the first decision of a run."""
    global _start
    _start = _Start(_start.number + 1)


def join(world_size: int, timeout: int) -> None:
    """Wait for the other processes of the run, which have to come within TIMEOUT.

    Later, a process that does not answer for `timeout` seconds ends the run. Raises UserError if the number of
    processes is wrong, RunError if some are missing.
    """
    check_world_size(world_size)
    group = current_group()
    if group and world_size > 1:
        _meet(group, "here")
        _start.timeout = timeout


def confirm_ready() -> None:
    """Wait until all processes are ready for the training, from which on runs/rank_errors.py reports the errors."""
    group = current_group()
    if group and _start.timeout:
        _meet(group, "ready")
    _start.is_ready = True


def decide_on_first_rank(question: str, decide: Callable[[], str]) -> str:
    """Call `decide` in the run's first process, and return its result in all processes."""
    group = current_group()
    if group is None:
        return decide()
    store = _open_store(group)
    if group.rank == 0:
        answer = decide()
        store.set(question, answer)
        return answer
    _wait(group, {question: 0})
    return store.get(question).decode()


@contextmanager
def fail_together() -> Iterator[None]:
    """If the start of the run fails in one process, end it in all of them with the same exit code.

    The error is raised in rank 0, and the others exit without a message.
    """
    try:
        yield
    except Exception as error:
        group = current_group() if _start.uses_store and not _start.is_ready else None
        if group is None:
            raise
        code = BAD_INPUT if isinstance(error, UserError) and not isinstance(error, RunError) else FAILED
        text = one_line(error) if isinstance(error, UserError) else f"{type(error).__name__}: {one_line(error)}"
        try:
            _open_store(group).compare_set("failed", "", json.dumps([group.rank, code, text[:400]]))
        except RuntimeError:  # rank 0 has ended
            raise error from None
        _await_all_exits(group)
        if group.rank > 0:
            raise SystemExit(code) from error
        raise


def _await_all_exits(group: Group) -> None:
    """Wait until all processes know of an error. torchrun sends SIGTERM to the others as soon as one exits."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    deadline = time.monotonic() + (PATIENCE if _start.timeout else 1.0)
    with suppress(RuntimeError):
        store = _open_store(group)
        n_exits = store.add("exits", 1)
        waits = group.rank == 0 or _is_agent_store()  # else the store ends with rank 0
        while waits and n_exits < group.size and time.monotonic() < deadline:
            time.sleep(0.02)
            n_exits = store.add("exits", 0)


def _meet(group: Group, place: str) -> None:
    _open_store(group).set(f"{place} {group.rank}", "")
    _wait(group, {f"{place} {rank}": rank for rank in range(group.size)})


def _wait(group: Group, keys: dict[str, int]) -> None:
    """Wait until other processes have set these keys. keys: for each, the rank that sets it.

    If a process has failed, rank 0 raises its error and the others exit.
    """
    deadline = time.monotonic() + (_start.timeout or TIMEOUT)
    store = _open_store(group)
    try:
        while True:
            if store.check(["failed"]):
                rank, code, text = json.loads(store.get("failed"))
                if group.rank > 0:
                    _await_all_exits(group)
                    sys.exit(code)
                raise (UserError if code == BAD_INPUT else RunError)(f"process {rank}: {text}")
            missing = [rank for key, rank in keys.items() if not store.check([key])]
            if not missing:
                return
            if time.monotonic() > deadline and (group.rank == 0 or 0 in missing):  # rank 0 waits too, and reports them
                raise RunError(f"{name_processes(missing)} of {group.size} {_describe_wait()}")
            time.sleep(0.05)
    except RuntimeError as error:
        _start.uses_store = False
        text = f"process {group.rank} lost process 0, which ended without a word (killed?)"
        raise RunError(text) from error


def _describe_wait() -> str:
    if _start.timeout is None:
        return f"did not start within {TIMEOUT:.0f} seconds: see its output, and whether all have the same MASTER_ADDR"
    return f"did not answer within trainer.timeout={_start.timeout:.0f} seconds"


def _open_store(group: Group) -> "Store":
    """Open the store at the group's address, for this start of the run. Raises RunError if that fails."""
    from torch.distributed import PrefixStore

    store = _connect_store(group.rank, group.address, group.port)
    _start.uses_store = True
    # torchrun's store outlives the processes that it restarts.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"rwkv_pl_{_start.number}_{attempt}", store)


@functools.cache
def _connect_store(rank: int, address: str, port: int) -> "Store":
    """Connect to the store at the address, which torch.distributed uses too; rank 0 keeps it until it exits."""
    from torch.distributed import TCPStore

    is_server = rank == 0 and not _is_agent_store()
    deadline = time.monotonic() + TIMEOUT
    # torch's client would print several lines for each attempt while the server is not up yet.
    while not is_server:
        try:
            socket.create_connection((address, port), timeout=1).close()
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise RunError(
                    f"process {rank} found no process 0 at {address}:{port} within {TIMEOUT:.0f} seconds: "
                    "see the output of process 0"
                ) from error
            time.sleep(0.1)
    try:
        return TCPStore(
            address,
            port,
            is_master=is_server,
            timeout=timedelta(seconds=TIMEOUT),
            wait_for_workers=False,
            multi_tenant=True,
            use_libuv=sys.platform != "win32",  # torch for Windows is built without it
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise RunError(
            f"process {rank} can't open the store at {address}:{port} ({reason}): change MASTER_PORT"
        ) from error


def _is_agent_store() -> bool:
    """Whether torchrun's own process serves the store."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
