"""A run of a second, and what a command ended with."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TEXT = Path(__file__).with_name("test_train.py").read_bytes()[:8000] * 6

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


def call(main: Callable[[], None], argv: Sequence[str], monkeypatch: Any, capfd: Any) -> Result:
    """Runs a command inside this process. argv: its name and arguments. capfd: or capfdbinary, for bytes."""
    monkeypatch.setattr(sys, "argv", list(argv))
    capfd.readouterr()
    code = 0
    try:
        main()
    except SystemExit as exit:
        code = int(exit.code or 0)
    streams = capfd.readouterr()
    return Result(code, streams.out, streams.err)
