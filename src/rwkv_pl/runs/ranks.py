"""The processes of one run: rank 0 decides, and the others receive its decisions.

Lightning starts the processes of the other devices itself, unless torchrun or SLURM has started all of them. In that
case each starts like an ordinary command, and must use the run folder that rank 0 creates.
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
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec
from typing import TYPE_CHECKING, NoReturn

from rwkv_pl.errors import RunError, UserError, one_line
from rwkv_pl.terminal import BAD_INPUT, is_called_from_python, print_error

if TYPE_CHECKING:
    from torch.distributed import Store

# Set in the environment of the processes that Lightning starts: the decisions of their parent, such as the run folder.
ANSWERS_ENV = "RWKV_PL_ANSWERS"
_answers: dict[str, str] = {}

# The number of runs that this process has started: the store keeps the answers of each.
_runs = 0

# Seconds that a process waits for another process.
TIMEOUT = 120.0

REFUSED = "\0refused"  # the null byte cannot be in the name of a folder

# SLURM job names of interactive shells, which Lightning also treats as ordinary processes.
INTERACTIVE = ("bash", "interactive")


@dataclass(frozen=True)
class Group:
    """The processes of one run that torchrun or SLURM started. address, port: of their store."""

    rank: int
    size: int
    address: str
    port: int
    by_slurm: bool = False

    @property
    def may_be_single_process(self) -> bool:
        """A batch script without srun runs one process, although SLURM reports all tasks of the allocation."""
        return self.by_slurm and self.rank == 0


def begin_run() -> None:
    """Forget the decisions of an earlier run in this process. Call it before the first decision of a run."""
    global _runs
    _runs += 1
    _answers.clear()


def is_first_process() -> bool:
    """Whether this is the process of the run that creates, locks and writes the run folder."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))


def launched_by_lightning() -> bool:
    """Whether another process of this run has started this one and has made all decisions."""
    return ANSWERS_ENV in os.environ and os.environ.get("LOCAL_RANK", "0") != "0"


@contextmanager
def share_answers() -> Iterator[None]:
    """Pass this process's decisions to the processes that Lightning starts inside the block."""
    if launched_by_lightning():
        yield
        return
    os.environ[ANSWERS_ENV] = json.dumps(_answers)
    main = sys.modules["__main__"]
    if main.__spec__ and main.__spec__.name == "__main__":
        # rwkv-train.exe is an archive, and Lightning would start python -m __main__.
        main.__spec__ = find_spec("rwkv_pl.cli.train")
    try:
        yield
    finally:
        os.environ.pop(ANSWERS_ENV, None)
        _answers.clear()


def log_name() -> str | None:
    """Return the name of the log of a process other than rank 0; None if it logs to the run's train.log."""
    group = current_group()
    return f"train_rank_{group.rank}" if group and group.rank > 0 else None


def current_group() -> Group | None:
    """Return the group of this process; None if the run has one process, or if Lightning started this one.

    Raises UserError if the environment has a rank, but not the address of the others.
    """
    environment = os.environ
    if launched_by_lightning():
        return None
    if (size := _read_number("WORLD_SIZE", 1)) > 1:
        if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]:
            raise UserError(f"WORLD_SIZE={size} needs {' and '.join(missing)} too: torchrun sets them")
        # Without torchrun's RANK there is one command per node, and Lightning starts the node's other processes.
        rank = _read_number("RANK", _read_number("NODE_RANK", 0))
        return Group(rank, size, environment["MASTER_ADDR"], _read_number("MASTER_PORT", 0))
    alone = "RANK" in environment or "SLURM_PROCID" not in environment
    if not alone and _read_number("SLURM_NTASKS", 1) > 1 and environment.get("SLURM_JOB_NAME") not in INTERACTIVE:
        from lightning.pytorch.plugins.environments import SLURMEnvironment

        try:
            slurm = SLURMEnvironment(auto_requeue=False)
        except RuntimeError as error:  # --ntasks without --ntasks-per-node
            raise UserError(one_line(error)) from error
        return Group(slurm.global_rank(), slurm.world_size(), slurm.main_address, slurm.main_port, by_slurm=True)
    if not is_first_process():
        raise UserError("the environment has a rank above 0 but no WORLD_SIZE above 1: start with torchrun or srun")
    return None


def _read_number(name: str, default: int) -> int:
    try:
        return int(os.environ.get(name, default))
    except ValueError:
        raise UserError(
            f"the environment has {name}={os.environ[name]}, not a whole number: unset it, or use torchrun or srun"
        ) from None


def decide_on_first_rank(question: str, decide: Callable[[], str]) -> str:
    """Call `decide` in the run's first process, and return its result in all processes.

    A UserError of rank 0 ends all ranks with exit code 2, and rank 0 prints it. Raises RunError if a rank gets no
    answer within TIMEOUT.
    """
    if launched_by_lightning():
        return str(json.loads(os.environ[ANSWERS_ENV])[question])
    group = current_group()
    if group is None:
        _answers[question] = decide()
        return _answers[question]
    if group.rank > 0:
        answer = _fetch_answer(group, question)
        if answer == REFUSED:
            _open_store(group).add(f"{question}/heard", 1)
            _exit_refused()
        _answers[question] = answer
        return answer
    try:
        answer = _answers[question] = decide()
    except UserError as error:
        if not is_called_from_python():
            print_error(error)
        _open_store(group).set(question, REFUSED)
        _await_others(group, question)
        _exit_refused()
    _open_store(group).set(question, answer)
    return answer


def check_world_size(world_size: int) -> None:
    """Raise UserError if the Trainer's number of processes differs from the group's: each would train alone."""
    group = current_group()
    if group and group.size != world_size and not (group.may_be_single_process and world_size == 1):
        raise UserError(
            f"{group.size} processes were started, but trainer.devices x trainer.num_nodes is {world_size}: "
            "use trainer=ddp, and set trainer.devices to the number of processes on each node"
        )


def require_own_processes(devices: int, num_nodes: int) -> None:
    """Raise UserError if Lightning would start further processes for a call from Python: they would run sys.argv.

    devices: on this machine; below 1 if not known yet.
    """
    if not is_called_from_python():
        return
    group = current_group()
    by_launcher = group is not None and (group.by_slurm or "LOCAL_RANK" in os.environ)
    wrong = [
        f"trainer.{name}={number}"
        for name, number, is_launched in (
            ("devices", devices, by_launcher),
            ("num_nodes", num_nodes, group is not None),
        )
        if number > 1 and not is_launched
    ]
    if wrong:
        raise UserError(
            f"{' '.join(wrong)} needs several processes, and rwkv_pl.train trains in this one: use the command "
            "rwkv-train, or start this script with torchrun"
        )


def refuse_sweep() -> None:
    """Raise UserError in a group: a sweep starts the processes of its jobs itself."""
    group = current_group()
    if group and not group.may_be_single_process:
        raise UserError("-m starts the processes of its jobs itself: use it without torchrun or srun")


def _exit_refused() -> NoReturn:
    """Exit with code 2 in every rank: torchrun sends SIGTERM to the others as soon as one exits."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(BAD_INPUT)


def _fetch_answer(group: Group, question: str) -> str:
    """Wait for rank 0's answer."""
    deadline = time.monotonic() + TIMEOUT
    # torch's client would print several lines for each attempt while the server is not up yet.
    while time.monotonic() < deadline:
        try:
            socket.create_connection((group.address, group.port), timeout=1).close()
            break
        except OSError:
            time.sleep(0.1)
    else:
        raise _timeout_error(group)
    try:
        store = _open_store(group)
        store.wait([question], timedelta(seconds=max(1.0, deadline - time.monotonic())))
        return store.get(question).decode()
    except RuntimeError as error:
        raise _timeout_error(group) from error


def _timeout_error(group: Group) -> RunError:
    return RunError(
        f"rank {group.rank} got no answer from rank 0 at {group.address}:{group.port} within {TIMEOUT:.0f} seconds: "
        "see the output of rank 0"
    )


def _await_others(group: Group, question: str) -> None:
    deadline = time.monotonic() + TIMEOUT
    while _open_store(group).add(f"{question}/heard", 0) < group.size - 1 and time.monotonic() < deadline:
        time.sleep(0.05)


def _open_store(group: Group) -> "Store":
    """Open the store at the group's address, for the answers of this run."""
    from torch.distributed import PrefixStore

    return PrefixStore(f"rwkv_pl_{_runs}", _connect_store(group))


@functools.cache
def _connect_store(group: Group) -> "Store":
    """Connect to the store at the group's address, which torch.distributed uses too; rank 0 keeps it until it exits."""
    from torch.distributed import TCPStore

    try:
        return TCPStore(
            group.address,
            group.port,
            # torchrun's own process already runs a server there.
            is_master=group.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
            timeout=timedelta(seconds=TIMEOUT),
            wait_for_workers=False,
            multi_tenant=True,
            use_libuv=sys.platform != "win32",  # torch for Windows is built without it
        )
    except RuntimeError as error:
        where, reason = f"{group.address}:{group.port}", str(error).splitlines()[0]
        raise RunError(f"rank {group.rank} can't open the store at {where} ({reason}): change MASTER_PORT") from error
