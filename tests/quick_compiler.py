"""A C++ compiler that takes no time: it hands out the library that the real one has built for this machine before.

tests/test_wheel.py builds with the real one, whatever was built before.
"""

from pathlib import Path

import torch

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
    """Its path, in `folder`. For CXX."""
    assert load("cpu") == ""
    compiler = find_compiler()
    assert compiler is not None
    (library,) = (path for path in torch.ops.loaded_libraries if Path(path).name.startswith("wkv4_cpu"))
    script = folder / "quick-c++"
    script.write_text(SCRIPT.format(library=library, compiler=compiler.path))
    script.chmod(0o755)
    return str(script)
