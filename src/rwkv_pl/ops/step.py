"""One step of a model's recurrence, one token for every row of a batch, in one call of a compiled operator.

B  rows    L  layers    C  channels    V  vocab_size    H  heads    N  channels of a head
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rwkv_pl.checks import check_tokens
from rwkv_pl.ops.backend import uses_compiled, when_loaded

__all__ = ["run_step", "supports_step"]

# emb.weight, ln0 (weight and bias), ln_out (weight and bias), head.weight.
PARAMS_OUTSIDE_BLOCKS = 6


@dataclass(frozen=True)
class StepOperator:
    """The operator of a library. A block has `params` parameters, and the first block `fewer_in_first` fewer.

    wkv_shape: from the parameters, that of one row of a block's `wkv`.
    """

    name: str
    params: int
    fewer_in_first: int
    wkv_shape: Callable[[Sequence[Tensor]], tuple[int, ...]]

    def count_blocks(self, parameters: Sequence[Tensor]) -> int:
        """The blocks of a model with so many parameters; 0 if no model has."""
        blocks, rest = divmod(len(parameters) - PARAMS_OUTSIDE_BLOCKS + self.fewer_in_first, self.params)
        return 0 if rest else blocks

    def __call__(self, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        return getattr(torch.ops.rwkv_pl, self.name)(*arguments)

    def fake(self, parameters: list[Tensor], tokens: Tensor, state: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The operator's results for torch.compile, without their values."""
        (B,), (V, C), L = tokens.shape, parameters[-1].shape, self.count_blocks(parameters)
        shapes = (B, V), (2 * L, B, C), (L, B, *self.wkv_shape(parameters))
        logits, shifts, wkv = (tokens.new_empty(shape, dtype=torch.float32) for shape in shapes)
        return logits, shifts, wkv


def _rwkv7_wkv_shape(parameters: Sequence[Tensor]) -> tuple[int, ...]:
    H, N = parameters[23].shape  # blocks.0.att.r_k
    return H, N, N


OPERATORS = {
    "wkv4": StepOperator("rwkv4_step", 18, 0, lambda parameters: (3, parameters[-1].shape[1])),
    "wkv7": StepOperator("rwkv7_step", 33, 3, _rwkv7_wkv_shape),
}
"""By library: its operator."""


def supports_step(library: str, parameters: Sequence[Tensor]) -> bool:
    """Does :func:`run_step` support these parameters: a whole model's, on the CPU, each float32 or bfloat16?

    The first call builds or loads the compiled operator. False if it is not available, or if `use_kernel` selects a
    kernel in plain torch.
    """
    operator = OPERATORS.get(library)
    return (
        operator is not None
        and operator.count_blocks(parameters) > 0
        and parameters[0].device.type == "cpu"
        and {parameter.dtype for parameter in parameters} <= {torch.float32, torch.bfloat16}
        and uses_compiled(library, "cpu")
    )


@torch.no_grad()
def run_step(
    library: str, parameters: Sequence[Tensor], tokens: Tensor, state: Sequence[Tensor] = ()
) -> tuple[Tensor, tuple[tuple[Tensor, Tensor, Tensor], ...]]:
    """One step of a recurrence through all layers, as the plain model does for T = 1.

    Args:
        library: that of the version's operator, in rwkv_pl.ops.libraries.
        parameters: those of the model in the order of its `parameters()`, float32 or bfloat16; read in place.
        tokens: (B,) int64.
        state: att_shift (B, C), wkv (B, ...) and ffn_shift (B, C) of each layer in turn; empty at the start of a text.

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
    logits, shifts, wkv = OPERATORS[library](parameters, tokens, [x.float() for x in state])
    shift = shifts.unbind()
    return logits, tuple(zip(shift[0::2], wkv.unbind(), shift[1::2], strict=True))


def _register_fake(library: str, operator: StepOperator) -> None:
    # At once if the operators are already loaded.
    @when_loaded(library)
    def register() -> None:
        torch.library.register_fake(f"rwkv_pl::{operator.name}", operator.fake)


for _library, _operator in OPERATORS.items():
    _register_fake(_library, _operator)
