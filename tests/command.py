"""Run a command in this process, and make a run that takes one second."""

import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from brief import shorten_run_end

TEXT = Path(__file__).with_name("cli").joinpath("test_train.py").read_bytes()[:8000] * 6

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
    "trainer.val_check_interval=5000",
)


@dataclass
class Result:
    code: int
    out: str
    err: str


def call(main: Callable[[], None], argv: Sequence[str], monkeypatch: Any, capfd: Any) -> Result:
    """Run a command in this process. argv: its name and arguments. capfd: or capfdbinary, for bytes."""
    monkeypatch.setattr(sys, "argv", list(argv))
    capfd.readouterr()
    code = 0
    try:
        main()
    except SystemExit as exit:
        code = int(exit.code or 0)
    streams = capfd.readouterr()
    return Result(code, streams.out, streams.err)


def make_run(folder: Path, *overrides: str, text: bytes = TEXT) -> Path:
    """Make a one-second run in the folder, on a text in it; return its run folder."""
    (folder / "corpus.txt").write_bytes(text)
    from rwkv_pl.cli.train import main

    with pytest.MonkeyPatch.context() as patch:
        shorten_run_end(patch.setattr)
        patch.chdir(folder)
        patch.delenv("LOCAL_RANK", raising=False)
        patch.setattr(sys, "argv", ["rwkv-train", *SMALL, *overrides, "hydra.run.dir=run"])
        main()
    return folder / "run"


def load_checkpoint(run: Path, name: str = "last.ckpt") -> dict[str, Any]:
    return torch.load(run / "checkpoints" / name, weights_only=True)


def copy_run(run: Path, folder: Path) -> Path:
    """Copy a run as if it had been made in that folder; hard links become files."""
    there, here = str(run.parent), str(folder)
    shutil.copytree(run, folder / "run")
    for path in (folder / "run" / ".hydra").iterdir():
        path.write_text(path.read_text(encoding="utf-8").replace(there, here), encoding="utf-8")
    return folder / "run"
