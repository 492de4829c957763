"""Builds the compiled operators at the first use, caches them in the user's cache folder, and loads them.

A wheel can contain them prebuilt (see prebuilt.py); then nothing is built here.

A library's name has a digest of everything that it was built from. It is built in a temporary folder and moved into
place under a file lock, which the system releases if the process dies. So neither concurrent nor killed processes
leave a broken library. A failed build is remembered under the same name, so that not every start repeats it.
"""

import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
from filelock import FileLock

from rwkv_pl.files import cache_folder
from rwkv_pl.ops.libraries import Library
from rwkv_pl.ops.toolchain import (
    Compiler,
    compiler_advice,
    describe_missing_compiler,
    describe_nvcc_problem,
    find_compiler,
    find_nvcc,
    host_platform,
    system_compiler_advice,
)
from rwkv_pl.ops.zig import build_with_zig, has_cpp_library

__all__ = [
    "CUDA_FLAGS", "LEVELS", "PREBUILT", "RETRY_ADVICE", "STABLE_ABI", "SUFFIX",
    "BuildError", "chip_flags", "cpu_command", "cpu_flags", "cpu_level", "forget_failures", "load_cpu_library",
    "load_cuda_library", "nvcc_command", "prebuilt_name", "translation_units",
]  # fmt: skip

# Not -march=native: if the cache is shared or copied, its library crashes with SIGILL on another machine.
LEVELS = {
    "x86-64-v4": [
        "-mavx512f", "-mavx512cd", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mavx2", "-mfma",
        "-mprefer-vector-width=512",
    ],
    "x86-64-v3": ["-mavx2", "-mfma"],
    "portable": [],
}  # fmt: skip
MSVC_LEVELS = {"x86-64-v4": ["/arch:AVX512"], "x86-64-v3": ["/arch:AVX2"], "portable": []}

# 2.10, the oldest torch whose stable ABI has everything that is used.
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"

# Subnormals flushed to 0, and division with an error of 2 ulp: a seventh fewer instructions.
CUDA_FLAGS = ["-std=c++17", "-O3", "-ftz=true", "-prec-div=false", STABLE_ABI]


class BuildError(RuntimeError):
    """The compiled operators are not available; the message says in one line why, and the fix."""


# The folder of the prebuilt libraries in a platform wheel.
PREBUILT = Path(__file__).parents[1] / "prebuilt"
FAILED_SUFFIX = ".failed"
RETRY_ADVICE = "; run rwkv-doctor to build again"
SUFFIX = ".pyd" if sys.platform == "win32" else ".so"


@dataclass(frozen=True)
class LibrarySpec:
    """The inputs of one library's build. ``compile(folder, spec)`` builds it in the folder of the sources and loads it.

    title: what the library contains, and seconds: the typical duration of the build, to print. host: the C++ compiler
    that nvcc calls.
    """

    name: str
    title: str
    target: str
    sources: tuple[str, ...]
    compiler: Compiler
    flags: list[str]
    seconds: int
    compile: Callable[[Path, "LibrarySpec"], Path]
    host: Compiler | None = None


def load_cpu_library(library: Library) -> None:
    """Register the library's CPU operators ``torch.ops.rwkv_pl.*``; on a cache miss, build them (about 15 s).

    Raises BuildError if there is no compiler, the build fails, or the cache folder cannot be written.
    """
    level, name, sources = cpu_level(), f"{library.name}_cpu", library.cpu_sources
    if _load_prebuilt(prebuilt_name(name, level, sources)):
        return
    compiler = _host_compiler()
    build, seconds = (_compile_with_zig, 15 if has_cpp_library() else 60) if compiler.is_zig else (_compile_cpu, 15)
    flags = cpu_flags(level, msvc=sys.platform == "win32" and not compiler.is_zig)
    _load_or_build(LibrarySpec(name, library.title, level, sources, compiler, flags, seconds, build))


def load_cuda_library(library: Library) -> None:
    """Register the library's CUDA operators, built for this machine's GPUs (about 15 s). Load the CPU library first.

    Raises BuildError as `load_cpu_library` does, if nvcc is missing or its CUDA version is not torch's, and if the
    library has no CUDA operators.
    """
    name, sources = f"{library.name}_cuda", library.cuda_sources
    if not sources:
        raise BuildError(f"the {library.title} run only on a CPU")
    if torch.version.cuda is None:
        raise BuildError("this torch has no CUDA; install a CUDA build from pytorch.org")
    if _load_prebuilt(prebuilt_name(name, "all", sources)):
        return
    host, nvcc = _host_compiler(), find_nvcc(torch.version.cuda)
    if host.is_zig:
        raise BuildError(f"nvcc does not work with zig, the only C++ compiler here; {system_compiler_advice()}")
    problem = describe_nvcc_problem(nvcc, torch.version.cuda)
    if problem or nvcc is None:
        raise BuildError(problem)
    devices = range(torch.cuda.device_count())
    chips = sorted({"{}{}".format(*torch.cuda.get_device_capability(device)) for device in devices})
    target = "-".join(f"sm_{chip}" for chip in chips)
    flags = [*CUDA_FLAGS, *chip_flags(chips)]
    _load_or_build(LibrarySpec(name, library.title, target, sources, nvcc, flags, 15, _compile_cuda, host))


def prebuilt_name(name: str, target: str, sources: tuple[str, ...], suffix: str = SUFFIX) -> str:
    """The file name of a prebuilt library, with a digest of its sources: a stale one in a checkout is not loaded."""
    return f"{name}-{target}-{_digest(sources)}{suffix}"


def _load_prebuilt(name: str) -> bool:
    try:
        torch.ops.load_library(PREBUILT / name)
    except OSError:  # it is missing, or this system is older than the one that built it
        return False
    return True


def _host_compiler() -> Compiler:
    compiler = find_compiler()
    if compiler is None:
        raise BuildError(f"no C++ compiler ({describe_missing_compiler()}); {compiler_advice()}")
    return compiler


def _load_or_build(spec: LibrarySpec) -> None:
    folder = cache_folder() / "kernels"
    library = folder / f"{spec.name}-{spec.target}-{_spec_digest(spec)}{SUFFIX}"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
        if _try_load(library):
            return
        with FileLock(folder / "lock"):
            if not _try_load(library):
                if (failure := library.with_suffix(FAILED_SUFFIX)).exists():
                    raise BuildError(failure.read_text(encoding="utf-8"))
                _build(library, spec)
    except OSError as error:
        raise BuildError(
            f"the cache folder {folder} cannot be used ({error.strerror or error}); "
            "set RWKV_PL_CACHE to a writable folder"
        ) from error


def forget_failures() -> None:
    """Let the builds that failed before be tried again."""
    with suppress(OSError):  # if the cache folder cannot be used, the next build says so
        for failure in (cache_folder() / "kernels").glob(f"*{FAILED_SUFFIX}"):
            failure.unlink()


def cpu_level() -> str:
    """The best of LEVELS that this machine supports; ``RWKV_PL_CPU_LEVEL`` overrides it."""
    forced = os.environ.get("RWKV_PL_CPU_LEVEL")
    if forced:
        if forced not in LEVELS:
            raise BuildError(f"RWKV_PL_CPU_LEVEL={forced} is unknown; use one of {', '.join(LEVELS)}")
        return forced
    capability = torch.backends.cpu.get_cpu_capability()
    return {"AVX512": "x86-64-v4", "AVX2": "x86-64-v3"}.get(capability, "portable")


def cpu_flags(level: str, msvc: bool = sys.platform == "win32") -> list[str]:
    """The compiler flags for one of LEVELS, for Visual Studio or for gcc, clang and zig."""
    if msvc:
        return ["/O2", STABLE_ABI, *MSVC_LEVELS[level]]
    # Without the two -fno flags, gcc preserves errno and floating-point exceptions and does not vectorise.
    return ["-O3", "-fno-math-errno", "-fno-trapping-math", STABLE_ABI, *LEVELS[level]]


def _spec_digest(spec: LibrarySpec) -> str:
    compilers = [compiler for compiler in (spec.compiler, spec.host) if compiler]
    programs = [text for compiler in compilers for text in (compiler.command, compiler.path, compiler.version)]
    made_from = [*programs, *spec.flags, torch.__version__, platform.machine()]
    return _digest(spec.sources, "\0".join(made_from))


def _digest(sources: tuple[str, ...], made_from: str = "") -> str:
    digest = hashlib.sha256(made_from.encode())
    for name in sources:
        digest.update(resources.files("rwkv_pl.cuda").joinpath(name).read_bytes())
    return digest.hexdigest()[:16]


def _checksum_path(library: Path) -> Path:
    return library.with_suffix(".sha256")


def _try_load(library: Path) -> bool:
    # The linker loads a truncated library and crashes with SIGBUS at its first missing page, so verify the checksum.
    try:
        is_intact = _checksum_path(library).read_text() == hashlib.sha256(library.read_bytes()).hexdigest()
    except FileNotFoundError:
        return False
    if not is_intact:
        return False
    try:
        torch.ops.load_library(library)
    except OSError:
        return False
    return True


def _build(library: Path, spec: LibrarySpec) -> None:
    # Only the holder of the lock builds, so all existing build folders are leftovers of killed processes.
    for leftover in library.parent.glob("building-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    print(
        f"rwkv_pl: building the {spec.title} for {spec.target} with {spec.compiler.title} "
        f"(once, about {spec.seconds} s) ...",
        file=sys.stderr,
        flush=True,
    )
    folder = Path(tempfile.mkdtemp(prefix="building-", dir=library.parent))
    try:
        for name in spec.sources:
            (folder / name).write_bytes(resources.files("rwkv_pl.cuda").joinpath(name).read_bytes())
        built = spec.compile(folder, spec)
        checksum = hashlib.sha256(built.read_bytes()).hexdigest()
        _checksum_path(built).write_text(checksum)
        # The checksum last: without it, _try_load treats the library as missing.
        built.replace(library)
        _checksum_path(built).replace(_checksum_path(library))
    except BuildError as error:
        # A full disk or a missing package is not remembered: it is found quickly, and fixed outside of the build.
        if not isinstance(error.__cause__, ImportError | OSError):
            library.with_suffix(FAILED_SUFFIX).write_text(str(error), encoding="utf-8")
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _single_program(compiler: Compiler, folder: Path) -> str:
    """Return the compiler as one program, for torch and nvcc: its path, or a script if its command has arguments."""
    if sys.platform == "win32":
        return compiler.command
    words = shlex.split(compiler.command)
    if len(words) == 1:
        return compiler.path
    script = folder / "c++"
    script.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n', encoding="utf-8")
    script.chmod(0o700)
    return str(script)


def _compile_cpu(folder: Path, spec: LibrarySpec) -> Path:
    name = spec.name
    try:
        import ninja
        from torch.utils import cpp_extension

        # torch searches for ninja only on PATH, and the folder of pip's ninja is not always on it.
        path = os.pathsep.join((ninja.BIN_DIR, os.environ.get("PATH", "")))
        with _set_environment(PATH=path, CXX=_single_program(spec.compiler, folder)):
            cpp_extension.load(
                name,
                [str(folder / source) for source in translation_units(spec.sources)],
                extra_cflags=spec.flags,
                build_directory=str(folder),
                is_python_module=False,
            )
    except (ImportError, RuntimeError, OSError, subprocess.SubprocessError) as error:
        raise _build_error(spec, folder, str(error)) from error
    # torch adds a number to the name if this process has built the library before.
    return next(folder.glob(f"{name}*{cpp_extension.LIB_EXT}"))


def _compile_with_zig(folder: Path, spec: LibrarySpec) -> Path:
    platform_tag = host_platform()
    assert platform_tag is not None, "Compiler.is_zig"
    try:
        units = translation_units(spec.sources)
        library = build_with_zig(spec.compiler, platform_tag, spec.flags, folder, units, spec.name)
    except (OSError, subprocess.CalledProcessError) as error:
        raise _build_error(spec, folder, getattr(error, "stdout", "") or str(error)) from error
    torch.ops.load_library(library)
    return library


def chip_flags(chips: Iterable[object]) -> list[str]:
    """The flags of nvcc that select the chips, given as compute capabilities without the dot, such as 90."""
    return [f"-gencode=arch=compute_{chip},code=sm_{chip}" for chip in chips]


def translation_units(sources: tuple[str, ...]) -> list[str]:
    """The sources to compile; the others are headers."""
    return [source for source in sources if source.endswith(".cpp")]


def cpu_command(
    compiler: Compiler, flags: list[str], folder: Path, sources: tuple[str, ...], library: Path
) -> list[str]:
    """The command that builds a CPU library from its sources in `folder`, without ninja; for gcc and clang."""
    torch_folder = Path(torch.__path__[0])
    units = [str(folder / source) for source in translation_units(sources)]
    return [
        *shlex.split(compiler.command), "-std=c++20", *flags, "-fPIC", "-shared",
        "-isystem", str(torch_folder / "include"), *units, "-o", str(library),
        f"-L{torch_folder / 'lib'}", "-ltorch_cpu",
    ]  # fmt: skip


def nvcc_command(nvcc: Compiler, flags: list[str], source: Path, library: Path) -> list[str]:
    """The command that builds a CUDA library; the library loads with every torch, with or without CUDA."""
    torch_folder = Path(torch.__path__[0])
    # Every torch has libtorch.so, which loads libtorch_cuda if there is one. The library uses no symbol of it, so the
    # linker would drop it without --no-as-needed. All in one -Xlinker: nvcc reorders several.
    link = ["-L" + str(torch_folder / "lib"), "-Xlinker", "--no-as-needed,-ltorch,--as-needed", "-ltorch_cpu"]
    # The CUDA libraries of pip packages are in lib; nvcc searches only lib64.
    pip = Path(nvcc.path).parents[1] / "lib"
    return [
        nvcc.path, *flags, "-Xcompiler", "-fPIC", "-shared", f"-I{torch_folder / 'include'}", str(source),
        "-o", str(library), *link, *([f"-L{pip}"] if pip.is_dir() else []),
    ]  # fmt: skip


def _compile_cuda(folder: Path, spec: LibrarySpec) -> Path:
    library = folder / f"{spec.name}.so"
    host = ["-ccbin", _single_program(spec.host, folder)] if spec.host and sys.platform != "win32" else []
    command = nvcc_command(spec.compiler, [*spec.flags, *host], folder / spec.sources[0], library)
    run = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if run.returncode != 0:
        raise _build_error(spec, folder, run.stderr + run.stdout or f"exit status {run.returncode}")
    # cpp_extension.load in _compile_cpu does this itself.
    torch.ops.load_library(library)
    return library


def _build_error(spec: LibrarySpec, folder: Path, output: str) -> BuildError:
    # The error format of gcc, clang, cl, nvcc and their linkers. Lines before it are ninja's commands and warnings.
    lines = output.splitlines()
    first = next((line for line in lines if re.search(r"\berror( [A-Z]+\d+)?:", line)), lines[0])
    kept = folder.parent / f"{spec.name}.log"
    kept.write_text(output, encoding="utf-8")
    return BuildError(
        f"the build with {spec.compiler.command} failed: {first}; its full output is in {kept}{RETRY_ADVICE}"
    )


@contextmanager
def _set_environment(**variables: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
