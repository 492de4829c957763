"""The environment of a command: an import path that imports no untrusted code, and settings that torch reads."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

# Environment variables that name folders. A relative path counts from the folder where the command was typed.
FOLDER_VARIABLES = ("RWKV_PL_CACHE", "RWKV_PL_CONFIG")


def shorten_openmp_spin() -> None:
    """Let OpenMP's threads spin only shortly while they wait for each other. torch reads this when it is loaded.

    By default they spin so long that training is ten times slower or worse if other jobs share the cores.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "10000"


def silence_torch_warnings() -> None:
    """Let torch's C++ code print no warnings: a page for each lost connection. torch reads this when it is loaded."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


@contextlib.contextmanager
def safe_import_path() -> Iterator[None]:
    """Keep this process and its child Python processes from importing anything from their current folder.

    That folder may be untrusted: the jobs of a resumed sweep start in the folder that its multirun.yaml names. Relative
    and empty entries of PYTHONPATH become absolute, so they mean the same in child processes.

    Relative entries are removed from this process's sys.path too: an editable install leaves one there, and torch and
    Lightning would look for the entry points of plug-ins below it.
    """
    path = list(sys.path)
    sys.path[:] = [entry for entry in path if Path(entry).is_absolute()]
    before = {name: os.environ.get(name) for name in ("PYTHONSAFEPATH", "PYTHONPATH", *FOLDER_VARIABLES)}
    os.environ["PYTHONSAFEPATH"] = "1"
    for name in ("PYTHONPATH", *FOLDER_VARIABLES):
        if before[name]:
            entries = str(before[name]).split(os.pathsep) if name == "PYTHONPATH" else [str(before[name])]
            os.environ[name] = os.pathsep.join(str(Path(entry).absolute()) for entry in entries)
    try:
        yield
    finally:
        sys.path[:] = path
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
