"""Which processes a run has, and which of them this one is: its rank.

torchrun, SLURM or runs/processes.py has started them, and each runs like an ordinary command.
"""

import os
from dataclasses import dataclass

from rwkv_pl.errors import UserError, one_line
from rwkv_pl.terminal import is_called_from_python

# SLURM job names of interactive shells, which Lightning also treats as ordinary processes.
INTERACTIVE = ("bash", "interactive")


@dataclass(frozen=True)
class Group:
    """The processes of one run. address, port: of their store."""

    rank: int
    size: int
    address: str
    port: int
    by_slurm: bool = False

    @property
    def may_be_single_process(self) -> bool:
        """A batch script without srun runs one process, although SLURM reports all tasks of the allocation."""
        return self.by_slurm and self.rank == 0


def is_first_process() -> bool:
    """Whether this is the process of the run that creates, locks and writes the run folder."""
    # torchrun chooses RANK itself, so its process 0 can be in any task of SLURM, on any node.
    names = ("RANK",) if "RANK" in os.environ else ("LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")
    return all(os.environ.get(name, "0") == "0" for name in names)


def current_group() -> Group | None:
    """Return the group of this process; None if it is the only one, or has not started the others yet.

    Raises UserError if the environment has a rank, but not the address of the others.
    """
    environment = os.environ
    if (size := _read_number("WORLD_SIZE", 1)) > 1:
        if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]:
            raise UserError(f"WORLD_SIZE={size} needs {' and '.join(missing)} too: torchrun sets them")
        # Without RANK there is one command per node, which has not started the node's other processes yet.
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
        if not alone and environment.get("SLURM_JOB_NAME") in INTERACTIVE:
            raise UserError(
                f"SLURM_JOB_NAME={environment['SLURM_JOB_NAME']} counts as an interactive shell with one process: for "
                "srun in it, use `srun --job-name=train`"
            )
        raise UserError("the environment has a rank above 0 but no WORLD_SIZE above 1: start with torchrun or srun")
    return None


def _read_number(name: str, default: int) -> int:
    try:
        return int(os.environ.get(name, default))
    except ValueError:
        raise UserError(
            f"the environment has {name}={os.environ[name]}, not a whole number: unset it, or use torchrun or srun"
        ) from None


def check_world_size(world_size: int) -> None:
    """Raise UserError if the Trainer's number of processes differs from the group's: each would train alone."""
    group = current_group()
    size = group.size if group else 1
    if world_size < 1:
        return  # Lightning explains it
    if size != world_size and not (group and group.may_be_single_process and world_size == 1):
        found = f"{size} processes were started" if size > 1 else "one process was started"
        raise UserError(
            f"{found}, but trainer.devices x trainer.num_nodes is {world_size}: use trainer=ddp, set trainer.devices "
            "to the number of processes on each node, and start them with torchrun or srun"
        )


def require_own_processes(devices: int, num_nodes: int) -> None:
    """Raise UserError if a call from Python needs processes that torchrun or srun did not start."""
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


def name_processes(ranks: list[int]) -> str:
    """Name processes in a message: process 1, or processes 1, 2."""
    return f"process{'es' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
