"""Generates sample text during training."""

from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from rwkv_pl.files import atomic_write
from rwkv_pl.inference.generate import generate


def sample_tokens(model: nn.Module, prompt: list[int], n_tokens: int, seed: int) -> list[int]:
    """Generate `n_tokens` tokens after `prompt`; the same weights and seed give the same tokens."""
    tokens = torch.tensor([prompt], device=next(model.parameters()).device)
    return [int(token) for token in islice(generate(model, tokens, seed=seed), n_tokens)]


class SampleText(Callback):
    """Writes a sample of generated text every N optimizer steps, to samples/step-N.txt in the run folder."""

    def __init__(self, every_n_steps: int = 1000, n_tokens: int = 200) -> None:
        if every_n_steps < 1 or n_tokens < 1:
            raise ValueError("every_n_steps and n_tokens must be at least 1")
        self.every_n_steps, self.n_tokens = every_n_steps, n_tokens

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stepped = not trainer.fit_loop.epoch_loop._should_accumulate()
        if not stepped or trainer.global_step % self.every_n_steps:
            return
        model: Any = pl_module.whole_model()  # type: ignore[operator]
        if not trainer.is_global_zero:
            return
        vocabulary = trainer.datamodule.vocabulary  # type: ignore[attr-defined]
        try:
            tokens = sample_tokens(model, [vocabulary.document_end], self.n_tokens, pl_module.seed)  # type: ignore[arg-type]
        except FloatingPointError:
            return  # the next step's gradient is not finite either, and NonfiniteGuard reports it
        folder = Path(trainer.default_root_dir, "samples")
        folder.mkdir(exist_ok=True)
        with atomic_write(folder / f"step-{trainer.global_step:07}.txt") as file:
            file.write(vocabulary.decode(tokens))
