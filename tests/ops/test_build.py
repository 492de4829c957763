"""Building, caching and loading the libraries, in separate processes, because one process loads one library."""

import hashlib
import os
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from dataclasses import dataclass
from importlib import resources
from multiprocessing.process import BaseProcess
from pathlib import Path

import forks
import pytest
import rwkv_pl.cuda
from quick_compiler import quick_compiler
from systems import WINDOWS

from rwkv_pl.files import cache_folder
from rwkv_pl.ops.build import (
    PREBUILT,
    LibrarySpec,
    _compile_cpu,
    _compile_cuda,
    _spec_digest,
    _try_load,
    cpu_flags,
)
from rwkv_pl.ops.libraries import LIBRARIES
from rwkv_pl.ops.toolchain import Compiler

CALL = """
import os, warnings
import torch
from rwkv_pl import use_kernel, wkv4
torch.set_num_threads(1)
before = dict(os.environ)
def call():
    return wkv4(torch.zeros(3), torch.zeros(3), torch.randn(2, 5, 3), torch.randn(2, 5, 3))
"""
COMPILED = CALL + "use_kernel('compiled'); call(); assert dict(os.environ) == before, 'the environment was changed'"
# Call it twice and never silence repeated warnings: exactly one warning must appear.
AUTO = CALL + "warnings.simplefilter('always'); call(); call(); assert not hasattr(torch.ops.rwkv_pl, 'wkv4_forward')"

needs_no_prebuilt = pytest.mark.skipif(PREBUILT.exists(), reason="libraries built ahead are used")


@dataclass
class Child:
    process: BaseProcess
    folder: Path


def start(code: str, cache: Path, **environment: str) -> Child:
    folder = Path(tempfile.mkdtemp())
    return Child(forks.start(folder, code=code, RWKV_PL_CACHE=str(cache), **environment), folder)


def finish(child: Child, code: int = 0) -> str:
    """Return its stderr. Fails if the process hangs or ends with another exit code."""
    result = forks.finish(child.process, child.folder)
    shutil.rmtree(child.folder)
    assert result.code == code, result.err
    return result.err


def fake_compiler(folder: Path, body: str) -> str:
    if WINDOWS:
        pytest.skip("the fake compiler is a shell script")
    script = folder / "fake-c++"
    script.write_text(f'#!/bin/sh\ncase "$*" in *" -c "*) {body};; *) echo fake 1.0;; esac\n')
    script.chmod(0o755)
    return str(script)


@pytest.fixture(scope="module")
def compiler(tmp_path_factory) -> str:
    return quick_compiler(tmp_path_factory.mktemp("compiler"))


@pytest.fixture(scope="module")
def built(tmp_path_factory, compiler):
    """A cache filled by two processes at once, in a folder with a space and a non-ASCII letter."""
    cache = tmp_path_factory.mktemp("cache") / "a b é"
    said = [finish(process) for process in [start(COMPILED, cache, CXX=compiler) for _ in range(2)]]
    return cache, said


def library(cache: Path) -> Path:
    (path,) = (cache / "kernels").glob("*.so")
    return path


def test_two_processes_build_once(built):
    cache, said = built
    (line,) = "".join(said).splitlines()
    assert line.startswith("rwkv_pl: building the WKV-4 kernel for ")
    assert library(cache).exists() and not list((cache / "kernels").glob("building-*"))


@pytest.mark.slow
def test_next_process_uses_the_cached_library(built, compiler):
    assert finish(start(COMPILED, built[0], CXX=compiler)) == ""


def test_cache_folder_is_private_to_the_user(built):
    assert stat.S_IMODE((built[0] / "kernels").stat().st_mode) == 0o700


def test_corrupt_library_is_rebuilt(built, compiler, tmp_path):
    shutil.copytree(built[0], tmp_path, dirs_exist_ok=True)
    path = library(tmp_path)
    path.write_bytes(path.read_bytes()[:9000])
    assert finish(start(COMPILED, tmp_path, CXX=compiler)).count("building") == 1
    assert hashlib.sha256(path.read_bytes()).hexdigest() == path.with_suffix(".sha256").read_text()


def test_unsafe_library_is_not_loaded(tmp_path):
    path = tmp_path / "wkv4.so"
    assert not _try_load(path)
    path.write_bytes(b"no library")
    assert not _try_load(path), "loaded without a checksum"
    path.with_suffix(".sha256").write_text(hashlib.sha256(b"no library").hexdigest())
    assert not _try_load(path), "loaded a file that the linker refuses"


def test_killed_build_does_not_block_later_builds(compiler, tmp_path):
    killed = start(COMPILED, tmp_path, CXX=fake_compiler(tmp_path, "sleep 60"))
    deadline = time.monotonic() + 600
    while not list(tmp_path.glob("kernels/building-*/build.ninja")):
        assert time.monotonic() < deadline and killed.process.is_alive()
        time.sleep(0.02)
    killed.process.kill()
    finish(killed, code=-signal.SIGKILL)
    assert list(tmp_path.glob("kernels/building-*")), "no leftovers: the test proves nothing"
    assert finish(start(COMPILED, tmp_path, CXX=compiler)).count("building") == 1
    assert not list(tmp_path.glob("kernels/building-*"))


@needs_no_prebuilt
def test_without_a_compiler_the_scan_is_used(tmp_path):
    said = finish(start(AUTO, tmp_path, CXX="/nowhere/c++"))
    assert said.count("RuntimeWarning") == 1
    assert "no C++ compiler (CXX=/nowhere/c++ was not found); " in said


@needs_no_prebuilt
@pytest.mark.slow
def test_empty_path_falls_back_to_the_scan(tmp_path):
    environment = {"PATH": str(tmp_path), "CXX": ""}
    without_zig = "import sys; sys.modules['ziglang'] = None\n"
    assert "no C++ compiler (none found); " in finish(start(without_zig + AUTO, tmp_path, **environment))


@needs_no_prebuilt
@pytest.mark.slow
def test_unavailable_compiled_kernel_is_an_error(tmp_path):
    last = finish(start(COMPILED, tmp_path, CXX="/nowhere/c++"), code=1).splitlines()[-1]
    assert last.startswith(
        "rwkv_pl.ops.backend.KernelError: wkv4: no compiled operator: "
        "no C++ compiler (CXX=/nowhere/c++ was not found); "
    )


def test_first_compiler_error_is_shown(tmp_path):
    errors = "echo 'a.cpp:1:2: warning: no error yet'; echo 'a.cpp:3:4: error: first'; echo 'error: second'; exit 1"
    said = finish(start(AUTO, tmp_path, CXX=fake_compiler(tmp_path, errors)))
    assert said.count("RuntimeWarning") == 1
    assert "fake-c++ failed: a.cpp:3:4: error: first; its full output is in " in said and "second" not in said
    assert not list(tmp_path.glob("kernels/building-*"))


def test_failed_build_is_not_repeated_at_every_start(compiler, tmp_path):
    calls = tmp_path / "calls"
    broken = fake_compiler(tmp_path, f"echo >>'{calls}'; echo 'a.cpp:3:4: error: first'; exit 1")
    first, second = (finish(start(AUTO, tmp_path, CXX=broken)) for _ in range(2))
    assert "a.cpp:3:4: error: first" in first and "building" in first and "run rwkv-doctor to build again" in first
    assert "a.cpp:3:4: error: first" in second and "building" not in second and second.count("RuntimeWarning") == 1
    n_calls = calls.read_text().count("\n")
    assert finish(start(COMPILED, tmp_path, CXX=compiler)).count("building") == 1, "the failure of another compiler"
    assert finish(
        start("from rwkv_pl.ops.build import forget_failures\nforget_failures()\n" + AUTO, tmp_path, CXX=broken)
    )
    assert calls.read_text().count("\n") == 2 * n_calls


@pytest.mark.parametrize("command", ["env '{}'", "'{}'", "env A='b c' '{}' -DX"])
def test_compiler_variable_with_arguments(compiler, tmp_path, command):
    named = shutil.copy(compiler, tmp_path / "a g++")
    said = finish(start(COMPILED, tmp_path, CXX=command.format(named)))
    assert "WARNING" not in said and "building" in said


@pytest.mark.skipif(WINDOWS, reason="nvcc has no host compiler of this kind")
@pytest.mark.parametrize("command", ["env g++ -DX", "g++"])
def test_nvcc_gets_the_host_compiler_as_one_program(monkeypatch, tmp_path, command):
    monkeypatch.setenv("CXX", command)
    commands = []
    monkeypatch.setattr(subprocess, "run", lambda command, **_: commands.append(command) or 1 / 0)
    host = Compiler(command, shutil.which(command.split()[0]), "12.2")
    nvcc = Compiler("nvcc", "/cuda/bin/nvcc", "13.0")
    sources = LIBRARIES["wkv4"].cuda_sources
    spec = LibrarySpec("wkv4_cuda", "WKV-4 kernel", "sm_90", sources, nvcc, [], 15, _compile_cuda, host)
    with pytest.raises(ZeroDivisionError):
        _compile_cuda(tmp_path, spec)
    program = commands[0][commands[0].index("-ccbin") + 1]
    monkeypatch.undo()
    assert "g++" in subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout


@needs_no_prebuilt
@pytest.mark.usefixtures("compiled_kernel")
def test_unusable_cache_folder_falls_back_to_the_scan(tmp_path):
    (tmp_path / "file").touch()
    said = finish(start(AUTO, tmp_path / "file"))
    assert said.count("RuntimeWarning") == 1
    assert (
        f"the cache folder {tmp_path / 'file' / 'kernels'} cannot be used (Not a directory); set RWKV_PL_CACHE" in said
    )


def test_cache_folder_of_each_platform(monkeypatch, tmp_path):
    monkeypatch.setenv("RWKV_PL_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("RWKV_PL_CACHE")
    assert cache_folder().is_relative_to(Path.home())


def test_library_name_depends_on_every_build_input():
    def name(level: str, path: str, version: str) -> str:
        compiler = Compiler("c++", path, version)
        sources, flags = LIBRARIES["wkv4"].cpu_sources, cpu_flags(level)
        return _spec_digest(LibrarySpec("wkv4_cpu", "kernel", level, sources, compiler, flags, 3, _compile_cpu))

    names = {
        name("portable", "/usr/bin/c++", "12.2"),
        name("x86-64-v3", "/usr/bin/c++", "12.2"),
        name("portable", "/usr/bin/c++", "13.1"),
        name("portable", "/opt/bin/c++", "12.2"),
    }
    assert len(names) == 4


WITH_CUDA_TORCH = """
import torch
from rwkv_pl.ops.backend import load, use_kernel
from rwkv_pl.ops.libraries import LIBRARIES
from rwkv_pl.ops.self_tests import MAX_ERROR, measure_error
assert torch.version.cuda is not None
use_kernel("compiled")
for library in LIBRARIES.values():
    assert load(library.name, "cpu") == "" and measure_error(library.name, "cpu") <= MAX_ERROR
    if library.cuda_sources:
        assert load(library.name, "cuda") == ""
        for name in (f"rwkv_pl::{library.name}_forward", f"rwkv_pl::{library.name}_backward"):
            for key in ("CPU", "CUDA"):
                assert torch._C._dispatch_has_kernel_for_dispatch_key(name, key), (name, key)
"""


@pytest.mark.slow
@pytest.mark.skipif(
    "RWKV_PL_CUDA_PYTHON" not in os.environ, reason="needs RWKV_PL_CUDA_PYTHON: a Python with a CUDA torch"
)
def test_libraries_load_with_a_cuda_torch(tmp_path):
    """All libraries load in that Python, with or without a GPU; it needs rwkv_pl, from a wheel or editable."""
    command = [os.environ["RWKV_PL_CUDA_PYTHON"], "-c", WITH_CUDA_TORCH]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(
    "source", sorted(path.name for path in Path(rwkv_pl.cuda.__path__[0]).iterdir() if path.is_file())
)
def test_kernel_sources_are_ascii(source):
    """A compiler on Windows reads them in the system's code page."""
    assert resources.files("rwkv_pl.cuda").joinpath(source).read_bytes().isascii()
