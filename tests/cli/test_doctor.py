"""rwkv-doctor: its checks, its advice and its verdict."""

import os
from collections.abc import Sequence
from pathlib import Path

import forks
import torch
from command import Result
from filelock import FileLock
from forks import Strike
from rich.console import Console
from systems import needs_links, needs_scripts

from rwkv_pl.cli import doctor
from rwkv_pl.files import cache_folder
from rwkv_pl.ops.backend import load_all
from rwkv_pl.ops.libraries import LIBRARIES
from rwkv_pl.ops.toolchain import Compiler, describe_nvcc_problem, find_nvcc

LAST = list(LIBRARIES)[-1]


def run(cache: Path, strikes: Sequence[Strike] = (), **environment: str) -> Result:
    """Run in a separate process, because one process loads one library."""
    environment = {"RWKV_PL_CACHE": str(cache)} | environment
    return forks.run(cache.parent, main="rwkv_pl.cli.doctor", strikes=strikes, **environment)


@needs_links
def test_working_machine(tmp_path):
    # In a folder with a space and a non-ASCII letter; test_build.py has built it.
    assert load_all("cpu") == ""
    (tmp_path / "a b \u00e9").mkdir()
    (tmp_path / "a b \u00e9" / "kernels").symlink_to(cache_folder() / "kernels")
    result = run(tmp_path / "a b \u00e9")
    assert result.code == 0, result.out + result.err
    for library in LIBRARIES:
        assert f"cpu: {library}: kernel=auto uses the compiled operators: ready in " in result.out
    for what in ("Python", torch.__version__, "C++ compiler", "ninja", "a b \u00e9"):
        assert what in result.out
    assert "Traceback" not in result.err


@needs_scripts
def test_broken_compiler(tmp_path):
    script = tmp_path / "c++"
    script.write_text("#!/bin/sh\nexit 3\n")
    script.chmod(0o755)
    for command in (str(script), "g++ 'x"):
        result = run(tmp_path, CXX=command)
        assert (result.code, "Traceback" in result.err) == (1, False), result.err
        assert result.out.splitlines()[-1].startswith(f"cpu: {LAST}: kernel=auto uses plain torch: ")


@needs_scripts
def test_failed_build_shows_the_error_and_the_log(tmp_path):
    script = tmp_path / "c++"
    script.write_text(
        """#!/bin/sh\ncase "$*" in *" -c "*) echo 'a.cpp:1:2: error: no'; exit 1;; *) echo fake 1.0;; esac\n"""
    )
    script.chmod(0o755)
    for _ in range(2):  # it builds again although the first build has failed
        result = run(tmp_path, CXX=str(script))
        assert (result.code, result.err.count("rwkv_pl: building the ")) == (1, len(LIBRARIES))
    log = tmp_path / "kernels" / f"{LAST}_cpu.log"
    assert result.out.splitlines()[-1].endswith(f"failed: a.cpp:1:2: error: no; its full output is in {log}")
    assert "rwkv-doctor to build again" not in result.out
    assert "a.cpp:1:2: error: no" in log.read_text()


def find_check(what: str) -> doctor.Finding:
    return next(found for found in doctor.check_build_tools() if found.name == what)


def test_cache_check_reports_leftovers_locks_and_bad_folders(monkeypatch, tmp_path):
    monkeypatch.setenv("RWKV_PL_CACHE", str(tmp_path))
    kernels = tmp_path / "kernels"
    (kernels / "building-x").mkdir(parents=True)
    (kernels / "lock").write_text("of a process that died")
    assert "1 interrupted builds" in find_check("cache").found
    with FileLock(kernels / "lock"):
        assert "another process is building" in find_check("cache").found
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RWKV_PL_CACHE", str(tmp_path / "file"))
    assert "RWKV_PL_CACHE" in find_check("cache").fix


def fake_nvcc(folder: Path, release: str) -> None:
    folder.mkdir()
    script = folder / "nvcc"
    script.write_text(
        f"#!/bin/sh\necho nvcc: NVIDIA\necho Cuda compilation tools, release {release}, V{release}.1\necho Build\n"
    )
    script.chmod(0o755)


@needs_scripts
def test_nvcc_for_another_cuda_is_reported(monkeypatch, tmp_path):
    monkeypatch.delenv("CUDA_PATH", raising=False)
    for name, release in (("old", "11.8"), ("new", "99.1")):
        fake_nvcc(tmp_path / name, release)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nowhere"))
    monkeypatch.setenv("PATH", os.pathsep.join((str(tmp_path / "new"), str(tmp_path / "old"), "/usr/bin", "/bin")))
    # A matching version takes precedence over the order on PATH.
    assert find_nvcc("11.7") == Compiler("nvcc", str(tmp_path / "old" / "nvcc"), "11.8")
    assert find_nvcc("98.0") == Compiler("nvcc", str(tmp_path / "new" / "nvcc"), "99.1")
    monkeypatch.setattr(torch.version, "cuda", "98.0")
    found = find_check("nvcc")
    assert found.found == f"{tmp_path / 'new' / 'nvcc'} is too new: its CUDA is 99.1, torch's is 98.0"
    assert found.fix == "install the CUDA toolkit 98.0 and put its nvcc on PATH"


def have_another_cuda() -> None:
    """Pretend another CUDA, since nvcc is not checked for a torch without. A wide console keeps rows on one line."""
    torch.version.cuda = "98.0"
    doctor.console = lambda: Console(width=400)
    for name in ("CUDA_HOME", "CUDA_PATH"):
        os.environ.pop(name, None)


@needs_scripts
def test_table_without_any_build_tool(tmp_path):
    """No compiler, an nvcc for another CUDA, and the leftovers of a process that died during a build."""
    fake_nvcc(tmp_path / "bin", "99.1")
    (tmp_path / "kernels" / "building-x").mkdir(parents=True)
    (tmp_path / "kernels" / "lock").write_text("of a process that died")
    hidden = {"PATH": str(tmp_path / "bin"), "CXX": "/nowhere/c++"}
    result = run(tmp_path, [Strike("rwkv_pl.cli.doctor:main", 1, have_another_cuda)], **hidden)
    assert (result.code, "Traceback" in result.err) == (1, False), result.err
    cells = [[cell.strip() for cell in line.split("\u2502")[1:4]] for line in result.out.splitlines()]
    table = {row[0]: row[1:] for row in cells if len(row) == 3}
    assert table["C++ compiler"] == ["CXX=/nowhere/c++ was not found", "set CXX to a compiler, or unset it"]
    fault = f"{tmp_path / 'bin' / 'nvcc'} is too new: its CUDA is 99.1, torch's is 98.0"
    assert table["nvcc"] == [fault, "install the CUDA toolkit 98.0 and put its nvcc on PATH"]
    left = "0 libraries, 0.0 MB; 1 interrupted builds, which the next build removes"
    assert table["cache"] == [f"{tmp_path / 'kernels'}: {left}", "-"]
    reason = "no C++ compiler (CXX=/nowhere/c++ was not found); set CXX to a compiler, or unset it"
    assert result.out.splitlines()[-1] == f"cpu: {LAST}: kernel=auto uses plain torch: {reason}"


def test_nvcc_advice_names_the_problem_and_the_fix():
    old = Compiler("nvcc", "/cuda/nvcc", "11.8")
    assert describe_nvcc_problem(old, "13.0").startswith(
        "/cuda/nvcc is too old: its CUDA is 11.8, torch's is 13.0; run `pip install"
    )
    assert describe_nvcc_problem(None, "12.8") == "no nvcc; install the CUDA toolkit 12.8 and put its nvcc on PATH"
    assert describe_nvcc_problem(Compiler("nvcc", "/cuda/nvcc", "13.1"), "13.0") == ""
