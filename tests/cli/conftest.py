"""Runs rwkv-train inside this process, as the command does."""

import sys

import pytest
from command import TEXT, Result

from rwkv_pl.cli.train import main


@pytest.fixture
def train(tmp_path, monkeypatch, capfd):
    """train(*overrides) -> Result, in an empty folder with a corpus.txt."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    (tmp_path / "corpus.txt").write_bytes(TEXT)

    def run(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["rwkv-train", *arguments])
        capfd.readouterr()
        code = 0
        try:
            main()
        except SystemExit as exit:
            code = int(exit.code or 0)
        streams = capfd.readouterr()
        return Result(code, streams.out, streams.err)

    return run
