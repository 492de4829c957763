"""Build the compiled operators at first use, keep them in the user's cache folder, and load them.

A wheel may carry them built (see prebuilt.py); then nothing is built here.

A library is named by a digest of all that it was made from. It is built aside and moved into place under a lock that
the system takes from a process that dies, so that neither two processes at once nor a killed one disturb the next.
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
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
from filelock import FileLock

from rwkv_pl.files import cache_folder
from rwkv_pl.ops.toolchain import (
    Compiler,
    compiler_advice,
    describe_missing_compiler,
    describe_nvcc_problem,
    find_compiler,
    find_nvcc,
)

__all__ = [
    "CPU_SOURCES", "CUDA_FLAGS", "CUDA_SOURCES", "LEVELS", "PREBUILT", "STABLE_ABI", "BuildError", "chip_flags",
    "cpu_command", "cpu_flags", "cpu_level", "load_cpu_library", "load_cuda_library", "nvcc_command", "prebuilt_name",
]  # fmt: skip

CPU_SOURCES = (
    "wkv4_cpu.cpp", "norm_token_shift_cpu.cpp", "elementwise_cpu.cpp", "cross_entropy_cpu.cpp", "rwkv4_step_cpu.cpp",
    "cpu_lanes.h", "cpu_numbers.h", "wkv4_math.h", "wkv4_tensor.h",
)  # fmt: skip
CUDA_SOURCES = (
    "wkv4_cuda.cu", "wkv4_launch.cuh", "wkv4_scan.cuh", "wkv4_walk.cuh", "wkv4_gpu.h", "wkv4_math.h", "wkv4_tensor.h",
)  # fmt: skip

# Not -march=native: its library, cached or copied, dies of an illegal instruction on the next machine.
LEVELS = {
    "x86-64-v4": [
        "-mavx512f", "-mavx512cd", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mavx2", "-mfma",
        "-mprefer-vector-width=512",
    ],
    "x86-64-v3": ["-mavx2", "-mfma"],
    "portable": [],
}  # fmt: skip
MSVC_LEVELS = {"x86-64-v4": ["/arch:AVX512"], "x86-64-v3": ["/arch:AVX2"], "portable": []}

# The oldest torch whose stable ABI has all that is used.
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"

# Subnormals as 0 and a division that errs by 2 units in the last place: a seventh fewer instructions.
CUDA_FLAGS = ["-std=c++17", "-O3", "-ftz=true", "-prec-div=false", STABLE_ABI]


class BuildError(RuntimeError):
    """There is no compiled operator; the message says in one line why and what to do."""


# Where a platform wheel carries libraries that are built already.
PREBUILT = Path(__file__).parents[1] / "prebuilt"
SUFFIX = ".pyd" if sys.platform == "win32" else ".so"


@dataclass(frozen=True)
class LibrarySpec:
    """What one library is made of; ``compile(folder, recipe)`` makes it where the sources are, and loads it."""

    name: str
    target: str
    sources: tuple[str, ...]
    compiler: Compiler
    flags: list[str]
    seconds: int
    compile: Callable[[Path, "LibrarySpec"], Path]


def load_cpu_library() -> None:
    """Register the CPU operators ``torch.ops.rwkv_pl.*``, building them where the cache has none (about 15 s).

    Raises BuildError without a compiler, where the build fails and where the cache folder cannot be written.
    """
    level = cpu_level()
    if _load_prebuilt(prebuilt_name("wkv4_cpu", level, CPU_SOURCES)):
        return
    _load_or_build(LibrarySpec("wkv4_cpu", level, CPU_SOURCES, _host_compiler(), cpu_flags(level), 15, _compile_cpu))


def load_cuda_library() -> None:
    """The same for CUDA, for this machine's GPUs (about 15 s); the operators must be registered by the CPU's library.

    Raises BuildError as well where nvcc is missing or its CUDA is not torch's.
    """
    if torch.version.cuda is None:
        raise BuildError("this torch has no CUDA; install one that has, from pytorch.org")
    if _load_prebuilt(prebuilt_name("wkv4_cuda", "all", CUDA_SOURCES)):
        return
    host, nvcc = _host_compiler(), find_nvcc(torch.version.cuda)
    problem = describe_nvcc_problem(nvcc, torch.version.cuda)
    if problem or nvcc is None:
        raise BuildError(problem)
    devices = range(torch.cuda.device_count())
    chips = sorted({"{}{}".format(*torch.cuda.get_device_capability(device)) for device in devices})
    flags = [*CUDA_FLAGS, *chip_flags(chips), *(["-ccbin", host.path] if sys.platform != "win32" else [])]
    target = "-".join(f"sm_{chip}" for chip in chips)
    _load_or_build(LibrarySpec("wkv4_cuda", target, CUDA_SOURCES, nvcc, flags, 15, _compile_cuda))


def prebuilt_name(name: str, target: str, sources: tuple[str, ...]) -> str:
    """Of a library in a wheel. With a digest of its sources: in a checkout one that was made before is left alone."""
    return f"{name}-{target}-{_digest(sources)}{SUFFIX}"


def _load_prebuilt(name: str) -> bool:
    try:
        torch.ops.load_library(PREBUILT / name)
    except OSError:  # there is none, or this system is older than the one that built it
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
                _build(library, spec)
    except OSError as error:
        raise BuildError(
            f"the cache folder {folder} cannot be used ({error.strerror or error}); "
            "set RWKV_PL_CACHE to a folder of your own"
        ) from error


def cpu_level() -> str:
    """The best of LEVELS that this machine runs; ``RWKV_PL_CPU_LEVEL`` names another."""
    forced = os.environ.get("RWKV_PL_CPU_LEVEL")
    if forced:
        if forced not in LEVELS:
            raise BuildError(f"RWKV_PL_CPU_LEVEL={forced} is not known; choose one of {', '.join(LEVELS)}")
        return forced
    capability = torch.backends.cpu.get_cpu_capability()
    return {"AVX512": "x86-64-v4", "AVX2": "x86-64-v3"}.get(capability, "portable")


def cpu_flags(level: str) -> list[str]:
    """The compiler's, for one of LEVELS."""
    if sys.platform == "win32":
        return ["/O2", STABLE_ABI, *MSVC_LEVELS[level]]
    # The two -fno: without them gcc keeps errno and floating-point flags right and makes no vectors.
    return ["-O3", "-fno-math-errno", "-fno-trapping-math", STABLE_ABI, *LEVELS[level]]


def _spec_digest(spec: LibrarySpec) -> str:
    compiler = spec.compiler
    made_from = [
        compiler.command,
        compiler.path,
        compiler.version,
        *spec.flags,
        torch.__version__,
        platform.machine(),
    ]
    return _digest(spec.sources, "\0".join(made_from))


def _digest(sources: tuple[str, ...], made_from: str = "") -> str:
    digest = hashlib.sha256(made_from.encode())
    for name in sources:
        digest.update(resources.files("rwkv_pl.cuda").joinpath(name).read_bytes())
    return digest.hexdigest()[:16]


def _checksum_path(library: Path) -> Path:
    return library.with_suffix(".sha256")


def _try_load(library: Path) -> bool:
    # The linker takes a library that was cut short, and dies of a bus error at its first missing page: compare first.
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
    # Whoever holds the lock is the only one who builds, so all other building folders are leftovers.
    for leftover in library.parent.glob("building-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    print(
        f"rwkv_pl: building the WKV kernel for {spec.target} with {spec.compiler.title} "
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
        # The seal last: until then the library counts as not there.
        built.replace(library)
        _checksum_path(built).replace(_checksum_path(library))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _compile_cpu(folder: Path, spec: LibrarySpec) -> Path:
    name, compiler = spec.name, spec.compiler
    try:
        import ninja
        from torch.utils import cpp_extension

        # pip's ninja lies beside a Python that need not be on PATH, and torch looks for it there alone.
        with _set_environment(PATH=os.pathsep.join((ninja.BIN_DIR, os.environ.get("PATH", ""))), CXX=compiler.command):
            cpp_extension.load(
                name,
                [str(folder / source) for source in translation_units(spec.sources)],
                extra_cflags=spec.flags,
                build_directory=str(folder),
                is_python_module=False,
            )
    except (ImportError, RuntimeError, OSError, subprocess.SubprocessError) as error:
        raise _build_error(spec, folder, str(error)) from error
    # torch adds a number to the name where this process has built before.
    return next(folder.glob(f"{name}*{cpp_extension.LIB_EXT}"))


def chip_flags(chips: Iterable[object]) -> list[str]:
    """nvcc's, for chips as in 90."""
    return [f"-gencode=arch=compute_{chip},code=sm_{chip}" for chip in chips]


def translation_units(sources: tuple[str, ...]) -> list[str]:
    """Those that are compiled; the others are included by them."""
    return [source for source in sources if source.endswith(".cpp")]


def cpu_command(compiler: Compiler, flags: list[str], folder: Path, library: Path) -> list[str]:
    """The command that makes the CPU's library from its sources in `folder`, without ninja; for gcc and clang."""
    torch_folder = Path(torch.__path__[0])
    sources = [str(folder / source) for source in translation_units(CPU_SOURCES)]
    return [
        *shlex.split(compiler.command), "-std=c++20", *flags, "-fPIC", "-shared",
        "-isystem", str(torch_folder / "include"), *sources, "-o", str(library),
        f"-L{torch_folder / 'lib'}", "-ltorch_cpu",
    ]  # fmt: skip


def nvcc_command(nvcc: Compiler, flags: list[str], source: Path, library: Path) -> list[str]:
    """The command that makes a library which loads beside every torch, with CUDA or without."""
    torch_folder = Path(torch.__path__[0])
    # libtorch.so is in every torch and brings libtorch_cuda where there is one; nothing of ours names a symbol of it,
    # so the linker would leave it out. In one option: nvcc changes the order of several.
    link = ["-L" + str(torch_folder / "lib"), "-Xlinker", "--no-as-needed,-ltorch,--as-needed", "-ltorch_cpu"]
    # Where pip puts CUDA; nvcc itself looks in lib64.
    pip = Path(nvcc.path).parents[1] / "lib"
    return [
        nvcc.path, *flags, "-Xcompiler", "-fPIC", "-shared", f"-I{torch_folder / 'include'}", str(source),
        "-o", str(library), *link, *([f"-L{pip}"] if pip.is_dir() else []),
    ]  # fmt: skip


def _compile_cuda(folder: Path, spec: LibrarySpec) -> Path:
    library = folder / f"{spec.name}.so"
    command = nvcc_command(spec.compiler, spec.flags, folder / spec.sources[0], library)
    run = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if run.returncode != 0:
        raise _build_error(spec, folder, run.stderr + run.stdout or f"exit status {run.returncode}")
    # As cpp_extension does with what it builds.
    torch.ops.load_library(library)
    return library


def _build_error(spec: LibrarySpec, folder: Path, output: str) -> BuildError:
    # As gcc, clang, cl, nvcc and their linkers begin an error; before it stand ninja's commands and any warnings.
    lines = output.splitlines()
    first = next((line for line in lines if re.search(r"\berror( [A-Z]+\d+)?:", line)), lines[0])
    kept = folder.parent / f"{spec.name}.log"
    kept.write_text(output, encoding="utf-8")
    return BuildError(f"the build with {spec.compiler.command} failed: {first}; all that it said is in {kept}")


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
