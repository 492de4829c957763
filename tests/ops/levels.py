"""Select one of the levels of the CPU library."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rwkv_pl.ops.build import LEVELS, cpu_level

TESTS = os.pathsep.join(str(Path(__file__).parents[1] / room) for room in ("ops", "model", ""))


def run_at(level: str, code: str) -> None:
    """Run `code` in a fresh process, since a process loads one library. It can import the tests of ops and model."""
    order = list(LEVELS)
    if order.index(level) < order.index(cpu_level()):
        pytest.skip(f"this machine does not run {level}")
    path = os.pathsep.join(filter(None, [TESTS, os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"RWKV_PL_CPU_LEVEL": level, "PYTHONPATH": path}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
