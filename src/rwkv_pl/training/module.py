"""LitRWKV: the LightningModule that trains a language model.

B  batch, the rows of a micro-batch    T  time, ctx_len    V  vocab_size
"""

import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import Timer, WeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from rwkv_pl.checks import check_at_least
from rwkv_pl.config import UNKNOWN, Optim, OptimGroup, Schedule
from rwkv_pl.errors import UserError
from rwkv_pl.inference.evaluate import bits_per_byte
from rwkv_pl.inference.sampling import derive_seed
from rwkv_pl.model import MODELS
from rwkv_pl.ops.cross_entropy import head_cross_entropy
from rwkv_pl.ops.heap import tune_allocator
from rwkv_pl.targets import load_class
from rwkv_pl.training.batch_counters import rescale, rewind
from rwkv_pl.training.callbacks.metrics import MetricsRecorder
from rwkv_pl.training.loss import IGNORE_INDEX, check_byte_counts, count_bytes, l2wrap, split_batch
from rwkv_pl.training.muon import MuonAdamW
from rwkv_pl.training.nonfinite import NonfiniteGuard
from rwkv_pl.training.optimizer import build_optimizer, parameter_groups, set_hyperparameters
from rwkv_pl.training.schedule import check_schedule, learning_rate
from rwkv_pl.training.sharded import gather_model, shard
from rwkv_pl.training.stream import STREAM_KEY, CarriedState
from rwkv_pl.weights.checkpoint import read_checkpoint
from rwkv_pl.weights.metadata import KEY, Metadata
from rwkv_pl.weights.parts import load_whole
from rwkv_pl.weights.read import read_weights


class LitRWKV(LightningModule):
    """Trains any model that has `config`, `hidden`, `head` and `lr_scale`, such as those of all versions in `model/`.

    Args:
        model: RWKV4(RWKV4Config(vocab_size=256, n_layer=12, n_embd=512)), or a function that builds it; the function is
            called when a Trainer needs the model.
        optim, schedule: the settings, see conf/optim and conf/schedule; the default is the official RWKV optimizer at
            a constant rate.
        seed: seeds the random numbers before each micro-batch, so that a resumed run draws the same ones.
        vocabulary: plain JSON types, saved in every checkpoint.
        bytes_per_token: (V,) whole numbers, for bits per byte: a tensor, an array or a list.
        past: plain JSON types, saved in every checkpoint: the run's identity, which must match on resume.
        loss_chunk_len: tokens whose logits are in memory at once, which pays with a large vocabulary; None: all.
        skip_nonfinite: how many batches with a NaN or Inf loss or gradient a run may skip; the next raises RunError.

    If vocabulary and bytes_per_token are not given, they come from the Trainer's data module, from its attribute
    `vocabulary`, which those of this package have. If the bytes are unknown, exactly 256 tokens count as bytes, and any
    other number is scored in `bits_per_token` instead of `bits_per_byte`.

    Unless a MetricsRecorder records the run, the metrics are logged with `self.log`.

    After each optimizer step, `grad_norm` is the gradient's norm before clipping, as a tensor on its device (converting
    it to `float` waits for a GPU), and `last_lr` is the learning rate of the step.
    """

    def __init__(
        self,
        model: nn.Module | Callable[[], nn.Module],
        optim: Optim | None = None,
        schedule: Schedule | None = None,
        *,
        seed: int = 42,
        vocabulary: dict[str, Any] | None = None,
        bytes_per_token: Any = None,
        past: dict[str, Any] | None = None,
        loss_chunk_len: int | None = None,
        skip_nonfinite: int = 0,
    ) -> None:
        super().__init__()
        if not callable(model):  # a module is callable too
            raise UserError(
                f"LitRWKV takes a model, RWKV4(RWKV4Config(...)), or a function that builds it, got {model!r}"
            )
        for name, value, kind in (("optim", optim, Optim), ("schedule", schedule, Schedule)):
            if not isinstance(value, kind | None):
                raise UserError(f"{name} must be rwkv_pl.{kind.__name__}(...), got {value!r}")
        if loss_chunk_len is not None:
            check_at_least("loss_chunk_len", loss_chunk_len, 1)
        self._build = None if isinstance(model, nn.Module) else model
        self.model: Any = None if self._build else model
        self.optim = optim or Optim()
        self.schedule = schedule or Schedule()
        self.seed = seed
        self.vocabulary = vocabulary
        self._is_vocabulary_given = vocabulary is not None or bytes_per_token is not None
        self.past = past or {}
        self.loss_chunk_len = loss_chunk_len
        self._guard = NonfiniteGuard(skip_nonfinite)
        self.carried = CarriedState()
        self.grad_norm: Tensor | float = math.nan
        self.last_lr = math.nan
        self._loss: Tensor | float = 0.0
        self._is_recorded = False
        self._micro_batches: list[Tensor] = []
        self._n_steps: int | None = None
        self._max_steps: int | None = None
        self._n_ids: int | None = None
        self._n_needed = 0
        self.bytes_per_token: Tensor | None
        sizes = None if bytes_per_token is None else check_byte_counts(bytes_per_token)
        self.register_buffer("bytes_per_token", sizes, persistent=False)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_current_fx_name":
            # Lightning sets this fifty times a step, and nn.Module.__setattr__ is slow: it checks for parameters.
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        checkpoint_path: str | Path,
        map_location: Any = None,
        *,
        model: nn.Module | None = None,
        strict: bool | None = True,
        weights_only: bool | None = True,
        **settings: Any,
    ) -> "LitRWKV":
        """Restores a module from a checkpoint alone: model, vocabulary, optim and schedule. Executes no code from it.

        The model is in eval mode; a fit puts it into training mode. model: an instance to load the weights into, needed
        if its class is not one of this package. settings: other arguments of LitRWKV, instead of the stored ones.
        strict, weights_only: Lightning's; only True is possible. Raises UserError for an unknown model,
        CorruptFileError for a corrupt file.
        """
        if False in (strict, weights_only):
            raise UserError(
                "strict=False and weights_only=False are not supported: the file must match, and runs no code"
            )
        path = Path(checkpoint_path)
        content = read_checkpoint(path, checked=model is not None)
        stored = content.get(KEY, {})
        if model is None:
            if stored and stored["model"] not in MODELS:
                raise UserError(f"{path} holds a {stored['model']}: give one with model=")
            weights = read_weights(path)
            model = weights.model()
            if weights.vocabulary:
                settings.setdefault("bytes_per_token", getattr(weights.vocabulary, "bytes_per_token", None))
                settings.setdefault("vocabulary", weights.vocabulary.to_dict())
        else:
            prefix = "model."
            state = load_whole(content["state_dict"]).items()
            model.load_state_dict({key.removeprefix(prefix): value for key, value in state if key.startswith(prefix)})
        for name, kind in (("optim", OptimGroup), ("schedule", Schedule)):
            if stored.get(name):
                settings.setdefault(name, kind(**stored[name]))
        return cls(model.eval(), **settings).to(map_location)

    def configure_model(self) -> None:
        """Builds the model once, on the CPU in float32, so that its initial weights never depend on the device or the
        precision."""
        if self._build and self.model is None:
            before = torch.get_default_dtype()
            torch.set_default_dtype(torch.float32)
            try:
                with torch.device("cpu"):
                    self.model = self._build()
            finally:
                torch.set_default_dtype(before)
            self._build = None  # frees the initial weights that it may hold
            self._check_vocab_size()
        if self.device_mesh is not None:
            if self.device_mesh["tensor_parallel"].size() > 1:
                raise UserError(
                    "tensor parallelism is not supported: give ModelParallelStrategy tensor_parallel_size=1 and the "
                    "number of processes as data_parallel_size"
                )
            shard(self.model, self.device_mesh["data_parallel"])

    def whole_model(self) -> nn.Module | None:
        """The model; if it is sharded, a plain copy on rank 0 and None elsewhere, and all processes must call this."""
        return self.model if self.device_mesh is None else gather_model(self.model, self.trainer.is_global_zero)

    def setup(self, stage: str) -> None:
        self._is_recorded = any(isinstance(callback, MetricsRecorder) for callback in self._callbacks)
        self._max_steps = self.trainer.max_steps
        vocabulary: Any = getattr(self.trainer.datamodule, "vocabulary", None)  # type: ignore[attr-defined]
        n_ids = getattr(vocabulary, "size", None)
        if isinstance(n_ids, int) and not self._is_vocabulary_given:
            # Of another data module, from an earlier call, nothing is kept.
            is_known = hasattr(vocabulary, "bytes_per_token")
            self.vocabulary = vocabulary.to_dict() if is_known else None
            self.bytes_per_token = check_byte_counts(vocabulary.bytes_per_token) if is_known else None
            self._n_ids = n_ids
        sizes = [len(self.bytes_per_token)] if self.bytes_per_token is not None else []
        self._n_needed = max([*sizes, n_ids if isinstance(n_ids, int) else 0])
        if self.model is not None:
            self._check_vocab_size()

    def _check_vocab_size(self) -> None:
        needed = self._n_needed
        if self.model.config.vocab_size < needed:
            raise UserError(
                f"the vocabulary has {needed} tokens and the model {self.model.config.vocab_size}: "
                f"build the model with vocab_size={needed}"
            )

    @property
    def counts_bytes(self) -> bool:
        """Is the number of bytes of each token known?"""
        if (self.vocabulary or {}).get("kind") == UNKNOWN:
            return False
        return self.bytes_per_token is not None or (self._n_ids or self.model.config.vocab_size) == 256

    def forward(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """tokens (B, T) -> logits (B, T, V) and the state after them; calls the model."""
        return self.model(tokens, state)

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """batch: see `split_batch`, or one of a stream. Returns scalars: the loss, and its two parts in nats per token.

        MetricsRecorder records them: a call of self.log would cost 0.45 ms in every step, logged or not.
        """
        restarts = getattr(batch, "restarts", None)
        if restarts is None:
            loss, nats, penalty = self.loss(*split_batch(batch))
        elif self._trainer is None:
            raise UserError("a stream needs Lightning's Trainer, whose steps carry the state: leave out stream=True")
        else:
            with self.carried.window(self.model, restarts, batch_idx, self.trainer):
                loss, nats, penalty = self.loss(*split_batch(batch))
        self._loss = self._loss + loss.detach()
        if self._trainer and not self._is_recorded:
            # The mean over the micro-batches so far: at the last one, the mean of the whole step.
            self._micro_batches.append(torch.stack([nats.detach(), penalty.detach()]))
            mean_nats, mean_penalty = torch.stack(self._micro_batches).mean(0)
            sync = self.trainer.world_size > 1
            self.log("train/loss", mean_nats, prog_bar=True, sync_dist=sync)
            if self._is_logging_step(self.trainer.global_step + 1):
                self.log("train/l2wrap", mean_penalty, sync_dist=sync)
        return {"loss": loss, "nats": nats.detach(), "l2wrap": penalty.detach()}

    def _is_logging_step(self, step: int) -> bool:
        """Does Lightning pass the metrics of optimizer step `step` to the loggers? A call of self.log costs 0.45 ms."""
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return every > 0 and step % every == 0

    def on_train_batch_end(self, outputs: Any, batch: Tensor, batch_idx: int) -> None:
        if self._is_recorded or self.trainer.fit_loop.epoch_loop._should_accumulate():
            return
        self._micro_batches.clear()
        if self._is_logging_step(self.trainer.global_step):
            self.log_dict({"train/grad_norm": self.grad_norm, "lr": self.last_lr})

    def loss(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """inputs, targets (B, T) -> scalars: the loss, and its parts, the nats per counted target and L2Wrap."""
        hidden = self.carried.read(self.model, inputs)
        nats, largest = head_cross_entropy(self.model.head, hidden, targets, self.loss_chunk_len)
        counted = (targets != IGNORE_INDEX).sum().clamp(min=1)
        mean, penalty = nats.mean() * (targets.numel() / counted), l2wrap(largest)
        return mean + penalty, mean, penalty

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        # Dropout's masks are a function of the seed and the position in the run, so no generator state is saved.
        loop = self.trainer.fit_loop.epoch_loop
        seed = derive_seed(self.seed, loop.total_batch_idx, self.trainer.global_rank)
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.default_generators[self.device.index].manual_seed(seed)
        # The loggers' step, one too high in Lightning after a resume at a step with a validation or an epoch's end.
        loop._batches_that_stepped = self.trainer.global_step
        if self.device_mesh is not None and self.trainer.accumulate_grad_batches > 1:
            self.model.set_requires_gradient_sync(not loop._should_accumulate())

    # Validation and test add up everything, so the score does not depend on the batch size. With several loaders, such
    # as those of a mix, each has a score too.

    def on_validation_epoch_start(self) -> None:
        self._sums = torch.zeros(len(self.trainer.num_val_batches), 3, dtype=torch.float64)

    def on_test_epoch_start(self) -> None:
        self._sums = torch.zeros(len(self.trainer.num_test_batches), 3, dtype=torch.float64)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """batch: see `split_batch`. Adds up nats, targets and bytes."""
        inputs, targets = split_batch(batch)
        hidden, _ = self.model.hidden(inputs)
        nats, _ = head_cross_entropy(self.model.head, hidden, targets, self.loss_chunk_len)
        n_targets = (targets != IGNORE_INDEX).sum()
        # To the CPU first, since some devices do not support float64.
        sums = torch.stack([nats.sum(), n_targets, count_bytes(targets, self.bytes_per_token)])
        self._sums[dataloader_idx] += sums.cpu()

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """batch: see `split_batch`. Returns the nats of each target (B, T), 0 for padding."""
        inputs, targets = split_batch(batch)
        hidden, _ = self.model.hidden(inputs)
        return head_cross_entropy(self.model.head, hidden, targets, self.loss_chunk_len)[0]

    def on_validation_epoch_end(self) -> None:
        self._report("val")

    def on_test_epoch_end(self) -> None:
        self._report("test")

    def _report(self, split: str) -> None:
        sums = self._sums
        if self.trainer.world_size > 1:
            sums = self.trainer.strategy.reduce(sums.to(self.device), reduce_op="sum")
        nats, n_targets, _ = sums.sum(0).tolist()
        figures = {f"{split}/loss": nats / max(n_targets, 1)}
        unit, column = ("byte", 2) if self.counts_bytes else ("token", 1)
        figures[f"{split}/bits_per_{unit}"] = bits_per_byte(nats, sums.sum(0).tolist()[column])
        names = getattr(self.trainer.datamodule, "corpus_names", [])  # type: ignore[attr-defined]
        for i, row in enumerate(sums.tolist()) if names or len(sums) > 1 else ():
            figures[f"{split}/bits_per_{unit}/{names[i] if names else i}"] = bits_per_byte(row[0], row[column])
        # A MetricsRecorder passes them to the loggers itself. Every process has the same values; without sync_dist,
        # Lightning would warn that it has not.
        shown, sync = not self._is_recorded, not self._is_recorded and self.trainer.world_size > 1
        self.log_dict(figures, logger=None if shown else False, prog_bar=shown, sync_dist=sync)

    # The optimizer

    def configure_optimizers(self) -> Optimizer:
        target = load_class("optim", self.optim._target_)
        groups = parameter_groups(self.model, self.lr_scale, split_blocks=target is MuonAdamW)
        return build_optimizer(target, groups, self.optim)

    def on_fit_start(self) -> None:
        if self.device.type == "cpu":
            tune_allocator()
        if not self.model.training:  # as load_weights returns it: Lightning would train without dropout
            self.model.train()
        for callback in self._callbacks:
            monitored = str(getattr(callback, "monitor", None))
            if "bits_per_byte" in monitored and not self.counts_bytes:
                other = monitored.replace("bits_per_byte", "bits_per_token")
                raise UserError(
                    f"{type(callback).__name__} monitors {monitored}, but the bytes of each token are unknown: "
                    f"give LitRWKV bytes_per_token=, or monitor {other}"
                )

    def on_train_start(self) -> None:
        if self.schedule.name != "constant":
            self._n_steps = self._count_steps()
            # fast_dev_run, lr_find and scale_batch_size try a few steps, which need not hold the schedule.
            is_trial = bool(self.trainer.fast_dev_run) or self.trainer.max_steps != self._max_steps  # type: ignore[attr-defined]
            if not is_trial:
                check_schedule(self.schedule, self._n_steps)
        for optimizer in self.trainer.optimizers:
            set_hyperparameters(optimizer, self.optim, self.lr_scale)
            if self.schedule != Schedule() and not any("lr_scale" in group for group in optimizer.param_groups):
                raise UserError(
                    "schedule= is only for the optimizer that LitRWKV builds: leave it out, and return a scheduler "
                    "from your own configure_optimizers"
                )

    @property
    def lr(self) -> float:
        """optim.lr, under the name that Lightning's learning rate finder reads and sets."""
        return self.optim.lr

    @lr.setter
    def lr(self, rate: float) -> None:
        self.optim = replace(self.optim, lr=rate)

    @property
    def lr_scale(self) -> dict[str, float]:
        """The factors of the learning rate, by the last part of a parameter's name."""
        return self.model.lr_scale if self.optim.lr_scale == "version" else self.optim.lr_scale or {}

    @property
    def current_lr(self) -> float:
        """The learning rate of the current optimizer step."""
        return self.lr_at(self.trainer.global_step)

    def lr_at(self, step: int) -> float:
        """The learning rate of optimizer step `step`, counted from 0."""
        return learning_rate(step, self.optim, self.schedule, self._n_steps or self.trainer.max_steps)

    def _count_steps(self) -> int:
        """The optimizer steps of the fit, from the Trainer's max_steps and max_epochs; -1 if it has no length."""
        try:
            n_steps = self.trainer.estimated_stepping_batches
        except MisconfigurationException:  # the accumulation changes from epoch to epoch
            n_steps = self.trainer.max_steps
        return int(n_steps) if math.isfinite(n_steps) else -1

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        # A callback such as BaseFinetuning adds groups, and a subclass can configure another optimizer.
        groups = [group for group in optimizer.param_groups if "lr_scale" in group]
        if self.trainer.lr_scheduler_configs or not groups:  # StochasticWeightAveraging and lr_find set the rates
            self.last_lr = optimizer.param_groups[0]["lr"]
        else:
            self.last_lr = self.current_lr
            for group in groups:
                group["lr"] = self.last_lr * group["lr_scale"]
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.carried.commit(self.trainer.global_step + 1, self._guard.skips_this)
        if self.trainer.global_step + 1 == self.trainer.max_steps:
            # Lightning counts this step after the hook returns. It validates before the end if should_stop is set, but
            # not if the run merely reaches max_steps.
            self.trainer.should_stop = True

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Computes the gradient's norm once, for the metrics, for clipping and for the check that it is finite."""
        self.check_finite()
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        self.grad_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        loss = torch.as_tensor(self._loss, device=norm.device) / self.trainer.accumulate_grad_batches
        self._loss = 0.0
        if self._loss_scaled and self.trainer.world_size > 1:
            loss = self.trainer.strategy.reduce(loss, reduce_op="mean")
        self._guard.look(self.grad_norm, loss, self.trainer.global_step, self.last_lr)
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
        """Does the optimizer itself skip a non-finite step? If the host checked first, it would wait for the GPU."""
        # SGD initialises its momentum with the first gradient; a skipped first step would leave it uninitialised.
        starts_momentum = bool(optimizer.defaults.get("momentum")) and not optimizer.state
        # The fused kernels take no plain tensor, the flag, together with parts of sharded parameters.
        fused = bool(optimizer.defaults.get("fused")) and self.device_mesh is None
        return self.device.type == "cuda" and fused and not self._loss_scaled and not starts_momentum

    def check_finite(self) -> bool:
        """Was the last optimizer step finite? If not, logs a warning or raises RunError."""
        return self._guard.check_finite(self._loss_scaled, self.trainer.is_global_zero)

    def on_validation_start(self) -> None:
        self.check_finite()

    def on_train_end(self) -> None:
        self.check_finite()
        if not self._is_recorded and self.finish_reason() == "length":
            self.trainer.should_stop = False  # a further fit, such as after BatchSizeFinder, would end at once

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.check_finite()
        interval, accumulate = self.trainer.val_check_interval, self.trainer.accumulate_grad_batches
        names = [name for name, (cls, _) in MODELS.items() if isinstance(self.model, cls)]
        checkpoint[KEY] = Metadata(
            model=names[0] if names else type(self.model).__qualname__,
            config=asdict(self.model.config) if names else {},
            vocabulary=self.vocabulary,
            optim=asdict(self.optim),
            schedule=asdict(self.schedule),
            finished=self.finish_reason(),
            past=self.past,
            skipped=self._guard.skipped,
            accumulate=accumulate,
            precision=self.trainer.precision,
            val_check_interval=interval // accumulate if isinstance(interval, int) else None,
            threads=torch.get_num_threads(),
        ).to_dict()
        if "loops" in checkpoint:
            rewind(checkpoint, accumulate, self.trainer.num_training_batches)
            if state := self.carried.gather(self.model, self.trainer):
                checkpoint[STREAM_KEY] = state

    def finish_reason(self) -> str | None:
        """Why the run has ended: length, time (trainer.max_time), pruned or early stop (by a callback); else None."""
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
        stored = checkpoint.get(KEY, {})
        self._guard.skipped = stored.get("skipped", 0)
        self.carried.load(checkpoint.get(STREAM_KEY), checkpoint.get("global_step", 0))
        averaged = any(isinstance(callback, WeightAveraging) for callback in self._callbacks)
        if "current_model_state" in checkpoint and not averaged:
            # Weight averaging was removed: continue from the trained weights, not from their average.
            checkpoint["state_dict"] = checkpoint["current_model_state"]
        if "loops" in checkpoint and getattr(self.trainer.datamodule, "batch_is_a_step", False):  # type: ignore[attr-defined]
            rescale(checkpoint, stored.get("accumulate"), self.trainer.accumulate_grad_batches)
