"""What some systems lack, above all Windows, and the tests that need it."""

import ctypes
import os
import sys
import tempfile
from pathlib import Path

import pytest

WINDOWS = sys.platform == "win32"
# Windows' programs on another system.
WINE = sys.platform == "win32" and hasattr(ctypes.windll.ntdll, "wine_get_version")


def _can_link() -> bool:
    """Whether this user can create symbolic links. On Windows, that needs a privilege or the developer mode."""
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder) / "link"
        try:
            link.symlink_to("nowhere")
        except OSError:
            return False
        return link.is_symlink()


def require_kernel() -> None:
    """Skip a test of the compiled kernel on Windows without a C++ compiler. All other machines have to build it."""
    from rwkv_pl.ops.backend import load_all

    if WINDOWS and (reason := load_all("cpu")):
        pytest.skip(reason)


CAN_LINK = _can_link()
HAS_PIPES = hasattr(os, "mkfifo")

needs_links = pytest.mark.skipif(not CAN_LINK, reason="this user can't create symbolic links")
needs_pipes = pytest.mark.skipif(not HAS_PIPES, reason="no named pipes")
needs_signals = pytest.mark.skipif(WINDOWS, reason="Windows sends no signals to single processes")
needs_gloo = pytest.mark.skipif(WINE, reason="a collective operation of gloo hangs in wine")
needs_backward_errors = pytest.mark.skipif(WINE, reason="an error in a backward pass ends the process in wine")
replaces_mapped_files = pytest.mark.skipif(WINDOWS, reason="Windows refuses to replace or delete a mapped file")
needs_scripts = pytest.mark.skipif(WINDOWS, reason="the fake program is a shell script")
