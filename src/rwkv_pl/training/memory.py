"""What a training costs before it begins: arithmetic a token, memory, and the micro-batch that fits."""

from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.plugins import Precision
from torch import Tensor

from rwkv_pl import limits
from rwkv_pl.training.peak_flops import matmul_dtype

# Of what is free; the rest is for what the estimate does not know: workspaces, fragments, other programs.
SHARE_OF_FREE_MEMORY = 0.8
# Tokens of what is measured, once and twice.
PROBE_TOKENS = 64


@dataclass
class MemoryEstimate:
    """parameters: their number. flops: floating-point operations of training on one token, forward and backward, of the
    matrix products. Bytes of memory: fixed, of weights, gradients, optimizer and the weights' casts; per_token, of what
    the backward pass keeps and works with, for each token of a micro-batch; per_recomputed, of that, what is not kept
    from recompute_from tokens on; per_logits, for each token whose logits are there at once, at most chunk_len.
    """

    parameters: int
    flops: int
    fixed: int
    per_token: float
    per_recomputed: float
    recompute_from: int
    per_logits: float
    chunk_len: int | None

    def bytes(self, tokens: int) -> int:
        """Of a micro-batch of so many tokens."""
        per_token = self.per_token - (self.per_recomputed if tokens >= self.recompute_from else 0)
        n_logits = tokens if self.chunk_len is None else min(tokens, self.chunk_len)
        return self.fixed + int(per_token * tokens + self.per_logits * n_logits)


def estimate_memory(module: Any, precision: Precision) -> MemoryEstimate:
    """Of a LitRWKV's model, measured by forward passes of a few tokens on the device where it lies."""
    parameters = list(module.parameters())
    matrices = [p for name, p in module.model.named_parameters() if p.dim() == 2 and not name.startswith("emb.")]
    # A product of a token's vector takes two operations a weight forwards, and twice that backwards.
    flops = 6 * sum(p.numel() for p in matrices)
    # Weights, gradients, and Adam's two moments.
    fixed = 4 * sum(p.numel() * p.element_size() for p in parameters)
    config, chunk_len = module.model.config, module.loss_chunk_len
    few, more = (_measure_kept(module, precision, n_tokens) for n_tokens in (PROBE_TOKENS, 2 * PROBE_TOKENS))
    casts, per_token = max(0, 2 * few - more), (more - few) / PROBE_TOKENS
    per_recomputed = (few - _measure_kept(module, precision, PROBE_TOKENS, recomputed=True)) / PROBE_TOKENS
    # The logits' own gradient comes on top, when the rest is still there.
    per_logits = 4.0 * config.vocab_size
    if chunk_len:
        few, more = (
            _measure_kept(module, precision, n_tokens, chunk_len=PROBE_TOKENS // 2)
            for n_tokens in (PROBE_TOKENS, 2 * PROBE_TOKENS)
        )
        without_logits = (more - few) / PROBE_TOKENS
        per_logits += per_token - without_logits
        per_token = without_logits
    # Of the widest layer the gradient, of the residual stream that before the block and that behind it; as much again
    # of holes in the heap.
    dtype = matmul_dtype(parameters[0].device, precision)
    per_token += 2 * (4 * dtype.itemsize + 2 * 4) * config.n_embd
    n_parameters = sum(p.numel() for p in parameters)
    from_tokens = module.model.recompute_from
    return MemoryEstimate(
        n_parameters, flops, fixed + casts, per_token, per_recomputed, from_tokens, per_logits, chunk_len
    )


def _measure_kept(
    module: Any, precision: Precision, n_tokens: int, chunk_len: int | None = None, recomputed: bool = False
) -> int:
    """Bytes that autograd keeps of a forward pass over so many tokens."""
    model, before, threshold = module.model, module.loss_chunk_len, module.model.recompute_from
    module.loss_chunk_len, model.recompute_from = chunk_len, 0 if recomputed else n_tokens + 1
    try:
        kept = _measure_kept_for_backward(module, n_tokens, precision)
        if getattr(model, "activation_checkpointing", False):
            model.activation_checkpointing = False
            unchecked = _measure_kept_for_backward(module, n_tokens, precision)
            model.activation_checkpointing = True
            # The backward pass makes what one block keeps again, block by block; in the heap each finds the holes of
            # the one before too small, so that two are there.
            kept += 2 * (unchecked - kept) // model.config.n_layer
    finally:
        module.loss_chunk_len, model.recompute_from = before, threshold
    return kept


def _measure_kept_for_backward(module: Any, n_tokens: int, precision: Precision) -> int:
    """Bytes that autograd keeps between a forward pass of one row and its backward pass, parameters left out."""
    device = next(module.parameters()).device
    known = {p.untyped_storage().data_ptr() for p in module.parameters()}
    total = 0

    def count_storage(tensor: Tensor) -> Tensor:
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
        torch.autograd.graph.saved_tensors_hooks(count_storage, lambda tensor: tensor),
    ):
        loss, *_ = module.loss(tokens, tokens)
    del loss
    return total


def free_memory(device: torch.device) -> int:
    """Bytes that a program can still have on the device; on the CPU within its control groups."""
    if device.type == "cuda":
        # What torch holds and does not use is free too.
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    return limits.free_memory()


def find_accumulation(
    module: Any, estimate: MemoryEstimate, rows: int, ctx_len: int, precision: Precision
) -> int | None:
    """The smallest number of micro-batches, a divisor of a device's `rows`, whose memory fits; None where none does."""
    device = next(module.parameters()).device
    free = SHARE_OF_FREE_MEMORY * free_memory(device)
    for accumulate in (divisor for divisor in range(1, rows + 1) if rows % divisor == 0):
        fits = estimate.bytes(rows // accumulate * ctx_len) <= free
        # A GPU refuses what is too much; on a CPU the system would kill the process.
        if fits and (device.type == "cpu" or fits_in_memory(module, rows // accumulate, ctx_len, precision)):
            return accumulate
    return None


def fits_in_memory(module: Any, rows: int, ctx_len: int, precision: Precision) -> bool:
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


def format_si(amount: float, unit: str = "B") -> str:
    """1.23 GB, 45.6 MFLOPs: three digits and the power of a thousand."""
    for power in ("", "k", "M", "G", "T"):
        if amount < 999.5 or power == "T":
            break
        amount /= 1000
    return f"{amount:.3g} {power}{unit}"
