"""What a training costs before it begins: arithmetic a token, memory, and the micro-batch that fits."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from lightning.pytorch.plugins import Precision
from torch import Tensor

# Of what is free; the rest is for what the estimate does not know: workspaces, fragments, other programs.
SHARE_OF_FREE_MEMORY = 0.8


@dataclass
class Footprint:
    """parameters: their number. flops: floating-point operations of training on one token, forward and backward, of the
    matrix products. fixed and per_token: bytes of memory: of weights, gradients and optimizer; and of what the backward
    pass keeps for each token of a micro-batch.
    """

    parameters: int
    flops: int
    fixed: int
    per_token: float

    def bytes(self, tokens: int) -> int:
        """Of a micro-batch of so many tokens."""
        return self.fixed + int(self.per_token * tokens)


def footprint(module: Any, precision: Precision) -> Footprint:
    """Of a LitRWKV's model, measured by forward passes of a few tokens on the device where it lies."""
    parameters = list(module.parameters())
    matrices = [p for name, p in module.model.named_parameters() if p.dim() == 2 and not name.startswith("emb.")]
    # A product of a token's vector takes two operations a weight forwards, and twice that backwards.
    flops = 6 * sum(p.numel() for p in matrices)
    # Weights, gradients, and Adam's two moments.
    fixed = 4 * sum(p.numel() * p.element_size() for p in parameters)
    model, chunk_len = module.model, module.loss_chunk_len
    if chunk_len:
        # Logits, their softmax and its gradient, of one chunk at a time.
        fixed += 3 * 4 * chunk_len * model.config.vocab_size
        module.loss_chunk_len = 1 << 5  # short enough for what is measured here
        per_token = _kept_per_token(module, precision)
        module.loss_chunk_len = chunk_len
    else:
        # The logits' own gradient comes on top, when the rest is still there.
        per_token = _kept_per_token(module, precision) + 4 * model.config.vocab_size
    return Footprint(sum(p.numel() for p in parameters), flops, fixed, per_token)


def _kept_per_token(module: Any, precision: Precision) -> float:
    few, more = 64, 128
    kept = [_kept_for_backward(module, n_tokens, precision) for n_tokens in (few, more)]
    per_token = (kept[1] - kept[0]) / (more - few)
    if getattr(module.model, "activation_checkpointing", False):
        # The backward pass makes what one block keeps again, block by block.
        module.model.activation_checkpointing = False
        whole = _kept_per_token(module, precision)
        module.model.activation_checkpointing = True
        per_token += (whole - per_token) / module.model.config.n_layer
    return per_token


def _kept_for_backward(module: Any, n_tokens: int, precision: Precision) -> int:
    """Bytes that autograd keeps between a forward pass of one row and its backward pass, parameters left out."""
    device = next(module.parameters()).device
    known = {p.untyped_storage().data_ptr() for p in module.parameters()}
    total = 0

    def seen(tensor: Tensor) -> Tensor:
        nonlocal total
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            known.add(storage.data_ptr())
            total += storage.nbytes()
        return tensor

    tokens = torch.zeros(1, n_tokens, dtype=torch.int64, device=device)
    devices = [device] if device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices),
        precision.forward_context(),
        torch.autograd.graph.saved_tensors_hooks(seen, lambda tensor: tensor),
    ):
        loss, *_ = module.loss(tokens, tokens)
    del loss
    return total


def free_memory(device: torch.device) -> int:
    """Bytes that a program can still have on the device; on the CPU within its control group."""
    if device.type == "cuda":
        # What torch holds and does not use is free too.
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    free = psutil.virtual_memory().available
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):
        return free
    return min(free, limit - used)


def accumulation_that_fits(module: Any, cost: Footprint, rows: int, ctx_len: int, precision: Precision) -> int | None:
    """The smallest number of micro-batches, a divisor of a device's `rows`, whose memory fits; None where none does."""
    device = next(module.parameters()).device
    free = SHARE_OF_FREE_MEMORY * free_memory(device)
    for accumulate in (divisor for divisor in range(1, rows + 1) if rows % divisor == 0):
        fits = cost.bytes(rows // accumulate * ctx_len) <= free
        # A GPU refuses what is too much; on a CPU the system would kill the process.
        if fits and (device.type == "cpu" or is_enough(module, rows // accumulate, ctx_len, precision)):
            return accumulate
    return None


def is_enough(module: Any, rows: int, ctx_len: int, precision: Precision) -> bool:
    """Tries a micro-batch out on the device: does its memory do?"""
    tokens = torch.zeros(rows, ctx_len, dtype=torch.int64, device=next(module.parameters()).device)
    try:
        with precision.forward_context():
            loss, *_ = module.loss(tokens, tokens)
        loss.backward()
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        module.zero_grad(set_to_none=True)


def in_units(amount: float, unit: str = "B") -> str:
    """1.23 GB, 45.6 MFLOPs: three digits and the power of a thousand."""
    for power in ("", "k", "M", "G", "T"):
        if amount < 999.5 or power == "T":
            break
        amount /= 1000
    return f"{amount:.3g} {power}{unit}"
