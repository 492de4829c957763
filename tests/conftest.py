"""Tests that run beside each other (pytest -n 2) take one thread each: two that wait for each other's threads crawl.

Alone, they wait with a short spin, as the commands do.
"""

import gc
import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def pytest_collection_finish() -> None:
    """What torch, lightning and the tests themselves are made of stays: to look through it again and again is slow."""
    gc.collect()
    gc.freeze()
