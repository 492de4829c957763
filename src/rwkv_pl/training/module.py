"""LitRWKV: a language model inside Lightning's loop.

B  batch, the rows of a micro-batch    T  time, ctx_len    V  vocab_size
"""

import hashlib
import importlib
from dataclasses import asdict
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim import Optimizer

from rwkv_pl.config import Optim, Schedule
from rwkv_pl.model import VERSIONS
from rwkv_pl.training.loss import IGNORED, bits_per_byte, count_bytes, cross_entropy, l2wrap, split_tokens
from rwkv_pl.training.optim import build_optimizer, learning_rate, parameter_groups, write_numbers

CHECKPOINT_FORMAT = 1


class LitRWKV(LightningModule):
    """Trains any model that has `config`, `hidden`, `head` and `lr_scale`.

    model:           as built, e.g. RWKV4(RWKV4Config(vocab_size=256, n_layer=12, n_embd=512)).
    optim, schedule: their numbers (see conf/optim and conf/schedule); the defaults are Adam at a constant rate.
    seed:            of the random numbers, seeded anew before each micro-batch, so that a resumed run draws the same.
    vocabulary:      plain JSON types, carried in every checkpoint.
    bytes_per_token: (V,) int64, for bits per byte; None: each token is one byte.
    corpus:          a digest of the text, carried in every checkpoint, so that no other is taken for it at a resume.
    """

    def __init__(
        self,
        model: Any,
        optim: Optim | None = None,
        schedule: Schedule | None = None,
        *,
        seed: int = 42,
        vocabulary: dict[str, Any] | None = None,
        bytes_per_token: Tensor | None = None,
        corpus: str | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.optim = optim or Optim()
        self.schedule = schedule or Schedule()
        self.seed = seed
        self.vocabulary = vocabulary
        self.corpus = corpus
        self.bytes_per_token: Tensor | None
        self.register_buffer("bytes_per_token", bytes_per_token, persistent=False)

    def forward(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """tokens (B, T) -> logits (B, T, V) and the state after them, as the model itself."""
        return self.model(tokens, state)

    def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor]:
        """batch: tokens (B, T+1). Returns scalars: the loss, and its parts in nats a token.

        Nothing is logged here: a self.log costs 0.45 ms whether or not the step is logged. `History` reads these.
        """
        inputs, targets = split_tokens(batch)
        logits, _ = self.model(inputs)
        nats = cross_entropy(logits, targets).mean()
        pull = l2wrap(logits)
        return {"loss": nats + pull, "nats": nats.detach(), "l2wrap": pull.detach()}

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        # Dropout's masks are a function of the seed and the place in the run, so there is no generator to save.
        place = (self.seed, self.trainer.fit_loop.epoch_loop.total_batch_idx, self.trainer.global_rank)
        seed = int.from_bytes(hashlib.blake2b(repr(place).encode(), digest_size=8).digest(), "big")
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.default_generators[self.device.index].manual_seed(seed)

    # Validation and test: one sum over everything, so that the figure does not depend on how it was cut.

    def on_validation_epoch_start(self) -> None:
        self._sums = torch.zeros(3, dtype=torch.float64)

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """batch: tokens (B, T+1), targets padded with -1. Adds up nats, targets and bytes."""
        inputs, targets = split_tokens(batch)
        logits, _ = self.model(inputs)
        nats = cross_entropy(logits, targets)
        n_targets = (targets != IGNORED).sum()
        # To the CPU first: not every device adds in float64.
        sums = torch.stack([nats.sum(), n_targets, count_bytes(targets, self.bytes_per_token)])
        self._sums += sums.cpu()

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        self._report("val")

    def on_test_epoch_end(self) -> None:
        self._report("test")

    def _report(self, split: str) -> None:
        sums = self._sums
        if self.trainer.world_size > 1:
            sums = self.trainer.strategy.reduce(sums.to(self.device), reduce_op="sum")
        nats, n_targets, n_bytes = sums.tolist()
        figures = {
            f"{split}/loss": nats / max(n_targets, 1),
            f"{split}/bits_per_byte": bits_per_byte(nats, n_bytes),
        }
        # Of all processes already. For the callbacks that monitor it: `History` writes it to the loggers, at its step.
        self.log_dict(figures, logger=False)

    # The optimizer

    def configure_optimizers(self) -> Optimizer:
        module, _, name = self.optim._target_.rpartition(".")
        target = getattr(importlib.import_module(module), name)
        return build_optimizer(target, parameter_groups(self.model, self.lr_scale), self.optim)

    def on_train_start(self) -> None:
        for optimizer in self.trainer.optimizers:
            write_numbers(optimizer, self.optim, self.lr_scale)

    @property
    def lr_scale(self) -> dict[str, float]:
        """Factors of the learning rate by the last part of a parameter's name."""
        return self.model.lr_scale if self.optim.lr_scale == "version" else self.optim.lr_scale or {}

    @property
    def current_lr(self) -> float:
        """The rate of the optimizer step under way."""
        return learning_rate(self.trainer.global_step, self.optim, self.schedule, self.trainer.max_steps)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        for group in optimizer.param_groups:
            group["lr"] = self.current_lr * group["lr_scale"]
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if self.trainer.global_step + 1 == self.trainer.max_steps:
            # Lightning counts this step when the hook returns. A run that is told to stop validates before it ends,
            # one that merely reaches max_steps does not.
            self.trainer.should_stop = True

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["rwkv_pl"] = {
            "format": CHECKPOINT_FORMAT,
            "model": next(name for name, (cls, _) in VERSIONS.items() if isinstance(self.model, cls)),
            "config": asdict(self.model.config),
            "vocabulary": self.vocabulary,
            "corpus": self.corpus,
            "finished": self._finished(),
        }
        self._rewind(checkpoint)

    def _finished(self) -> str | None:
        """Why the run is over, where it is: by its length, or before it by max_time or a callback."""
        if not self.trainer.should_stop:
            return None
        return "length" if self.trainer.global_step == self.trainer.max_steps else "early"

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._rewind(checkpoint)

    def _rewind(self, checkpoint: dict[str, Any]) -> None:
        """Sets the batch counters to the last optimizer step's end.

        Weights and optimizer do not change inside an accumulation window, so a save there is the last step's state, and
        its micro-batches are read again; the accumulation may also be another one than before.
        """
        if "loops" not in checkpoint:
            return
        done = checkpoint["global_step"] * self.trainer.accumulate_grad_batches
        for count in ("total", "current"):
            progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"][count]
            progress.update(ready=done, started=done, processed=done, completed=done)
