"""Start the ranks of a run as torchrun or SLURM does, forked by forks.py."""

import socket
from pathlib import Path

import forks
from command import Result


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def environment(scheduler: str, rank: int, port: str, world_size: int = 2) -> dict[str, str]:
    store = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    if scheduler == "torchrun":
        return store | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    if scheduler == "one command a node":
        return store | {"NODE_RANK": str(rank), "WORLD_SIZE": "2"}
    slurm = {"SLURM_NTASKS": "2", "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NODEID": "0"}
    # Lightning takes the address from the first node, and the port from the job: 15,000 plus its last four digits.
    job = 10000 + (int(port) - 15000) % 10000
    return slurm | {
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_JOB_ID": str(job),
        "SLURM_JOB_NAME": "rwkv",
        "SLURM_NODELIST": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
    }


def start_rank(folder: Path, scheduler: str, rank: int, port: str, *arguments: str, strikes=(), world_size: int = 2):
    """Start one rank, in its own folder below `folder` for its output."""
    place = folder / f"rank {rank}"
    place.mkdir(exist_ok=True)
    inside = [argument.replace("data.path=", f"data.path={folder}/") for argument in arguments]
    process = forks.start(place, *inside, strikes=strikes, **environment(scheduler, rank, port, world_size))
    return lambda: forks.finish(process, place)


def run_ranks(folder: Path, scheduler: str, *arguments: str, world_size: int = 2) -> list[Result]:
    """Run all ranks of one command; world_size: their number, 2 for all schedulers but torchrun."""
    port = free_port()
    if scheduler == "one command a node":
        arguments = (*arguments, "trainer.num_nodes=2", "trainer.devices=1")
    ends = [start_rank(folder, scheduler, rank, port, *arguments, world_size=world_size) for rank in range(world_size)]
    return [end() for end in ends]
