"""A C++ compiler that takes no time: it returns the library that the real compiler has already built here.

tests/test_wheel.py always builds with the real compiler.
"""

from pathlib import Path

import pytest
import torch
from systems import WINDOWS

from rwkv_pl.ops.backend import load
from rwkv_pl.ops.toolchain import find_compiler

SCRIPT = """#!/bin/sh
for made; do [ "$before" = -o ] && output="$made"; before="$made"; done
case "$*" in
*" -c "*) : >"$output" ;;
*" -o "*) cp '{library}' "$output" ;;
*) exec '{compiler}' "$@" ;;
esac
"""


def quick_compiler(folder: Path) -> str:
    """Write the compiler into `folder`; return its path, for CXX."""
    if WINDOWS:
        pytest.skip("the fake compiler is a shell script")
    assert load("cpu") == ""
    compiler = find_compiler()
    assert compiler is not None
    (library,) = (path for path in torch.ops.loaded_libraries if Path(path).name.startswith("wkv4_cpu"))
    if "building-" in str(library):  # built by this process, and renamed since
        library = max(Path(library).parents[1].glob("wkv4_cpu*.so"), key=lambda path: path.stat().st_mtime)
    script = folder / "quick-c++"
    script.write_text(SCRIPT.format(library=library, compiler=compiler.path))
    script.chmod(0o755)
    return str(script)
