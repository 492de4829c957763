"""LitRWKV: a language model inside Lightning's loop.

B  batch, the rows of a micro-batch    T  time, ctx_len    V  vocab_size
"""

import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import Timer, WeightAveraging
from torch import Tensor, nn
from torch.optim import Optimizer

from rwkv_pl.config import Optim, Schedule
from rwkv_pl.inference.evaluate import bits_per_byte
from rwkv_pl.inference.sampling import derive_seed
from rwkv_pl.model import MODELS
from rwkv_pl.ops.cross_entropy import head_cross_entropy
from rwkv_pl.targets import load_class
from rwkv_pl.training.loss import IGNORE_INDEX, count_bytes, l2wrap, split_tokens
from rwkv_pl.training.muon import MuonAdamW
from rwkv_pl.training.nonfinite import NonfiniteGuard
from rwkv_pl.training.optimizer import build_optimizer, parameter_groups, set_hyperparameters
from rwkv_pl.training.schedule import learning_rate
from rwkv_pl.weights.metadata import KEY, Metadata


class LitRWKV(LightningModule):
    """Trains any model that has `config`, `hidden`, `head` and `lr_scale`.

    model:           RWKV4(RWKV4Config(vocab_size=256, n_layer=12, n_embd=512)), or a function that builds it, which is
                     called when a Trainer asks for the model.
    optim, schedule: their numbers (see conf/optim and conf/schedule); the defaults are Adam at a constant rate.
    seed:            of the random numbers, seeded anew before each micro-batch, so that a resumed run draws the same.
    vocabulary:      plain JSON types, carried in every checkpoint.
    bytes_per_token: (V,) int64, for bits per byte; None: each token is one byte.
    past:            plain JSON types, carried in every checkpoint: what a run that goes on from it has to agree with.
    loss_chunk_len:  tokens whose logits are there at once, worth while with a large vocabulary; None: all of them.
    skip_nonfinite:  how many batches with a NaN or Inf loss or gradient a run leaves out; the next one raises RunError.

    After each optimizer step `grad_norm` is its gradient's norm before clipping, where the gradient lies (`float` of it
    waits for a GPU), and `last_lr` its learning rate.
    """

    def __init__(
        self,
        model: nn.Module | Callable[[], nn.Module],
        optim: Optim | None = None,
        schedule: Schedule | None = None,
        *,
        seed: int = 42,
        vocabulary: dict[str, Any] | None = None,
        bytes_per_token: Tensor | None = None,
        past: dict[str, Any] | None = None,
        loss_chunk_len: int | None = None,
        skip_nonfinite: int = 0,
    ) -> None:
        super().__init__()
        self._build = None if isinstance(model, nn.Module) else model
        self.model: Any = None if self._build else model
        self.optim = optim or Optim()
        self.schedule = schedule or Schedule()
        self.seed = seed
        self.vocabulary = vocabulary
        self.past = past or {}
        self.loss_chunk_len = loss_chunk_len
        self._guard = NonfiniteGuard(skip_nonfinite)
        self.grad_norm: Tensor | float = math.nan
        self.last_lr = math.nan
        self._loss: Tensor | float = 0.0
        self.bytes_per_token: Tensor | None
        self.register_buffer("bytes_per_token", bytes_per_token, persistent=False)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_current_fx_name":
            # Lightning notes the hook that it calls fifty times a step; nn.Module would look for parameters in it.
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def configure_model(self) -> None:
        """Builds the model, once: on the CPU in float32, so that its numbers are the same on every device and in every
        precision."""
        if self._build and self.model is None:
            before = torch.get_default_dtype()
            torch.set_default_dtype(torch.float32)
            try:
                with torch.device("cpu"):
                    self.model = self._build()
            finally:
                torch.set_default_dtype(before)
            self._build = None  # with the weights that it started from

    def forward(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """tokens (B, T) -> logits (B, T, V) and the state after them, as the model itself."""
        return self.model(tokens, state)

    def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor]:
        """batch: tokens (B, T+1). Returns scalars: the loss, and its parts in nats a token.

        Nothing is logged here: a self.log costs 0.45 ms whether or not the step is logged. MetricsRecorder reads
        these.
        """
        loss, nats, penalty = self.loss(*split_tokens(batch))
        self._loss = self._loss + loss.detach()
        return {"loss": loss, "nats": nats.detach(), "l2wrap": penalty.detach()}

    def loss(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """inputs, targets (B, T) -> scalars: what is minimised, and its parts, nats a token and L2Wrap."""
        hidden, _ = self.model.hidden(inputs)
        nats, largest = head_cross_entropy(self.model.head, hidden, targets, self.loss_chunk_len)
        mean, penalty = nats.mean(), l2wrap(largest)
        return mean + penalty, mean, penalty

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        # Dropout's masks are a function of the seed and the place in the run, so there is no generator to save.
        seed = derive_seed(self.seed, self.trainer.fit_loop.epoch_loop.total_batch_idx, self.trainer.global_rank)
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
        hidden, _ = self.model.hidden(inputs)
        nats, _ = head_cross_entropy(self.model.head, hidden, targets, self.loss_chunk_len)
        n_targets = (targets != IGNORE_INDEX).sum()
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
        # Of all processes already. For callbacks that monitor it; MetricsRecorder writes it to the loggers.
        self.log_dict(figures, logger=False)

    # The optimizer

    def configure_optimizers(self) -> Optimizer:
        target = load_class("optim", self.optim._target_)
        groups = parameter_groups(self.model, self.lr_scale, split_blocks=target is MuonAdamW)
        return build_optimizer(target, groups, self.optim)

    def on_train_start(self) -> None:
        for optimizer in self.trainer.optimizers:
            set_hyperparameters(optimizer, self.optim, self.lr_scale)

    @property
    def lr_scale(self) -> dict[str, float]:
        """Factors of the learning rate by the last part of a parameter's name."""
        return self.model.lr_scale if self.optim.lr_scale == "version" else self.optim.lr_scale or {}

    @property
    def current_lr(self) -> float:
        """The rate of the optimizer step under way."""
        return self.lr_at(self.trainer.global_step)

    def lr_at(self, step: int) -> float:
        """The rate of an optimizer step, counted from 0."""
        return learning_rate(step, self.optim, self.schedule, self.trainer.max_steps)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        self.last_lr = self.current_lr
        for group in optimizer.param_groups:
            group["lr"] = self.last_lr * group["lr_scale"]
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if self.trainer.global_step + 1 == self.trainer.max_steps:
            # Lightning counts this step when the hook returns. A run that is told to stop validates before it ends,
            # one that merely reaches max_steps does not.
            self.trainer.should_stop = True

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Computes the gradient's norm once: for the record, for clipping and to see whether it is finite."""
        self.check_finite()
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.grad_norm = norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        loss = torch.as_tensor(self._loss, device=norm.device) / self.trainer.accumulate_grad_batches
        self._loss = 0.0
        if self._loss_scaled and self.trainer.world_size > 1:
            loss = self.trainer.strategy.reduce(loss, reduce_op="mean")
        self._guard.look(norm, loss, self.trainer.global_step, self.last_lr)
        if self.skips_nonfinite_on_device(optimizer):
            self._guard.skip_on_device(optimizer)
        elif not self.check_finite():
            for parameter in parameters:
                parameter.grad = None  # an optimizer step without gradients changes nothing
            return
        if gradient_clip_val and gradient_clip_algorithm == "norm":
            torch.nn.utils.clip_grads_with_norm_(parameters, gradient_clip_val, norm)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    @property
    def _loss_scaled(self) -> bool:
        return getattr(self.trainer.precision_plugin, "scaler", None) is not None

    def skips_nonfinite_on_device(self, optimizer: Optimizer) -> bool:
        """Does the optimizer itself skip a step of NaN? If the host looked first, it would wait for the GPU."""
        # SGD's momentum starts as the first gradient; if that step were skipped, it would be uninitialised memory.
        starts_momentum = bool(optimizer.defaults.get("momentum")) and not optimizer.state
        fused = bool(optimizer.defaults.get("fused"))
        return self.device.type == "cuda" and fused and not self._loss_scaled and not starts_momentum

    def check_finite(self) -> bool:
        """Was the last optimizer step finite? If not, a warning or RunError says so."""
        return self._guard.check_finite(self._loss_scaled, self.trainer.is_global_zero)

    def on_validation_start(self) -> None:
        self.check_finite()

    def on_train_end(self) -> None:
        self.check_finite()

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.check_finite()
        interval, accumulate = self.trainer.val_check_interval, self.trainer.accumulate_grad_batches
        checkpoint[KEY] = Metadata(
            model=next(name for name, (cls, _) in MODELS.items() if isinstance(self.model, cls)),
            config=asdict(self.model.config),
            vocabulary=self.vocabulary,
            finished=self.finish_reason(),
            past=self.past,
            skipped=self._guard.skipped,
            accumulate=accumulate,
            precision=self.trainer.precision,
            val_check_interval=interval // accumulate if isinstance(interval, int) else None,
            threads=torch.get_num_threads(),
        ).to_dict()
        self._rewind(checkpoint)

    def finish_reason(self) -> str | None:
        """Why the run is over, where it is: length, time (trainer.max_time), pruned or early stop (a callback's)."""
        if not self.trainer.should_stop:
            return None
        if self.trainer.global_step == self.trainer.max_steps:
            return "length"
        if any(getattr(callback, "pruned", False) for callback in self._callbacks):
            return "pruned"
        left = [callback.time_remaining() for callback in self._callbacks if isinstance(callback, Timer)]
        return "time" if any(seconds is not None and seconds <= 0 for seconds in left) else "early stop"

    @property
    def _callbacks(self) -> list[Callback]:
        return self.trainer.callbacks  # type: ignore[attr-defined]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._guard.skipped = checkpoint.get(KEY, {}).get("skipped", 0)
        averaged = any(isinstance(callback, WeightAveraging) for callback in self._callbacks)
        if "current_model_state" in checkpoint and not averaged:
            # The averaging was taken off: the training goes on from the weights that it trained.
            checkpoint["state_dict"] = checkpoint["current_model_state"]
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
