"""Tests that run beside each other (pytest -n 2) take one thread each: two that wait for each other's threads crawl.

Alone, they wait with a short spin, as the commands do.
"""

import gc
import os

import pytest
from hypothesis import HealthCheck, settings

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# On a busy machine any example may take a second.
settings.register_profile("any speed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any speed")

# A minute each: begun last, one of two workers would wait for the other.
LONGEST = ("test_wheel.py", "test_benchmarks.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONGEST)


def pytest_collection_finish() -> None:
    """What torch, lightning and the tests themselves are made of stays: to look through it again and again is slow."""
    gc.collect()
    gc.freeze()
