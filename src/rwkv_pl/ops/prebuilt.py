"""Builds the libraries of a platform wheel, so that installing it needs no compiler: `make wheel`.

    python -m rwkv_pl.ops.prebuilt [--no-cuda] [--out FOLDER]

It builds a CPU library for every processor level and, if there is an nvcc, one CUDA library for all chips. They are
written to src/rwkv_pl/prebuilt/, where setup.py expects them.
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
from importlib import resources
from pathlib import Path

from rwkv_pl.ops.build import (
    CPU_SOURCES,
    CUDA_FLAGS,
    CUDA_SOURCES,
    LEVELS,
    PREBUILT,
    chip_flags,
    cpu_command,
    cpu_flags,
    nvcc_command,
    prebuilt_name,
)
from rwkv_pl.ops.toolchain import compiler_advice, find_compiler, find_nvcc

# Turing and later, as CUDA 13 supports. Newer chips compile the PTX of the last one.
CHIPS = (75, 80, 86, 89, 90, 100, 120)


def main() -> None:
    """Parse the command line and build all libraries."""
    parser = argparse.ArgumentParser(prog="python -m rwkv_pl.ops.prebuilt", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--no-cuda", action="store_true", help="build only the CPU libraries")
    parser.add_argument("--out", type=Path, default=PREBUILT, help="the folder to write to; it is emptied first")
    options = parser.parse_args()
    out: Path = options.out.absolute()
    compiler = find_compiler()
    if compiler is None:
        sys.exit(f"there is no C++ compiler: {compiler_advice()}")
    if sys.platform == "win32":
        sys.exit("libraries can be prebuilt on Linux and macOS only; on Windows they are built at the first use")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    with resources.as_file(resources.files("rwkv_pl.cuda")) as sources:
        for level in LEVELS if platform.machine() in ("x86_64", "AMD64") else ["portable"]:
            library = out / prebuilt_name("wkv4_cpu", level, CPU_SOURCES)
            command = cpu_command(compiler, cpu_flags(level), sources, library)
            _run(command, f"the CPU library for {level}")
        nvcc = None if options.no_cuda else find_nvcc("13")
        if nvcc is None:
            print("skipping the CUDA library" + ("" if options.no_cuda else ": there is no nvcc"))
            return
        chips = [*chip_flags(CHIPS), f"-gencode=arch=compute_{CHIPS[-1]},code=compute_{CHIPS[-1]}"]
        library = out / prebuilt_name("wkv4_cuda", "all", CUDA_SOURCES)
        flags = [*CUDA_FLAGS, *chips, f"--threads={os.cpu_count()}"]
        _run(nvcc_command(nvcc, flags, sources / CUDA_SOURCES[0], library), f"the CUDA library for {len(chips)} chips")


def _run(command: list[str], what: str) -> None:
    print(f"building {what} ...", flush=True)
    if subprocess.run(command).returncode:
        sys.exit(f"{what} could not be built: see the compiler's output above")


if __name__ == "__main__":
    main()
