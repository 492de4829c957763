"""tune_allocator in fresh processes: freed memory is reused, also after a late call; a second call does nothing."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

IS_GLIBC = sys.platform == "linux" and platform.libc_ver()[0] == "glibc"

FAULTS = """
import resource, torch
from rwkv_pl import tune_allocator

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        blocks = [torch.ones(6 << 20) for _ in range(4)]  # 24 MiB each
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def mapped():
    return next(line for line in open("/proc/self/status") if line.startswith("VmSize"))

before = faults()
took_effect = tune_allocator()
faults()  # the heap grows
after, size = faults(), mapped()
print(took_effect, before > 10_000, after < before / 20, tune_allocator() is took_effect and mapped() == size)
"""


@pytest.mark.skipif(not IS_GLIBC, reason="the system's allocator is not glibc's")
def test_freed_memory_is_reused_after_a_late_call() -> None:
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=False)
    assert done.stdout == "True True True True\n", done.stdout + done.stderr


ASK = [sys.executable, "-c", "import rwkv_pl; print(rwkv_pl.tune_allocator())"]


def test_returns_whether_it_took_effect() -> None:
    assert subprocess.run(ASK, capture_output=True, text=True, check=True).stdout == f"{IS_GLIBC}\n"


@pytest.mark.skipif(not IS_GLIBC or not shutil.which("cc"), reason="needs glibc and a C compiler")
def test_another_allocator_is_left_alone(tmp_path: Path) -> None:
    code = "extern void *__libc_malloc(long);\nvoid *malloc(long n) { return __libc_malloc(n); }"
    (tmp_path / "other.c").write_text(code)
    command = ["cc", "-fno-builtin", "-shared", "-fPIC", "-o", "other.so", "other.c"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    env = os.environ | {"LD_PRELOAD": str(tmp_path / "other.so")}
    assert subprocess.run(ASK, capture_output=True, text=True, check=True, env=env).stdout == "False\n"
