"""Builds the libraries of the platform wheels, so that installing one needs no compiler: `make wheels`.

    python -m rwkv_pl.ops.prebuilt [PLATFORM] [--no-cuda] [--out FOLDER]

For one platform, this one or another, zig builds the CPU libraries for every processor level. For Linux on x86-64, nvcc
builds the CUDA libraries for all chips, if there is an nvcc. They are written to src/rwkv_pl/prebuilt/, where setup.py
expects them.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from importlib import resources
from pathlib import Path

from rwkv_pl.ops.build import (
    CUDA_FLAGS,
    LEVELS,
    PREBUILT,
    chip_flags,
    cpu_flags,
    nvcc_command,
    prebuilt_name,
    translation_units,
)
from rwkv_pl.ops.libraries import LIBRARIES, Library
from rwkv_pl.ops.toolchain import ZIG_TARGETS, Compiler, find_nvcc, find_zig, host_platform
from rwkv_pl.ops.zig import build_with_zig

# Turing and later, as CUDA 13 supports. Newer chips compile the PTX of the last one.
CHIPS = (75, 80, 86, 89, 90, 100, 120)


def main() -> None:
    """Parse the command line and build all libraries."""
    parser = argparse.ArgumentParser(prog="python -m rwkv_pl.ops.prebuilt", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("platform", nargs="?", choices=ZIG_TARGETS, default=host_platform(), help="default: this one")
    parser.add_argument("--no-cuda", action="store_true", help="build only the CPU libraries")
    parser.add_argument("--out", type=Path, default=PREBUILT, help="the folder to write to; it is emptied first")
    options = parser.parse_args()
    zig = find_zig()
    if zig is None:
        sys.exit("zig is not installed: run `pip install ziglang`")
    if options.platform is None:
        sys.exit(f"there is no wheel for this platform; choose one of {', '.join(ZIG_TARGETS)}")
    out: Path = options.out.absolute()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    for level in LEVELS if options.platform.endswith(("x86_64", "amd64")) else ["portable"]:
        for library in LIBRARIES.values():
            _build_cpu_library(library, zig, options.platform, level, out)
    nvcc = find_nvcc("13") if options.platform == host_platform() == "manylinux_2_28_x86_64" else None
    if options.no_cuda or nvcc is None:
        print("no CUDA library" + ("" if options.no_cuda else ": it needs nvcc, and Linux on x86-64"))
    else:
        for library in LIBRARIES.values():
            if library.cuda_sources:
                _build_cuda_library(library, nvcc, out)


def _build_cpu_library(library: Library, zig: Compiler, platform_tag: str, level: str, out: Path) -> None:
    print(f"building the {library.title} for {platform_tag}, {level} ...", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for source in library.cpu_sources:
            (folder / source).write_bytes(resources.files("rwkv_pl.cuda").joinpath(source).read_bytes())
        flags, name = cpu_flags(level, msvc=False), f"{library.name}_cpu"
        try:
            built = build_with_zig(zig, platform_tag, flags, folder, translation_units(library.cpu_sources), name)
        except subprocess.CalledProcessError as error:
            sys.exit(f"{error.stdout}\nit could not be built: see the compiler's output above")
        shutil.move(built, out / prebuilt_name(name, level, library.cpu_sources, built.suffix))


def _build_cuda_library(library: Library, nvcc: Compiler, out: Path) -> None:
    chips = [*chip_flags(CHIPS), f"-gencode=arch=compute_{CHIPS[-1]},code=compute_{CHIPS[-1]}"]
    print(f"building the {library.title} for {len(chips)} chips ...", flush=True)
    flags = [*CUDA_FLAGS, *chips, f"--threads={os.cpu_count()}"]
    built = out / prebuilt_name(f"{library.name}_cuda", "all", library.cuda_sources)
    with resources.as_file(resources.files("rwkv_pl.cuda")) as sources:
        command = nvcc_command(nvcc, flags, sources / library.cuda_sources[0], built)
        if subprocess.run(command).returncode:
            sys.exit("it could not be built: see the compiler's output above")


if __name__ == "__main__":
    main()
