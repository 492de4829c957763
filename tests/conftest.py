"""Test workers (pytest -n 2) use one thread each: if two workers share the cores, waiting threads slow both to a crawl.

A single process waits with a short spin, as the commands do.
"""

import gc
import os

import pytest
from brief import skip_disk_sync
from hypothesis import HealthCheck, settings
from systems import WINDOWS, WINE, require_kernel

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as in the commands

# Windows often has no C++ compiler. This warning would be in the stderr that tests read, of this and other processes.
WITHOUT_COMPILER = "ignore:.* runs in plain torch"
if WINDOWS:
    os.environ.setdefault("PYTHONWARNINGS", WITHOUT_COMPILER)
if WINE:
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")  # wine does not enable AMX

# On a busy machine one example can take a second.
settings.register_profile("any speed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any speed")

skip_disk_sync()

# These take a minute each and start first; if one started last, the other worker would wait for it.
LONGEST = ("test_wheel.py", "test_benchmarks.py")


def pytest_configure(config: pytest.Config) -> None:
    if WINDOWS:
        config.addinivalue_line("filterwarnings", WITHOUT_COMPILER)


@pytest.fixture(scope="session")
def compiled_kernel() -> None:
    require_kernel()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if hasattr(item, "callspec") and item.callspec.params.get("kernel") in ("auto", "compiled"):
        require_kernel()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONGEST)


def pytest_collection_finish() -> None:
    """Freeze all objects of torch, lightning and the tests: scanning them in every garbage collection is slow."""
    gc.collect()
    gc.freeze()
