"""Estimates a training before it starts: FLOPs per token, memory, and the largest micro-batch that fits."""

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.plugins import Precision
from torch import Tensor

from rwkv_pl import limits
from rwkv_pl.training.peak_flops import matmul_dtype
from rwkv_pl.training.sharded import local_part

# The rest is for memory that the estimate does not cover: workspaces, fragmentation, other programs.
SHARE_OF_FREE_MEMORY = 0.8
# On a CPU, freed memory stays in the heap, and gradients and optimizer state that are allocated between activations
# keep it from being reused: a share of the weights' bytes, and working memory of the libraries. Fitted to the peaks of
# docs/guides/scale.md.
HEAP_PER_WEIGHT, HEAP = 1.5, 30_000_000
# The forward passes to measure have this many tokens, and twice as many.
PROBE_TOKENS = 64


@dataclass
class MemoryEstimate:
    """The cost of training a model: its FLOPs per token, and its memory as a function of the micro-batch.

    parameters:     their number.
    flops:          floating-point operations of the matrix products for one token, forward and backward.
    fixed:          bytes of weights, gradients, optimizer state, casts of the weights, carried states and a CPU's heap.
    per_token:      bytes of saved tensors and working memory, for each token of a micro-batch.
    per_recomputed: the part of per_token that is recomputed, not saved, from recompute_from tokens on.
    per_logits:     bytes for each token whose logits are in memory at once, at most chunk_len tokens (None: all).
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
        """The memory of training with micro-batches of this many tokens, in bytes."""
        per_token = self.per_token - (self.per_recomputed if tokens >= self.recompute_from else 0)
        n_logits = tokens if self.chunk_len is None else min(tokens, self.chunk_len)
        return self.fixed + int(per_token * tokens + self.per_logits * n_logits)


def estimate_memory(module: Any, precision: Precision, carried_rows: int = 0) -> MemoryEstimate:
    """Estimate the cost of a LitRWKV's model from forward passes over a few tokens, on the model's device.

    carried_rows: the rows of a step whose state this process carries to the next step, in a stream.
    """
    parameters = list(module.parameters())
    flops = module.model.flops_per_token
    # Weights, gradients, and Adam's two moments.
    fixed = 4 * sum(local_part(p).nbytes for p in parameters)
    if module.device_mesh is not None:
        fixed += _count_whole(module)
    if carried_rows:  # the states before the step, and those after it
        of_a_row = sum(x.nbytes for block in module.model.empty_state(1) for x in block)
        fixed += 2 * carried_rows * of_a_row
    config, chunk_len = module.model.config, module.loss_chunk_len
    few, more = (_measure_kept(module, precision, n_tokens) for n_tokens in (PROBE_TOKENS, 2 * PROBE_TOKENS))
    casts, per_token = max(0, 2 * few - more), (more - few) / PROBE_TOKENS
    per_recomputed = (few - _measure_kept(module, precision, PROBE_TOKENS, recomputed=True)) / PROBE_TOKENS
    # The gradient of the logits, float32, is allocated while everything else is still in memory.
    per_logits = 4.0 * config.vocab_size
    if chunk_len:
        few, more = (
            _measure_kept(module, precision, n_tokens, chunk_len=PROBE_TOKENS // 2)
            for n_tokens in (PROBE_TOKENS, 2 * PROBE_TOKENS)
        )
        without_logits = (more - few) / PROBE_TOKENS
        per_logits += per_token - without_logits
        per_token = without_logits
    # Working memory of the backward pass: the gradient of the widest layer (4 n_embd), or the tensors of the time
    # mixing, and two gradients of the residual stream. Doubled, for fragmentation of the heap.
    dtype = matmul_dtype(parameters[0].device, precision)
    widest = max(4 * dtype.itemsize, 4 * module.model.backward_tensors)
    per_token += 2 * (widest + 2 * 4) * config.n_embd
    fixed += count_heap(parameters)
    n_parameters = sum(p.numel() for p in parameters)
    from_tokens = module.model.recompute_from
    return MemoryEstimate(
        n_parameters, flops, fixed + casts, per_token, per_recomputed, from_tokens, per_logits, chunk_len
    )


def count_heap(parameters: list[Any]) -> int:
    """Bytes that the heap of a CPU holds besides the tensors; 0 on other devices."""
    if parameters[0].device.type != "cpu":
        return 0
    return HEAP + int(HEAP_PER_WEIGHT * sum(p.nbytes for p in parameters))


def _measure_kept(
    module: Any, precision: Precision, n_tokens: int, chunk_len: int | None = None, recomputed: bool = False
) -> int:
    """Bytes that autograd saves in a forward pass over n_tokens tokens."""
    model, before, threshold = module.model, module.loss_chunk_len, module.model.recompute_from
    module.loss_chunk_len, model.recompute_from = chunk_len, 0 if recomputed else n_tokens + 1
    try:
        kept = _measure_kept_for_backward(module, n_tokens, precision)
        if getattr(model, "activation_checkpointing", False):
            model.activation_checkpointing = False
            unchecked = _measure_kept_for_backward(module, n_tokens, precision)
            model.activation_checkpointing = True
            # The backward pass recomputes the saved tensors of one block at a time. The heap cannot reuse the memory of
            # the block before, because its free pieces are too small, so count two blocks.
            kept += 2 * (unchecked - kept) // model.config.n_layer
    finally:
        module.loss_chunk_len, model.recompute_from = before, threshold
    return kept


class _Saved:
    """A tensor that autograd has saved. The object lives as long as the graph needs the tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _measure_kept_for_backward(module: Any, n_tokens: int, precision: Precision) -> int:
    """Bytes that autograd saves between the forward pass of one row and its backward pass, parameters excluded."""
    device = next(module.parameters()).device
    saved: weakref.WeakSet[_Saved] = weakref.WeakSet()

    def save(tensor: Tensor) -> _Saved:
        saved.add(kept := _Saved(tensor))
        return kept

    tokens = torch.zeros(1, n_tokens, dtype=torch.int64, device=device)
    devices = [device] if device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices),
        precision.forward_context(),
        torch.autograd.graph.saved_tensors_hooks(save, lambda kept: kept.tensor),
    ):
        loss, *_ = module.loss(tokens, tokens)
    # Counted at the end: the graph of unused results is free by then, and its memory may have been used again.
    storages = [kept.tensor.untyped_storage() for kept in saved]
    # Whole parameters of a sharded block are saved too, but already freed: 0 bytes.
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}
    del loss
    for parameter in module.parameters():
        sizes.pop(local_part(parameter).untyped_storage().data_ptr(), None)
    return sum(sizes.values())


def _count_whole(module: Any) -> int:
    """Bytes that a process of a sharded model has at most besides its parts: whole parameters and their gradients.

    The embedding and the head, the block in use and the next one. Accumulating keeps all gradients whole.
    """
    n_bytes = sum(p.nbytes for p in module.parameters())
    blocks = [sum(p.nbytes for p in block.parameters()) for block in module.model.blocks]
    in_use = n_bytes - sum(blocks) + 2 * max(blocks)
    return in_use + (n_bytes if module.trainer.accumulate_grad_batches > 1 else in_use)


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on the device; on the CPU, within the limits of the control groups."""
    if device.type == "cuda":
        # Memory that torch has reserved and does not use is free too.
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    return limits.free_memory()


def find_accumulation(
    module: Any, estimate: MemoryEstimate, rows: int, ctx_len: int, precision: Precision
) -> int | None:
    """The smallest number of micro-batches, a divisor of a device's `rows`, that fits in memory; None if none does."""
    device = next(module.parameters()).device
    free = SHARE_OF_FREE_MEMORY * free_memory(device)
    for accumulate in (divisor for divisor in range(1, rows + 1) if rows % divisor == 0):
        fits = estimate.bytes(rows // accumulate * ctx_len) <= free
        # On a GPU, too large an allocation raises an error, so try it. On a CPU, the system would kill the process. And
        # the other processes of a sharded model would wait for the one that fails.
        untested = device.type == "cpu" or module.device_mesh is not None
        if fits and (untested or fits_in_memory(module, rows // accumulate, ctx_len, precision)):
            return accumulate
    return None


def fits_in_memory(module: Any, rows: int, ctx_len: int, precision: Precision) -> bool:
    """Run a forward and backward pass of one micro-batch on the device: does it fit in memory?"""
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
    """Format an amount with three digits and an SI prefix: 1.23 GB, 45.6 MFLOPs."""
    for power in ("", "k", "M", "G", "T"):
        if amount < 999.5 or power == "T":
            break
        amount /= 1000
    return f"{amount:.3g} {power}{unit}"
