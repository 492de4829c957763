"""Fixtures that run the commands in this process."""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
from brief import shorten_run_end
from command import TEXT, Result, call, copy_run, make_run
from versions import RUN_SETTINGS

from rwkv_pl.cli import eval as evaluation
from rwkv_pl.cli import train as training


@pytest.fixture
def command(tmp_path, monkeypatch, capfd):
    """command(main, name, *arguments) -> Result, in an empty folder with a corpus.txt."""
    shorten_run_end(monkeypatch.setattr)
    monkeypatch.chdir(tmp_path)
    for name in ("LOCAL_RANK", "WORLD_SIZE", "NODE_RANK"):  # a run on two devices in this process leaves these set
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "corpus.txt").write_bytes(TEXT)

    def run(main: Callable[[], None], name: str, *arguments: str) -> Result:
        return call(main, [name, *arguments], monkeypatch, capfd)

    return run


@pytest.fixture(scope="session")
def run_of_four_steps(tmp_path_factory) -> Callable[[str], Path]:
    """run_of_four_steps(version) -> its run folder, made once. Tests change copies."""
    return functools.cache(lambda version: make_run(tmp_path_factory.mktemp("run"), *RUN_SETTINGS[version]))


@pytest.fixture
def run(request, run_of_four_steps, tmp_path) -> Path:
    """A run of SMALL in `tmp_path`, with its corpus.txt. An indirect parameter is the version of its model."""
    return copy_run(run_of_four_steps(getattr(request, "param", "rwkv4")), tmp_path)


@pytest.fixture
def train(command):
    """train(*overrides) -> Result"""
    return functools.partial(command, training.main, "rwkv-train")


@pytest.fixture
def evaluate(command):
    """evaluate(*overrides) -> Result"""
    return functools.partial(command, evaluation.main, "rwkv-eval")
