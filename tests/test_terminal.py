"""The command that a message tells the user to type."""

import re
import shlex
import sys
from pathlib import Path

import pytest
from systems import WINDOWS

from rwkv_pl.overrides import parse_overrides
from rwkv_pl.terminal import resume_command


@pytest.fixture
def programs(tmp_path, monkeypatch) -> Path:
    """An environment's folder of programs, below the current folder."""
    folder = tmp_path / "env" / "bin"
    folder.mkdir(parents=True)
    (folder / ("rwkv-train.exe" if WINDOWS else "rwkv-train")).touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    monkeypatch.chdir(tmp_path)
    return folder


def test_command_has_its_path_if_the_environment_is_not_active(programs, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    run = Path("/a/run")
    program = Path("env", "bin", "rwkv-train.exe" if WINDOWS else "rwkv-train")
    assert resume_command(run) == f"{program} resume={run}"
    monkeypatch.setenv("PATH", str(programs))
    assert resume_command(run) == f"rwkv-train resume={run}"
    assert resume_command(run, "-m") == f"rwkv-train -m resume={run}"
    monkeypatch.setattr(sys, "argv", ["rwkv-train", "seed=1", "plugins=[mine]"])
    plugins = '"plugins=[mine]"' if WINDOWS else "'plugins=[mine]'"
    assert resume_command(run) == f"rwkv-train resume={run} {plugins}"


def split(command: str) -> list[str]:
    """Split as the shell does; on Windows, as PowerShell and cmd do."""
    if not WINDOWS:
        return shlex.split(command)
    return [quoted or plain for quoted, plain in re.findall(r'"([^"]*)"|(\S+)', command)]


@pytest.mark.parametrize("name", ["a b", "a,b", "it's", "x=1", "$HOME", "(c)", "ä"])
def test_folder_with_any_name_is_quoted_for_the_shell_and_for_hydra(programs, name, monkeypatch):
    monkeypatch.setenv("PATH", str(programs))
    _, argument = split(resume_command(Path("/runs", name)))
    (override,) = parse_overrides([argument])
    assert Path(override.value()) == Path("/runs", name)
