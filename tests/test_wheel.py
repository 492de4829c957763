"""The wheel in a fresh environment: it contains the commands, the config tree and the kernel's sources."""

import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest
from library_header import assert_library_fits
from packaging.version import Version
from versions import FEWEST_CHANNELS, VERSIONS

from rwkv_pl.ops.libraries import LIBRARIES
from rwkv_pl.ops.toolchain import find_zig, host_platform

ROOT = Path(__file__).parents[1]


# Only the level of this machine.
PREBUILD = "from rwkv_pl.ops import build, prebuilt; prebuilt.LEVELS = [build.cpu_level()]; prebuilt.main()"
PLATFORM = host_platform()


def install(folder: Path, prebuilt: bool) -> Path:
    """A fresh venv with the built wheel; the dependencies, pip too, come from this environment."""
    # Build from a copy: a build leaves files next to its sources.
    sources = folder / "sources"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "prebuilt")
    for name in ("src", "conf", "cuda"):
        shutil.copytree(ROOT / name, sources / name, ignore=ignored)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    if prebuilt:
        command = [sys.executable, "-c", PREBUILD, "--no-cuda", "--out"]
        subprocess.run([*command, str(sources / "src" / "rwkv_pl" / "prebuilt")], check=True)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(sources)]
    build += [f"-C--build-option=--plat-name={PLATFORM}"] if prebuilt else []
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("*.whl")
    assert wheel.name.endswith(f"-py3-none-{PLATFORM if prebuilt else 'any'}.whl")
    venv = folder / "an environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    python = next(path for path in (venv / "bin" / "python", venv / "Scripts" / "python.exe") if path.exists())
    pip = [sys.executable, "-m", "pip", "--python", str(python)]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)], check=True, capture_output=True)
    # A line in a .pth file adds a folder but not that folder's .pth files, so this checkout's editable install stays
    # out.
    query = "import sysconfig; print(sysconfig.get_path('purelib'))"
    there = subprocess.run([str(python), "-c", query], check=True, capture_output=True, text=True).stdout.strip()
    Path(there, "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python.parent


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Path:
    return install(tmp_path_factory.mktemp("wheel"), prebuilt=False)


@pytest.mark.slow
@pytest.mark.skipif(find_zig() is None, reason="needs the package ziglang")
def test_platform_wheel_needs_no_compiler(tmp_path):
    programs = install(tmp_path, prebuilt=True)
    libraries = list((tmp_path / "sources" / "src" / "rwkv_pl" / "prebuilt").glob("*_cpu-*"))
    assert {path.name.partition("_cpu-")[0] for path in libraries} == set(LIBRARIES)
    for path in libraries:
        assert_library_fits(path, PLATFORM)
    # No compiler but zig, and no ninja.
    hidden = {"PATH": str(programs), "HOME": str(tmp_path), "RWKV_PL_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([programs / "rwkv-doctor"], env=hidden, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "built ahead" in done.stdout
    assert done.stdout.count("kernel=auto uses the compiled operators") == len(LIBRARIES)
    assert not list((tmp_path / "cache" / "kernels").glob("*_cpu*")), "a library was built"


@pytest.mark.slow
def test_wheel_trains_from_any_folder(environment, tmp_path):
    (tmp_path / "corpus.txt").write_bytes(b"a wheel carries all that it needs. " * 300)
    where = "import rwkv_pl.conf, rwkv_pl.cuda; print(*rwkv_pl.conf.__path__, *rwkv_pl.cuda.__path__, sep='\\n')"
    found = subprocess.run(
        [environment / "python", "-c", where], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert str(ROOT) not in found.stdout, "the checkout is used, not the wheel"
    assert Path(found.stdout.splitlines()[0], "experiment", "debug.txt").exists()
    # Hydra finds the launcher and the sweeper of -m, and their processes find the wheel.
    settings = ["data=text", "data.path=corpus.txt", "data.ctx_len=16", "model.n_layer=1"]
    settings += [f"model={','.join(VERSIONS)}", f"model.n_embd={max(FEWEST_CHANNELS.values())}"]
    settings += ["trainer.max_steps=2", "kernel=compiled", "optim.lr=1e-3", "hydra.sweep.dir=sweep"]
    command = [environment / "rwkv-train", "-m", *settings]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "sweep" / "sweep.csv").exists()
    for job in range(len(VERSIONS)):
        assert (tmp_path / "sweep" / str(job) / "checkpoints" / "last.ckpt").exists()
    done = subprocess.run([environment / "rwkv-report", "sweep"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("finished") >= len(VERSIONS)


def test_pyproject_lists_every_package_and_every_file_of_conf_and_cuda():
    """What a wheel contains, without building one."""
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    src, folders = ROOT / "src", setuptools["package-dir"]
    packages = {".".join(file.relative_to(src).parts[:-1]) for file in src.glob("*/**/*.py")}
    assert packages - {"rwkv_pl.prebuilt"} | {"rwkv_pl.conf", "rwkv_pl.cuda"} == set(setuptools["packages"])
    for package in ("rwkv_pl.conf", "rwkv_pl.cuda"):
        folder = ROOT / folders[package]
        packed = {file for pattern in setuptools["package-data"][package] for file in folder.glob(pattern)}
        present = {file for file in folder.rglob("*") if file.is_file() and file.suffix not in (".py", ".pyc")}
        assert present and packed >= present, package


def test_installed_versions_satisfy_requirements():
    """The environment of the tests satisfies the lower bounds of pyproject.toml."""
    import lightning
    import torch

    assert Version(torch.__version__) >= Version("2.10")
    assert Version("2.6.4") <= Version(lightning.__version__) < Version("2.7")
