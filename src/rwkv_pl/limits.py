"""The cores and the memory that this process may use, according to its affinity and Linux's control groups.

Control groups, versions 1 and 2: https://docs.kernel.org/admin-guide/cgroup-v2.html and
https://docs.kernel.org/admin-guide/cgroup-v1/. A group's limit also applies to the groups below it. In a container, the
process's own group may be mounted as the root, whatever path /proc/self/cgroup has.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path

import psutil

# Environment variables with which a user sets the number of threads.
THREAD_VARIABLES = {"OMP_NUM_THREADS", "MKL_NUM_THREADS"}

CGROUPS, OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def usable_cores() -> int:
    """Return the number of cores that this process can use at once: its affinity, limited by its quota, rounded up."""
    process = psutil.Process()
    allowed = len(process.cpu_affinity()) if hasattr(process, "cpu_affinity") else os.cpu_count() or 1  # not on macOS
    return math.ceil(min([allowed, *map(_cpu_quota, _control_groups("cpu"))]))


def limit_threads(n_processes: int = 1) -> None:
    """Lower torch's number of threads to the CPU quota, unless the user has set a number.

    torch respects the affinity, but not a quota. n_processes: number of processes that share the cores; those that this
    one starts inherit the result.
    """
    if THREAD_VARIABLES & os.environ.keys():
        return
    import torch

    if (cores := usable_cores()) < torch.get_num_threads():
        n_threads = max(1, cores // n_processes)
        torch.set_num_threads(n_threads)
        os.environ["OMP_NUM_THREADS"] = str(n_threads)


def free_memory() -> int:
    """Return the bytes that this process can still allocate: the least of the machine and its control groups."""
    return max(0, int(min([psutil.virtual_memory().available, *map(_free_bytes, _control_groups("memory"))])))


def _control_groups(controller: str) -> Iterator[Path]:
    """Yield the folders of the groups whose `controller` limits this process: its own group and all above it."""
    try:
        lines = [line.split(":", 2) for line in OWN_GROUPS.read_text().splitlines()]
    except OSError:  # not Linux
        return
    for _, controllers, path in lines:
        if not controllers:
            roots = [CGROUPS, CGROUPS / "unified"]
        elif controller in controllers.split(","):
            roots = [CGROUPS / controllers, CGROUPS / controller]
        else:
            continue
        parts = Path(path.lstrip("/")).parts
        for root in (root for root in roots if root.is_dir()):
            yield from (root.joinpath(*parts[:n]) for n in range(len(parts), -1, -1))


def _read_numbers(file: Path) -> list[float]:
    """Read the numbers in a group's file; "max", no limit, is infinity. Empty if the file does not exist."""
    try:
        return [float(word.replace("max", "inf")) for word in file.read_text().split()]
    except (OSError, ValueError):
        return []


def _cpu_quota(group: Path) -> float:
    """Return a group's CPU quota in cores: allowed CPU time over the length of a period."""
    two = _read_numbers(group / "cpu.max") or _read_numbers(group / "cpu.cfs_quota_us") + _read_numbers(
        group / "cpu.cfs_period_us"
    )
    quota, period = two if len(two) == 2 else (math.inf, 1)
    return quota / period if quota > 0 else math.inf  # version 1 has -1 for no limit


def _free_bytes(group: Path) -> float:
    """Return the bytes up to a group's limit. Inactive page cache counts as free: the system can reclaim it."""
    for limit, used, unused in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        if bounds := _read_numbers(group / limit):
            try:
                stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            except OSError:
                stat = {}
            return bounds[0] - sum(_read_numbers(group / used)) + float(stat.get(unused, 0))
    return math.inf
