"""make finds a supported Python, or reports in one line what it found."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(os.name == "nt" or not shutil.which("make"), reason="needs make")
MAKEFILE = Path(__file__).parents[1] / "Makefile"

# A fake Python of another version: answers `python -c CODE`; its -m venv makes an environment with a pip that does
# nothing.
PYTHON = """#!/bin/sh
if [ "$1" = -m ]; then for folder; do :; done
    mkdir -p "$folder/bin"; [ "${{0##*/}}" = broken ] && exit 1
    cp "$0" "$folder/bin/python"
    printf '#!/bin/sh\\n' >"$folder/bin/pip"; chmod +x "$folder/bin/pip"
    exit
fi
exec {real} -c 'import sys, importlib.util as u; sys.version_info = {version}; {more}exec(sys.argv[1])' "$2"
"""


@pytest.fixture
def make(tmp_path):
    """make(pythons, *arguments): only those are on PATH. Each has a name and a version, or the reason why it fails."""
    for tool in ("sh", "mkdir", "cp", "chmod", "touch", "rm"):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    shutil.copy(MAKEFILE, tmp_path)
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()

    def run(pythons: dict[str, tuple[int, int] | str], *arguments: str) -> subprocess.CompletedProcess:
        for name, version in pythons.items():
            more = "u.find_spec = lambda name: None; " if version == "no venv" else ""
            text = PYTHON.format(real=sys.executable, version=(3, 12) if more else version, more=more)
            (tmp_path / "bin" / name).write_text(text)
            (tmp_path / "bin" / name).chmod(0o755)
        command = [shutil.which("make"), ".venv/.train", *arguments]
        environment = {"PATH": str(tmp_path / "bin")}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    return run


def test_newest_supported_python_is_used(make):
    result = make({"python3": (3, 9), "python3.11": (3, 11), "python3.13": (3, 13), "python3.14": "no venv"})
    assert result.returncode == 0
    assert "python3.13 -m venv .venv" in result.stdout


def test_python_option_overrides_the_search(make):
    result = make({"python3.13": (3, 13), "mine": (3, 12)}, "PYTHON=mine")
    assert "mine -m venv .venv" in result.stdout


@pytest.mark.parametrize(
    ("pythons", "arguments", "found"),
    [
        ({"python3": (3, 9)}, [], "found python3 is 3.9, but"),
        ({"python3": (3, 15)}, [], "found python3 is 3.15, but"),
        ({"python3": "no venv", "python3.11": "no venv"}, [], "found python3.11 has no venv, python3 has no venv, but"),
        ({}, [], "found none of python3.14 python3.13 python3.12 python3.11 python3, but"),
        ({"python3": (3, 12), "old": (3, 8)}, ["PYTHON=old"], "found old is 3.8, but"),
    ],
)
def test_no_supported_python_gives_one_line_error_and_no_environment(make, tmp_path, pythons, arguments, found):
    result = make(pythons, *arguments)
    assert result.returncode == 2
    said, made = result.stderr.strip().split("\n")  # the second line is from make itself
    assert found in said and "make PYTHON=" in said
    assert "Error 1" in made
    assert not (tmp_path / ".venv").exists()


def test_supported_venv_is_kept_and_unsupported_venv_is_replaced(make, tmp_path):
    make({"python3": (3, 12)})
    os.utime(tmp_path / "pyproject.toml", (2e9, 2e9))
    (tmp_path / ".venv" / "mine").touch()
    assert "venv" not in make({"python3": (3, 13)}).stdout.replace("touch .venv", "").replace(".venv/bin/pip", "")
    assert (tmp_path / ".venv" / "mine").exists()
    for missing in ("python", "pip"):
        (tmp_path / ".venv" / "bin" / missing).unlink()
        assert "python3 -m venv .venv" in make({"python3": (3, 13)}).stdout


def test_failed_venv_leaves_nothing(make, tmp_path):
    assert make({"broken": (3, 12)}, "PYTHON=broken").returncode == 2
    assert not (tmp_path / ".venv").exists()
