"""Measurements and the printed head of a run, once its model is on the device and before the first step."""

import logging
import lzma
import zlib
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping

from rwkv_pl.config import Train
from rwkv_pl.data.datamodule import DataModule
from rwkv_pl.data.order import micro_batch_rows
from rwkv_pl.errors import UserError
from rwkv_pl.runs.build import describe_code
from rwkv_pl.runs.inputs import Inputs, count_validation_batches
from rwkv_pl.runs.outcome import Record, write_baselines
from rwkv_pl.training.callbacks.metrics import MetricsRecorder
from rwkv_pl.training.compile import compile_blocks
from rwkv_pl.training.memory import MemoryEstimate, estimate_memory, find_accumulation, format_si, free_memory
from rwkv_pl.training.peak_flops import load_or_measure_peak, matmul_dtype

log = logging.getLogger("rwkv_pl")

# Compressing more would delay the start for a figure that only serves as a comparison.
BASELINE_BYTES = 4_000_000


class Start(Callback):
    """Measures the model on its device, divides the batch (accumulate_grad_batches=auto), compiles the blocks, and
    prints the head of the run. Starts `record` when the training starts.
    """

    def __init__(self, inputs: Inputs, metrics: MetricsRecorder, record: Record) -> None:
        self.inputs, self.metrics, self.record = inputs, metrics, record

    def on_load_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            state = checkpoint["callbacks"].get(callback.state_key)
            if isinstance(callback, EarlyStopping) and state:
                state["patience"] = callback.patience  # Lightning would restore the one of the checkpoint

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        config, remarks, precision = self.inputs.config, list(self.inputs.remarks), trainer.precision_plugin
        device, dtype = trainer.strategy.root_device, matmul_dtype(trainer.strategy.root_device, precision)
        if device.type not in ("cpu", "cuda"):
            remarks.append(f"device  {device.type} is untested: rwkv_pl has never run on one")
        divides = config.trainer["accumulate_grad_batches"] == "auto" and not self.inputs.accumulate
        # Of a sharded model, all processes compute together.
        estimates = trainer.is_global_zero or divides or pl_module.device_mesh is not None
        carried = config.data.batch_size // trainer.world_size if config.data.stream else 0
        estimate = estimate_memory(pl_module, precision, carried) if estimates else None
        if config.trainer["accumulate_grad_batches"] == "auto":
            if divides and estimate:
                self._divide_batch(trainer, pl_module, estimate)
            found = trainer.accumulate_grad_batches
            remarks.append(
                f"batch   {config.data.batch_size} sequences in {found} micro-batches: accumulate_grad_batches=auto"
            )
        rows = config.data.batch_size // (trainer.world_size * trainer.accumulate_grad_batches)
        if config.compile:
            remarks.append(compile_blocks(pl_module, rows, config.data.ctx_len, precision, config.data.stream))
        if not trainer.is_global_zero or not estimate:
            return
        self.metrics.flops_per_token = estimate.flops
        self.metrics.baselines = measure_baselines(config, self.inputs.data)
        write_baselines(self.metrics.folder, self.metrics.baselines)
        peak = load_or_measure_peak(device, dtype)
        self.metrics.peak = peak * trainer.world_size
        each = f"{trainer.world_size} x " if trainer.world_size > 1 else ""
        described = self.inputs.data.description().splitlines()
        model, windows = config.model, f"{rows} x {config.data.ctx_len:,} tokens"
        for line in (
            f"run     {trainer.default_root_dir}",
            *remarks,
            "data    " + "\n        ".join(text.replace(": ", ":\n        ", 1) for text in described),
            f"model   {model.name}, {model.n_layer} x {model.n_embd}, {estimate.parameters:,} parameters, "
            f"{format_si(estimate.flops, 'FLOP')} a token",
            f"optim   {config.optim._target_.rpartition('.')[2]}, lr {config.optim.lr:g}, {config.schedule.name}",
            f"memory  about {format_si(estimate.bytes(rows * config.data.ctx_len))} for weights, optimizer and a "
            f"micro-batch of {windows}, of {format_si(free_memory(device))} free",
            f"machine {each}{format_si(peak, 'FLOP/s')} in {str(dtype).removeprefix('torch.')} matrix products, "
            "measured: MFU (model FLOPs utilisation) is the share of it",
            f"length  {self.inputs.describe_length()}",
            f"code    {describe_code()}",
        ):
            log.info(line)

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.record.start()

    def _divide_batch(self, trainer: Trainer, pl_module: Any, estimate: MemoryEstimate) -> None:
        data = self.inputs.config.data
        rows, left = divmod(data.batch_size, trainer.world_size)
        precision = trainer.precision_plugin
        found = 1 if left else find_accumulation(pl_module, estimate, rows, data.ctx_len, precision)
        # All processes use the division of the one with the least memory. None (nothing fits) counts as the largest.
        most = int(trainer.strategy.reduce(torch.tensor(found or rows + 1, device=pl_module.device), reduce_op="max"))
        if most > rows:
            raise UserError(
                f"trainer.accumulate_grad_batches=auto: not even one sequence fits in memory, it needs about "
                f"{format_si(estimate.bytes(data.ctx_len))}: use a smaller model or data.ctx_len"
            )
        micro_batch_rows(data.batch_size, world_size=trainer.world_size, rank=0, accumulate=most, micro_batch=0)
        trainer.accumulate_grad_batches = most
        trainer.val_check_interval *= most  # Lightning counts it in micro-batches


def measure_baselines(config: Train, data: DataModule) -> dict[str, float]:
    """Return the bits per byte of gzip -9 and xz -9 on the text that a validation reads; {} if that is too long."""
    counts = count_validation_batches(config, data)
    if data.unit != "byte" or not 0 < sum(counts) * config.data.eval_batch_size * config.data.ctx_len <= BASELINE_BYTES:
        return {}
    corpora = data.eval_batches("val", all_processes=True)
    batches = [corpus[i] for corpus in corpora for i in range(len(corpus))]
    targets = np.concatenate([batch[:, 1:].flatten().numpy() for batch in batches])
    text = data.vocabulary.decode(targets[targets >= 0])
    if not 0 < len(text) <= BASELINE_BYTES:
        return {}
    gzip = zlib.compressobj(9, zlib.DEFLATED, 31)
    # A dictionary as large as the text gives the same size as the 64 MiB of xz -9, which take 55 ms to allocate.
    xz = {"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": max(4096, len(text))}
    sizes = {"gzip -9": len(gzip.compress(text) + gzip.flush()), "xz -9": len(lzma.compress(text, filters=[xz]))}
    return {name: 8 * size / len(text) for name, size in sizes.items()}
