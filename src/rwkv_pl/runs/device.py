"""Chooses the accelerator, the precision and the kernel of a run."""

import torch

from rwkv_pl.config import Train
from rwkv_pl.errors import UserError, one_line
from rwkv_pl.model import MODELS
from rwkv_pl.ops.backend import KernelError, use_kernel
from rwkv_pl.ops.self_tests import SELF_TESTS
from rwkv_pl.runs.agreement import decide_on_first_rank
from rwkv_pl.training.precision import SIMILAR, describe_speedup, measure_product_rates


def choose_accelerator(key: str, name: str) -> str:
    """Resolve `auto` to a CUDA GPU or the CPU. Raises UserError if the accelerator is not available.

    Lightning's own `auto` includes devices that are untested here. key: the setting, for the error.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    has_mps = name in ("mps", "gpu") and torch.backends.mps.is_available()
    if name == "cpu" or has_mps or (name in ("cuda", "gpu") and torch.cuda.is_available()):
        return name
    if name == "mps":
        cause = "torch finds no GPU of a Mac"
        if not torch.backends.mps.is_built():
            cause = "this torch is built without MPS: install torch from pytorch.org on a Mac"
    else:
        cause = "torch finds no GPU: check nvidia-smi and CUDA_VISIBLE_DEVICES"
        if not torch.backends.cuda.is_built():
            cause = "this torch is built without CUDA: install a CUDA build from pytorch.org"
    raise UserError(f"{key}={name} is not available, {cause}, or use {key}=cpu")


def choose_precision(config: Train, stored: str | None) -> str | None:
    """Resolve `auto` to bf16-mixed if that is faster on the device, else to 32-true. Returns a line to print, or None.

    stored: the precision of the run before a resume, which `auto` keeps.
    """
    trainer = config.trainer
    asked = trainer["precision"]
    if asked == "auto" and stored:
        asked = trainer["precision"] = stored
    on_gpu = trainer["accelerator"] in ("cuda", "gpu") and torch.cuda.is_available()
    if asked != "auto" and (on_gpu or not str(asked).startswith("bf16")):
        return None
    device = torch.device("cuda" if on_gpu else "cpu")
    choose_matmul_precision(config, device)
    tokens = config.data.batch_size * config.data.ctx_len

    def measure() -> str:
        rates = measure_product_rates(device, tokens, config.model.n_embd)
        return repr(rates[torch.bfloat16] / rates[torch.float32])

    speedup = float(decide_on_first_rank("bf16_speedup", measure))
    comparison = f"bf16 products are {describe_speedup(speedup)} in float32 on this {device.type.upper()}"
    if asked == "auto":
        trainer["precision"] = "bf16-mixed" if speedup > 1 else "32-true"
        return f"precision {trainer['precision']}: {comparison} (trainer.precision=auto)"
    return f"precision {asked}: {comparison}; 32-true would be faster" if speedup < 1 / SIMILAR else None


def choose_matmul_precision(config: Train, device: torch.device) -> None:
    """Set the precision of float32 matrix products on a GPU. Raises UserError if a CPU lacks trainer.precision."""
    precision = config.trainer["precision"]
    if device.type == "cpu" and str(precision) in ("16-mixed", "16"):
        raise UserError(f"trainer.precision={precision} needs a GPU; use trainer.precision=auto on a CPU")
    if device.type == "cuda":
        # Not on a CPU, where oneDNN would round to bfloat16 or tf32.
        torch.set_float32_matmul_precision("high" if config.tf32 else "highest")


def choose_kernel(name: str, device: torch.device, version: str) -> None:
    """Select the kernel, and build that of the model's version if needed. Raises UserError if that fails."""
    use_kernel(name)
    try:
        SELF_TESTS[MODELS[version][0].library](1, device, torch.float32)
    except KernelError as error:
        raise UserError(f"kernel={name} is not available: {error.reason}; or use kernel=auto") from error
    except RuntimeError as error:
        raise UserError(f"kernel={name}: {one_line(error)}") from error
