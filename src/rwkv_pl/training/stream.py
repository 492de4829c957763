"""The state that the rows of a stream carry from one batch to the next: truncated backpropagation through time.

B  batch_size, the rows of an optimizer step    A  accumulated micro-batches    D  processes    R  rows, B / (A * D)

Row b of a batch reads on where row b of the batch before ended, so it starts from the state at that place. The state is
detached: a gradient reaches back to the start of the window, not further.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from rwkv_pl.errors import UserError
from rwkv_pl.model.state import BlockState, State

STREAM_KEY = "stream_state"
"""The key of the state in a checkpoint's dictionary: a dictionary a block, the batch's rows 0..B-1 in each tensor."""


class CarriedState:
    """The states of this process's rows, of each micro-batch: before its window of the current step, and after it.

    An optimizer step replaces the first by the second. So inside an accumulation window, a checkpoint holds the state
    of the last step, as it does of the weights, and a resumed run reads the micro-batches of the window again.
    """

    def __init__(self) -> None:
        self._start: State | None = None
        self._end: State | None = None
        self.load(None, 0)

    def load(self, stored: list[dict[str, Tensor]] | None, step: int) -> None:
        """Continue at optimizer step `step`, from the state in its checkpoint; None: from nothing."""
        self._step = step
        self._before: dict[int, State] = {}
        self._after: dict[int, State] = {}
        # Of all B rows, until the next optimizer step.
        self._loaded = tuple(BlockState(**block) for block in stored) if stored else None

    @contextmanager
    def window(self, model: Any, restarts: Tensor, batch_idx: int, trainer: Any) -> Iterator[None]:
        """Start the model, in `read`, from the carried state, and carry on the state after it.

        restarts: (R,) bool, the rows that start from the empty state instead.
        """
        if not hasattr(model, "empty_state"):
            raise UserError(f"a stream needs a model with empty_state(rows), {type(model).__name__} has none")
        step, part, n_rows = trainer.global_step, batch_idx % trainer.accumulate_grad_batches, len(restarts)
        if self._step != step or step == part == 0:  # an earlier fit may have left a state, of other rows
            self.load(None, step)
        if part not in self._before:
            self._before[part] = model.empty_state(n_rows)
            if self._loaded is not None:
                first = (part * trainer.world_size + trainer.global_rank) * n_rows
                rows = slice(first, first + n_rows)
                self._before[part] = _convert(self._loaded, lambda x: x[rows].to(restarts.device, copy=True))
        with self.starting_from(_restart(self._before[part], model.empty_state(1), restarts)):
            yield
        if self._end is None:
            raise UserError("a stream needs the loss of LitRWKV, which carries the state: call super().loss in yours")
        # A copy, since the last token's part of a whole window would keep that in memory.
        self._after[part], self._end = _convert(self._end, lambda x: x.detach().clone()), None

    @contextmanager
    def starting_from(self, state: State) -> Iterator[None]:
        """Make `read` start from this state, the one of the rows that it gets."""
        self._start, self._end = state, None
        try:
            yield
        finally:
            self._start = None

    def read(self, model: Any, tokens: Tensor) -> Tensor:
        """tokens (R, T) -> model.hidden (R, T, C), in a window from its state on, else from the empty state."""
        if self._start is None:
            return model.hidden(tokens)[0]
        hidden, self._end = model.hidden(tokens, self._start)
        return hidden

    def commit(self, step: int, skipped: bool | Tensor) -> None:
        """Go on to the next optimizer step, number `step`.

        skipped: whether the step was skipped, since its loss or gradient was not finite. The rows then keep the state
        of before, and read on without the window that was skipped.
        """
        if not self._after:
            return
        after = self._after
        if isinstance(skipped, Tensor):
            after = {part: _select(skipped, self._before[part], state) for part, state in after.items()}
        elif skipped:
            after = self._before
        self._step, self._before, self._after, self._loaded = step, after, {}, None

    def gather(self, model: Any, trainer: Any) -> list[dict[str, Tensor]] | None:
        """Return the state after the last optimizer step, of all B rows, for a checkpoint.

        None before the first step, without a stream, and on all processes but the first. All processes must call it.
        """
        if self._step == 0 or self._step != trainer.global_step or not (self._before or self._loaded):
            return None
        whole = self._loaded
        if whole is None:
            rows = len(next(iter(self._before.values()))[0].att_shift)
            # An epoch can end inside an accumulation window: the rows that it has not read start again.
            parts = [self._before.get(a) or model.empty_state(rows) for a in range(trainer.accumulate_grad_batches)]
            whole = tuple(
                BlockState(*(_gather_rows(torch.stack(tensors), trainer) for tensors in zip(*blocks, strict=True)))
                for blocks in zip(*parts, strict=True)
            )
        return [block._asdict() for block in whole] if trainer.is_global_zero else None


def check_stored(stored: Any, model: Any, batch_size: int) -> None:
    """Raise ValueError unless the state in a checkpoint is one of `batch_size` rows of the model."""
    if not isinstance(stored, list):
        raise ValueError("it has no state of the stream")
    for block, expected in zip(stored, model.empty_state(batch_size), strict=True):
        for name, tensor in expected._asdict().items():
            found = block[name]
            if found.shape != tensor.shape or not found.is_floating_point() or not found.isfinite().all():
                raise ValueError(f"{name} of the stream's state has a wrong shape, or values that are not finite")


def _convert(state: State, function: Any) -> State:
    return tuple(BlockState(*map(function, block)) for block in state)


def _restart(state: State, empty: State, restarts: Tensor) -> State:
    """Replace the rows that restart. empty: of one row."""

    def choose(x: Tensor, start: Tensor) -> Tensor:
        return torch.where(restarts.view(-1, *[1] * (x.dim() - 1)), start.to(x.dtype), x)

    return tuple(BlockState(*map(choose, *pair)) for pair in zip(state, empty, strict=True))


def _select(condition: Tensor, yes: State, no: State) -> State:
    return tuple(
        BlockState(*(torch.where(condition, *pair) for pair in zip(*blocks, strict=True)))
        for blocks in zip(yes, no, strict=True)
    )


def _gather_rows(mine: Tensor, trainer: Any) -> Tensor:
    """(A, R, ...) of each process -> (B, ...) on the first, in the order of the batch."""
    if trainer.world_size == 1:
        return mine.flatten(0, 1)
    found = [torch.empty_like(mine) for _ in range(trainer.world_size)] if trainer.is_global_zero else None
    torch.distributed.gather(mine, found)
    return torch.stack(found, dim=1).flatten(0, 2).cpu() if found else mine
