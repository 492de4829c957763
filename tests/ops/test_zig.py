"""The CPU library built with zig: for this machine without any other compiler, and for other systems."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from library_header import assert_library_fits

from rwkv_pl.ops import build, prebuilt, toolchain
from rwkv_pl.ops.build import BuildError, load_cuda_library
from rwkv_pl.ops.libraries import LIBRARIES
from rwkv_pl.ops.toolchain import ZIG_TARGETS, Compiler, compiler_advice, find_compiler, host_platform

needs_zig = pytest.mark.skipif(toolchain.find_zig() is None, reason="needs the package ziglang")

WITHOUT_OTHER_COMPILER = """
import torch
from rwkv_pl import use_kernel
from rwkv_pl.ops.self_tests import MAX_ERROR, measure_error
use_kernel("compiled")
assert measure_error("wkv4", "cpu") <= MAX_ERROR
operator = torch.ops.rwkv_pl.wkv4_forward
try:
    operator(torch.zeros(3), torch.zeros(3), torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), None, 33)
except RuntimeError as error:
    print(error)
"""


@pytest.fixture
def no_system_compiler(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(toolchain.shutil, "which", lambda _: None)
    monkeypatch.setattr(toolchain, "_find_visual_studio", lambda: None)


@needs_zig
def test_zig_is_used_only_without_another_compiler(no_system_compiler, monkeypatch):
    found = find_compiler()
    assert found is not None and found.is_zig and found.title.startswith("zig 0.")
    assert os.access(found.path, os.X_OK)
    monkeypatch.setattr(toolchain.shutil, "which", lambda program: f"/bin/{program}")
    monkeypatch.setattr(toolchain, "_read_version", lambda _: "1.0")
    assert not find_compiler().is_zig


@pytest.mark.parametrize(
    ("machine", "libc", "is_known"),
    [
        ("x86_64", "glibc", True), ("x86_64", "", False), ("riscv64", "glibc", False), ("AMD64", "", True),
        ("arm64", "", True),
    ],
)  # fmt: skip
def test_zig_is_advised_where_it_can_be_used(no_system_compiler, monkeypatch, machine, libc, is_known):
    system = {"AMD64": "win32", "arm64": "darwin"}.get(machine, "linux")
    monkeypatch.setattr(toolchain.sys, "platform", system)
    monkeypatch.setattr(toolchain.platform, "machine", lambda: machine)
    monkeypatch.setattr(toolchain.platform, "libc_ver", lambda: (libc, ""))
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda _: None)
    assert (host_platform() is not None) == is_known and find_compiler() is None
    advice = compiler_advice()
    # On Windows, zig was never tried.
    assert advice.startswith("run `pip install ziglang`, or ") == (is_known and system != "win32")
    assert advice.startswith("install a wheel of `make wheels`, or ") == (system == "win32")


@needs_zig
@pytest.mark.slow
def test_zig_alone_builds_a_correct_kernel(tmp_path):
    (tmp_path / "empty").mkdir()
    environment = os.environ | {"PATH": str(tmp_path / "empty"), "CXX": "", "RWKV_PL_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", WITHOUT_OTHER_COMPILER]
    done = subprocess.run(command, env=environment, cwd=tmp_path / "empty", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"building the WKV-4 kernel for \S+ with zig \S+ \(once, about 60 s\)", done.stderr), done.stderr
    assert "tile must be 1 to 32, not 33" in done.stdout, "an error must not end the process"
    assert not list((tmp_path / "empty").iterdir()), "it wrote to the current folder"
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["kernels", "zig"]


def test_cuda_kernel_needs_another_compiler_than_zig(monkeypatch):
    monkeypatch.setattr(build.torch.version, "cuda", "13.0")
    monkeypatch.setattr(build, "find_compiler", lambda: Compiler("zig c++", "/site/ziglang/zig", "zig 0.17.1"))
    monkeypatch.setattr(toolchain, "host_platform", lambda: "manylinux_2_28_x86_64")
    with pytest.raises(BuildError, match=r"nvcc does not work with zig, the only C\+\+ compiler here; (run|install) "):
        load_cuda_library(LIBRARIES["wkv4"])


@needs_zig
@pytest.mark.slow
@pytest.mark.parametrize("platform_tag", [tag for tag in ZIG_TARGETS if tag != host_platform()])
def test_library_for_each_other_platform(tmp_path, monkeypatch, platform_tag):
    """tests/test_wheel.py builds those of this one."""
    monkeypatch.setattr(sys, "argv", ["prebuilt", platform_tag, "--no-cuda", "--out", str(tmp_path / "out")])
    monkeypatch.setattr(prebuilt, "LEVELS", ["portable"])
    prebuilt.main()
    paths = list(Path(tmp_path / "out").iterdir())
    assert {path.name.split("_cpu-")[0] for path in paths} == set(LIBRARIES)
    for path in paths:
        assert_library_fits(path, platform_tag)
