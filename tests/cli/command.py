"""A run of a second, and what a command ended with."""

from dataclasses import dataclass
from pathlib import Path

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
