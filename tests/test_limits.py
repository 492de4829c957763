"""The CPU and memory limits of a process, read from fake files of both versions of control groups."""

import math
import os

import psutil
import pytest
import torch

from rwkv_pl import limits

ALLOWED = len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process(), "cpu_affinity") else os.cpu_count()
MUCH = 9223372036854771712  # version 1's "no limit"


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """groups(own, {file: content}): own is the content of /proc/self/cgroup, the files are mounted."""
    monkeypatch.setattr(limits, "CGROUPS", tmp_path / "mounted")
    monkeypatch.setattr(limits, "OWN_GROUPS", tmp_path / "own")

    def make(own: str, files: dict[str, str]) -> None:
        (tmp_path / "own").write_text(own)
        for name, content in files.items():
            path = tmp_path / "mounted" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)

    return make


@pytest.fixture
def eight_cores(monkeypatch):
    monkeypatch.setattr(psutil.Process, "cpu_affinity", lambda self: list(range(8)), raising=False)


CPU = {
    "version 2, in a container": ("0::/\n", {"cpu.max": "150000 100000\n"}, 2),
    "version 2, no limit": ("0::/\n", {"cpu.max": "max 100000\n"}, 8),
    "version 2, of a group above": (
        "0::/pod.slice/one\n", {"pod.slice/one/cpu.max": "max 100000\n", "pod.slice/cpu.max": "50000 100000\n"}, 1,
    ),
    "version 2, more than there is": ("0::/\n", {"cpu.max": "6400000 100000\n"}, 8),
    "version 2 beside version 1": (
        "3:memory:/\n1:name=systemd:/\n0::/x\n", {"unified/x/cpu.max": "300000 100000\n"}, 3,
    ),
    "version 1": ("4:cpu,cpuacct:/t\n", {"cpu,cpuacct/t/cpu.cfs_quota_us": "350000\n",
                                          "cpu,cpuacct/t/cpu.cfs_period_us": "100000\n"}, 4),
    "version 1, no limit": ("4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
    "version 1, in a container": ("4:cpu:/docker/1f\n", {"cpu/cpu.cfs_quota_us": "50000\n",
                                                          "cpu/cpu.cfs_period_us": "100000\n"}, 1),
    "another controller's": (
        "4:cpuset:/\n", {"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8,
    ),
    "not to be read": ("0::/\n", {"cpu.max": "much\n"}, 8),
}  # fmt: skip


@pytest.mark.parametrize("case", CPU)
def test_available_cores_respect_the_cpu_quota(groups, eight_cores, case):
    own, files, cores = CPU[case]
    groups(own, files)
    assert limits.usable_cores() == cores


def test_available_cores_without_control_groups(groups):
    assert limits.usable_cores() == ALLOWED


@pytest.mark.parametrize(
    ("own", "files", "free"),
    [
        ("0::/\n", {"memory.max": "5000\n", "memory.current": "3000\n", "memory.stat": "anon 1\ninactive_file 70\n"},
         2070),
        ("0::/\n", {"memory.max": "max\n", "memory.current": "3000\n"}, math.inf),
        ("0::/a/b\n", {"a/b/memory.max": "5000\n", "a/b/memory.current": "1000\n", "a/memory.max": "4000\n",
                       "a/memory.current": "3900\n"}, 100),
        ("8:memory:/\n", {"memory/memory.limit_in_bytes": "5000\n", "memory/memory.usage_in_bytes": "3000\n",
                          "memory/memory.stat": "inactive_file 1\ntotal_inactive_file 50\n"}, 2050),
        ("8:memory:/\n", {"memory/memory.limit_in_bytes": f"{MUCH}\n", "memory/memory.usage_in_bytes": "1\n"},
         math.inf),
        ("8:memory:/\n", {"memory/memory.limit_in_bytes": "1000\n", "memory/memory.usage_in_bytes": "1200\n"}, 0),
    ],
)  # fmt: skip
def test_free_memory_respects_the_group_limit(groups, monkeypatch, own, files, free):
    machine = 10**10
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("", (), {"available": machine}))
    groups(own, files)
    assert limits.free_memory() == min(machine, free)


@pytest.fixture
def threads(monkeypatch):
    """Fake torch's number of threads, and clear the environment's."""
    before = torch.get_num_threads()
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, "")  # so that monkeypatch restores the variable, whatever is set below
        monkeypatch.delenv(name)
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("quota", "processes", "expected"), [(2, 1, 2), (3, 2, 1), (1, 4, 1)])
def test_threads_are_limited_by_the_cpu_quota(groups, eight_cores, threads, quota, processes, expected):
    groups("0::/\n", {"cpu.max": f"{quota}00000 100000"})
    limits.limit_threads(processes)
    assert (torch.get_num_threads(), os.environ["OMP_NUM_THREADS"]) == (expected, str(expected))


@pytest.mark.parametrize("named", ["OMP_NUM_THREADS", "MKL_NUM_THREADS", None])
def test_threads_are_unchanged_by_a_large_quota_or_user_setting(groups, eight_cores, threads, monkeypatch, named):
    groups("0::/\n", {"cpu.max": "100000 100000" if named else "500000 100000"})
    if named:
        monkeypatch.setenv(named, "4")
    limits.limit_threads()
    assert torch.get_num_threads() == 4
    assert named == "OMP_NUM_THREADS" or "OMP_NUM_THREADS" not in os.environ


def test_sweep_jobs_share_the_cpu_quota(groups, eight_cores, monkeypatch, tmp_path):
    from rwkv_pl.sweeps import pool

    groups("0::/\n", {"cpu.max": "400000 100000"})
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    started = []

    def no_process(*_, env, **__):
        started.append(env)
        raise OSError

    monkeypatch.setattr(pool.subprocess, "Popen", no_process)
    with pytest.raises(OSError):
        pool._start_job(pool.Job([], tmp_path), 2, {})
    assert started.pop()["OMP_NUM_THREADS"] == "2"
    monkeypatch.setenv("MKL_NUM_THREADS", "3")
    with pytest.raises(OSError):
        pool._start_job(pool.Job([], tmp_path), 2, {})
    assert "OMP_NUM_THREADS" not in started[0]
