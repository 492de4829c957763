"""Builds CPU libraries with zig, a C++ compiler that pip installs (package ziglang), for this system or another one.

zig has the headers and C libraries of all systems, and it links its own C++ library, libc++, into the kernel. It builds
libc++ at its first link for a target, which takes longer than the kernel, and keeps it in the cache folder.
"""

import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from rwkv_pl.files import cache_folder
from rwkv_pl.ops.toolchain import ZIG_TARGETS, Compiler

__all__ = ["build_with_zig", "has_cpp_library"]

TORCH_LIBRARIES = {"linux": "libtorch_cpu.so", "win": "torch_cpu.dll", "macosx": "libtorch_cpu.dylib"}


def has_cpp_library() -> bool:
    """Has zig built libc++ for any target? If not, the next build takes a minute longer."""
    return any((cache_folder() / "zig").glob("o/*/libc++.a"))


def build_with_zig(
    zig: Compiler, platform_tag: str, flags: list[str], folder: Path, sources: list[str], name: str
) -> Path:
    """Compile the `sources` in `folder` with `flags` and link them; returns the library `name`, in the same folder.

    platform_tag: a key of ZIG_TARGETS. Raises subprocess.CalledProcessError with the compiler's output as `stdout`.
    """
    system = platform_tag.partition("_")[0].removeprefix("many")
    library = folder / f"{name}{'.pyd' if system == 'win' else '.so'}"
    stub = TORCH_LIBRARIES[system]
    target = ["-target", ZIG_TARGETS[platform_tag]]
    # Every torch has this library. A stub of it, with the C functions that torch's headers declare, is enough to link.
    (folder / "stub.c").write_text(_stub_source(), encoding="utf-8")
    soname = {"linux": [f"-Wl,-soname,{stub}"], "win": [], "macosx": [f"-Wl,-install_name,@rpath/{stub}"]}[system]
    _run_zig(zig, folder, ["cc", *target, "-O1", "-shared", *soname, "stub.c", "-o", stub])
    include = ["-isystem", str(Path(torch.__path__[0]) / "include")]
    position = [] if system == "win" else ["-fPIC"]
    compilation = ["c++", *target, "-std=c++20", "-fvisibility=hidden", *position, *flags, *include, "-c"]
    objects = [str(Path(source).with_suffix(".obj" if system == "win" else ".o")) for source in sources]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [
            pool.submit(_run_zig, zig, folder, [*compilation, source, "-o", compiled])
            for source, compiled in zip(sources, objects, strict=True)
        ]
    for job in jobs:
        job.result()
    # Without the flags of a processor level, so that libc++ is built once for all levels.
    path = ["-Wl,-rpath,@loader_path/../../torch/lib"] if system == "macosx" else []
    links = [*position, *path, *objects, "-L.", "-ltorch_cpu"]
    _run_zig(zig, folder, ["c++", *target, "-O3", "-s", "-shared", *links, "-o", library.name])
    return library


def _stub_source() -> str:
    headers = ("csrc/inductor/aoti_torch/c/shim.h", "csrc/stable/c/shim.h")
    include = Path(torch.__path__[0], "include", "torch")
    declared = "".join((include / header).read_text(encoding="utf-8") for header in headers)
    names = sorted(set(re.findall(r"\b((?:aoti_)?torch_\w+)\(", declared)))
    head = "#ifdef _WIN32\n#define EXPORT __declspec(dllexport)\n#else\n#define EXPORT\n#endif\n"
    return head + "".join(f"EXPORT void {name}(void) {{}}\n" for name in names)


def _run_zig(zig: Compiler, folder: Path, arguments: list[str]) -> None:
    cache = cache_folder() / "zig"
    environment = os.environ | {"ZIG_GLOBAL_CACHE_DIR": str(cache), "ZIG_LOCAL_CACHE_DIR": str(folder / "zig-cache")}
    command = [zig.path, *arguments]
    run = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace",
    )  # fmt: skip
    if run.returncode:
        raise subprocess.CalledProcessError(run.returncode, command, run.stdout)
