"""A C++ compiler that takes no time: it returns the libraries that the real compiler has already built here.

tests/test_wheel.py always builds with the real compiler.
"""

from pathlib import Path

import pytest
import torch
from systems import WINDOWS

from rwkv_pl.ops.backend import load_all
from rwkv_pl.ops.libraries import LIBRARIES
from rwkv_pl.ops.toolchain import find_compiler

SCRIPT = """#!/bin/sh
for made; do [ "$before" = -o ] && output="$made"; before="$made"; done
case "$*" in
*" -c "*) : >"$output" ;;
*" -o "*) name="${{output##*/}}"; cp '{libraries}'/"${{name%%_cpu*}}.so" "$output" ;;
*) exec '{compiler}' "$@" ;;
esac
"""


def quick_compiler(folder: Path) -> str:
    """Write the compiler into `folder`; return its path, for CXX."""
    if WINDOWS:
        pytest.skip("the fake compiler is a shell script")
    assert load_all("cpu") == ""
    compiler = find_compiler()
    assert compiler is not None
    libraries = folder / "libraries"
    libraries.mkdir()
    for name in LIBRARIES:
        (built,) = (path for path in torch.ops.loaded_libraries if Path(path).name.startswith(f"{name}_cpu"))
        if "building-" in str(built):  # built by this process, and renamed since
            built = max(Path(built).parents[1].glob(f"{name}_cpu*.so"), key=lambda path: path.stat().st_mtime)
        (libraries / f"{name}.so").symlink_to(built)
    script = folder / "quick-c++"
    script.write_text(SCRIPT.format(libraries=libraries, compiler=compiler.path))
    script.chmod(0o755)
    return str(script)
