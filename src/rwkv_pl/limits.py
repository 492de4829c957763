"""The part of a machine that this process may use: cores and memory, by its affinity and Linux's control groups.

The files of control groups, version 1 and 2: https://docs.kernel.org/admin-guide/cgroup-v2.html and
https://docs.kernel.org/admin-guide/cgroup-v1/. A limit of any group counts for the groups below it. In a container the
own group may be the root of what is mounted, under whatever name /proc/self/cgroup has.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path

import psutil

# Variables by which a user names the number of threads.
THREAD_VARIABLES = {"OMP_NUM_THREADS", "MKL_NUM_THREADS"}

CGROUPS, OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def usable_cores() -> int:
    """Cores that this process may run on at once: those of its affinity, at most its quota of time, rounded up."""
    process = psutil.Process()
    allowed = len(process.cpu_affinity()) if hasattr(process, "cpu_affinity") else os.cpu_count() or 1  # not on macOS
    return math.ceil(min([allowed, *map(_cpu_quota, _control_groups("cpu"))]))


def limit_threads(n_processes: int = 1) -> None:
    """Where a quota allows fewer threads than torch would start, and the user has named no number, starts that many.

    torch heeds the affinity, and knows no quota. n_processes: so many share the cores, and inherit the number.
    """
    if THREAD_VARIABLES & os.environ.keys():
        return
    import torch

    if (cores := usable_cores()) < torch.get_num_threads():
        n_threads = max(1, cores // n_processes)
        torch.set_num_threads(n_threads)
        os.environ["OMP_NUM_THREADS"] = str(n_threads)


def free_memory() -> int:
    """Bytes that this process can still take: free in the machine, and in each of its control groups."""
    return max(0, int(min([psutil.virtual_memory().available, *map(_free_bytes, _control_groups("memory"))])))


def _control_groups(controller: str) -> Iterator[Path]:
    """Folders of the groups whose `controller` limits this process: its own, and those above it."""
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
    """Those in a group's file, which says "max" where there is no limit; none where there is no such file."""
    try:
        return [float(word.replace("max", "inf")) for word in file.read_text().split()]
    except (OSError, ValueError):
        return []


def _cpu_quota(group: Path) -> float:
    """Cores' worth of time in each period."""
    two = _read_numbers(group / "cpu.max") or _read_numbers(group / "cpu.cfs_quota_us") + _read_numbers(
        group / "cpu.cfs_period_us"
    )
    quota, period = two if len(two) == 2 else (math.inf, 1)
    return quota / period if quota > 0 else math.inf  # version 1 says -1 where there is no limit


def _free_bytes(group: Path) -> float:
    """Bytes up to the limit. A file's pages that lie in memory unused are free: the system takes them back."""
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
