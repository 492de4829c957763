"""torch.compile for a model's blocks, in place: no parameter changes its name, and what can't be compiled runs eagerly.

Blocks of one make share a graph. The embedding and the head stay as they are: there is nothing to fuse in them.
"""

import logging
import re
import time
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.plugins import Precision
from torch import nn

log = logging.getLogger(__name__)

LONGEST_REASON = 200


def compile_blocks(module: Any, rows: int, ctx_len: int, precision: Precision) -> str:
    """Compiles the blocks of LitRWKV's model, and tries them on a step of (rows, ctx_len) tokens without a trace.

    Returns what became of it, a line. Other shapes, as a validation's, are compiled when they come; where that fails,
    all blocks run eagerly from then on, and a warning says why.
    """
    started = time.perf_counter()
    blocks = list(module.model.blocks)
    tokens = torch.zeros(rows, ctx_len, dtype=torch.int64, device=module.device)
    try:
        for block in blocks:
            # Of fixed shapes the backward pass is compiled along with the forward pass, so nothing can fail later.
            block.compile(dynamic=False)
        with precision.forward_context():
            loss, *_ = module.loss(tokens, tokens)
        loss.backward()
    except torch.OutOfMemoryError:
        pass  # of the step, compiled or not: the run will say what to do
    except Exception as error:
        return _leave_eager(blocks, error)
    finally:
        module.zero_grad(set_to_none=True)
    for block in blocks:
        _guard_block(block, blocks)
    return f"compile {len(blocks)} blocks, in {time.perf_counter() - started:.0f} s"


def _guard_block(block: Any, blocks: Sequence[nn.Module]) -> None:
    """Sees to it that no compilation ends a run, and that none is made for a few tokens of text."""
    from torch._dynamo.exc import TorchDynamoException

    compiled, eager = block._compiled_call_impl, block._call_impl

    def call(x: torch.Tensor, state: Any) -> Any:
        if state is not None or x.shape[1] == 1:
            return eager(x, state)
        try:
            return compiled(x, state)
        except TorchDynamoException as error:
            log.warning(_leave_eager(blocks, error))
            return eager(x, state)

    # What Module.compile sets: no part of a state_dict, and a copy of the module goes without.
    block._compiled_call_impl = call


def _leave_eager(blocks: Sequence[nn.Module], error: Exception) -> str:
    for block in blocks:
        block._compiled_call_impl = None
    return f"compile off: {_find_reason(error)}"


def _find_reason(error: Exception) -> str:
    """The first line of a C++ compiler's output that tells an error, else what stands before torch's advice."""
    message = str(error)
    found = re.search(r"^.*\berror: .*$", message, re.MULTILINE)
    reason = " ".join((found[0] if found else message.strip().partition("\n\n")[0]).split())
    return reason[:LONGEST_REASON] or type(error).__name__
