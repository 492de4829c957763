"""Build the compiled operators at first use, keep them in the user's cache folder, and load them.

A library is named by a digest of all that it was made from. It is built aside and moved into place under a lock that
the system takes from a process that dies, so that neither two processes at once nor a killed one disturb the next.
"""

import hashlib
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path

import torch
from filelock import FileLock

from rwkv_pl.files import cache_folder
from rwkv_pl.ops.toolchain import Compiler, compiler_advice, find_compiler

__all__ = ["LEVELS", "BuildError", "cpu_level", "load_cpu_library"]

SOURCES = ("wkv4_cpu.cpp", "wkv4_math.h")

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


class BuildError(RuntimeError):
    """There is no compiled operator; the message says in one line why and what to do."""


def load_cpu_library() -> None:
    """Register the CPU operators ``torch.ops.rwkv_pl.*``, building them where the cache has none (about 3 s).

    Raises BuildError without a compiler, where the build fails and where the cache folder cannot be written.
    """
    compiler = find_compiler()
    if compiler is None:
        tried = f"CXX={os.environ['CXX']} is none" if os.environ.get("CXX") else "none found"
        raise BuildError(f"no C++ compiler ({tried}); {compiler_advice()}")
    level = cpu_level()
    flags = _flags(level)
    folder = cache_folder() / "kernels"
    library = folder / f"wkv4_cpu-{level}-{_digest(compiler, flags)}{'.pyd' if sys.platform == 'win32' else '.so'}"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
        if _try_load(library):
            return
        with FileLock(folder / "lock"):
            if not _try_load(library):
                _build(library, compiler, level, flags)
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


def _flags(level: str) -> list[str]:
    if sys.platform == "win32":
        return ["/O2", STABLE_ABI, *MSVC_LEVELS[level]]
    # The two -fno: without them gcc keeps errno and floating-point flags right and makes no vectors.
    return ["-O3", "-fno-math-errno", "-fno-trapping-math", STABLE_ABI, *LEVELS[level]]


def _digest(compiler: Compiler, flags: list[str]) -> str:
    made_from = [compiler.command, compiler.path, compiler.version, *flags, torch.__version__, platform.machine()]
    digest = hashlib.sha256("\0".join(made_from).encode())
    for name in SOURCES:
        digest.update(resources.files("rwkv_pl.cuda").joinpath(name).read_bytes())
    return digest.hexdigest()[:16]


def _seal(library: Path) -> Path:
    return library.with_suffix(".sha256")


def _try_load(library: Path) -> bool:
    # The linker takes a library that was cut short, and dies of a bus error at its first missing page: compare first.
    try:
        sealed = _seal(library).read_text() == hashlib.sha256(library.read_bytes()).hexdigest()
    except FileNotFoundError:
        return False
    if not sealed:
        return False
    try:
        torch.ops.load_library(library)
    except OSError:
        return False
    return True


def _build(library: Path, compiler: Compiler, level: str, flags: list[str]) -> None:
    # Whoever holds the lock is the only one who builds, so all other building folders are leftovers.
    for leftover in library.parent.glob("building-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    print(
        f"rwkv_pl: building the WKV kernel for {level} with {compiler.version} (once, about 3 s) ...",
        file=sys.stderr,
        flush=True,
    )
    folder = Path(tempfile.mkdtemp(prefix="building-", dir=library.parent))
    try:
        for name in SOURCES:
            (folder / name).write_bytes(resources.files("rwkv_pl.cuda").joinpath(name).read_bytes())
        built = _compile(library.stem, folder, compiler, flags)
        seal = hashlib.sha256(built.read_bytes()).hexdigest()
        _seal(built).write_text(seal)
        # The seal last: until then the library counts as not there.
        built.replace(library)
        _seal(built).replace(_seal(library))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _compile(name: str, folder: Path, compiler: Compiler, flags: list[str]) -> Path:
    name = name.replace("-", "_")
    try:
        import ninja
        from torch.utils import cpp_extension

        # pip's ninja lies beside a Python that need not be on PATH, and torch looks for it there alone.
        with _environment(PATH=os.pathsep.join((ninja.BIN_DIR, os.environ.get("PATH", ""))), CXX=compiler.command):
            cpp_extension.load(
                name, str(folder / SOURCES[0]), extra_cflags=flags, build_directory=str(folder), is_python_module=False
            )
    except (ImportError, RuntimeError, OSError) as error:
        # As gcc, clang, cl and their linkers begin an error; before it stand ninja's commands and any warnings.
        lines = str(error).splitlines()
        first = next((line for line in lines if re.search(r"\berror( [A-Z]+\d+)?:", line)), lines[0])
        raise BuildError(f"the build with {compiler.command} failed: {first}") from error
    # torch adds a number to the name where this process has built before.
    return next(folder.glob(f"{name}*{cpp_extension.LIB_EXT}"))


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
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
