"""One step of RWKV-4's recurrence, one token for every row of a batch, in one call of the compiled operator.

B  rows    L  layers    C  channels    V  vocab_size
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rwkv_pl.checks import check_tokens
from rwkv_pl.ops.backend import uses_compiled, when_loaded

__all__ = ["rwkv4_step", "supports_step"]

# emb.weight, ln0 (weight and bias), ln_out (weight and bias), head.weight.
PARAMS_OUTSIDE_BLOCKS = 6
PARAMS_PER_BLOCK = 18


def supports_step(parameters: Sequence[Tensor]) -> bool:
    """Does :func:`rwkv4_step` support these parameters: an RWKV-4 model's, on the CPU, each float32 or bfloat16?

    The first call builds or loads the compiled operator. False if it is not available, or if `use_kernel` selects a
    kernel in plain torch.
    """
    return (
        len(parameters) >= PARAMS_OUTSIDE_BLOCKS
        and (len(parameters) - PARAMS_OUTSIDE_BLOCKS) % PARAMS_PER_BLOCK == 0
        and parameters[0].device.type == "cpu"
        and {parameter.dtype for parameter in parameters} <= {torch.float32, torch.bfloat16}
        and uses_compiled("wkv4", "cpu")
    )


@torch.no_grad()
def rwkv4_step(
    parameters: Sequence[Tensor], tokens: Tensor, state: Sequence[Tensor] = ()
) -> tuple[Tensor, tuple[tuple[Tensor, Tensor, Tensor], ...]]:
    """One step of the RWKV-4 recurrence (arXiv 2305.13048) through all layers, as the plain model does for T = 1.

    Args:
        parameters: those of the model in the order of its `parameters()`, float32 or bfloat16; read in place.
        tokens: (B,) int64.
        state: att_shift (B, C), wkv (B, 3, C) and ffn_shift (B, C) of each layer in turn; empty at the start of a
            text.

    Returns:
        Logits (B, V), and the state after the tokens, a triple per layer. All are float32, and so is the arithmetic.
        A row's bits do not depend on the other rows or on the number of threads.

    It has no gradient. Raises ValueError for tokens of another shape or dtype, IndexError for a token outside of the
    vocabulary.
    """
    if tokens.dim() != 1 or tokens.dtype != torch.int64:
        raise ValueError(f"tokens must be (B,) int64, not {tuple(tokens.shape)} {tokens.dtype}")
    ids = tokens.tolist()
    if ids:
        check_tokens(min(ids), max(ids), len(parameters[0]))
    logits, shifts, wkv = torch.ops.rwkv_pl.rwkv4_step(parameters, tokens, [x.float() for x in state])
    shift = shifts.unbind()
    return logits, tuple(zip(shift[0::2], wkv.unbind(), shift[1::2], strict=True))


def _fake(parameters: list[Tensor], tokens: Tensor, state: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    (B,), (V, C), L = tokens.shape, parameters[-1].shape, (len(parameters) - PARAMS_OUTSIDE_BLOCKS) // PARAMS_PER_BLOCK
    shapes = (B, V), (2 * L, B, C), (L, B, 3, C)
    logits, shifts, wkv = (tokens.new_empty(shape, dtype=torch.float32) for shape in shapes)
    return logits, shifts, wkv


# At the end, because it runs at once if the operators are already loaded.
@when_loaded("wkv4")
def _register_fake() -> None:
    torch.library.register_fake("rwkv_pl::rwkv4_step", _fake)
