"""Applies torch.compile to the blocks of a model, in place. If compilation fails, the blocks run eagerly.

Parameter names do not change. Blocks of the same structure share a graph. The embedding and the head are not compiled:
they have nothing to fuse.
"""

import logging
import re
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from lightning.pytorch.plugins import Precision
from torch import nn

log = logging.getLogger(__name__)

LONGEST_REASON = 200


def compile_blocks(module: Any, rows: int, ctx_len: int, precision: Precision, stream: bool = False) -> str:
    """Compile the blocks of LitRWKV's model and test them on a step of (rows, ctx_len) tokens, without side effects.

    stream: the step starts from a state, as in a stream.
    Returns the result as one line of text. Other shapes, such as those of validation, are compiled when they first
    occur. If that fails, all blocks run eagerly from then on, and a warning says why.
    """
    started = time.perf_counter()
    blocks = list(module.model.blocks)
    tokens = torch.zeros(rows, ctx_len, dtype=torch.int64, device=module.device)
    try:
        for block in blocks:
            # With fixed shapes, the backward pass is compiled together with the forward pass, so it cannot fail later.
            block.compile(dynamic=False)
        start = module.carried.starting_from(module.model.empty_state(rows)) if stream else nullcontext()
        with precision.forward_context(), start:
            loss, *_ = module.loss(tokens, tokens)
        loss.backward()
    except torch.OutOfMemoryError:
        pass  # the step needs too much memory, compiled or not: the run itself will report it
    except Exception as error:
        return _leave_eager(blocks, error)
    finally:
        module.zero_grad(set_to_none=True)
    for block in blocks:
        _guard_block(block, blocks)
    return f"compile {len(blocks)} blocks, in {time.perf_counter() - started:.0f} s"


def _guard_block(block: Any, blocks: Sequence[nn.Module]) -> None:
    """Wrap a compiled block: a failed compilation does not end the run, and generation runs eagerly."""
    from torch._dynamo.exc import TorchDynamoException

    compiled, eager = block._compiled_call_impl, block._call_impl

    def call(x: torch.Tensor, state: Any, *rest: Any) -> Any:
        if x.shape[1] == 1 or (state is not None and not torch.is_grad_enabled()):
            return eager(x, state, *rest)
        try:
            return compiled(x, state, *rest)
        except TorchDynamoException as error:
            log.warning(_leave_eager(blocks, error))
            return eager(x, state, *rest)

    # The attribute that Module.compile sets. It is not part of a state_dict, and copies of the module do not have it.
    block._compiled_call_impl = call


def _leave_eager(blocks: Sequence[nn.Module], error: Exception) -> str:
    for block in blocks:
        block._compiled_call_impl = None
    return f"compile off: {_find_reason(error)}"


def _find_reason(error: Exception) -> str:
    """The reason in one line: the C++ compiler's first error line, else the message without torch's advice."""
    message = str(error)
    found = re.search(r"^.*\berror: .*$", message, re.MULTILINE)
    reason = " ".join((found[0] if found else message.strip().partition("\n\n")[0]).split())
    return reason[:LONGEST_REASON] or type(error).__name__
