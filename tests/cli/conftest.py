"""Runs rwkv-train inside this process, as the command does."""

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from rwkv_pl.cli.train import main

TEXT = Path(__file__).read_bytes() * 40

# A run of a second: every part of a real one, in small.
SMALL = (
    "data=text",
    "data.path=corpus.txt",
    "data.batch_size=6",
    "data.ctx_len=16",
    "model.n_layer=2",
    "model.n_embd=16",
    "optim=rwkv",
    "trainer.accelerator=cpu",
    "trainer.max_steps=4",
    "trainer.limit_val_batches=2",
)


@dataclass
class Result:
    code: int
    out: str
    err: str


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
