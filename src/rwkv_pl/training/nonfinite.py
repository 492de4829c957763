"""Skips batches whose loss or gradient is NaN or Inf, and ends the run after too many of them."""

import logging
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from rwkv_pl.errors import RunError

log = logging.getLogger(__name__)


@dataclass
class _Step:
    number: int
    lr: float
    figures: Tensor
    copied: torch.cuda.Event | None


class NonfiniteGuard:
    """Checks the loss and the gradient norm of each optimizer step.

    limit:   the number of steps that may be skipped; the next one raises RunError.
    skipped: the number of steps skipped so far, those before a resume included.
    skips_this: whether the step that was looked at last is skipped: a bool, or a tensor on the device that decides it.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.skipped = 0
        self.skips_this: bool | Tensor = False
        self._unread: _Step | None = None

    def look(self, norm: Tensor, loss: Tensor, step: int, lr: float) -> None:
        """Store the gradient norm and the loss of a step, both scalars, for `check_finite` to read."""
        self._unread = _Step(step, lr, torch.stack([norm, loss.to(norm.dtype)]), None)
        self.skips_this = False

    def skip_on_device(self, optimizer: Optimizer) -> None:
        """Make the fused optimizer itself skip a non-finite step.

        The host then reads the values later, while the device computes the next step.
        """
        assert self._unread is not None
        figures = self._unread.figures
        is_nonfinite = (figures * 0 != 0).any()
        optimizer.found_inf = is_nonfinite.float()  # type: ignore[attr-defined]
        self.skips_this = is_nonfinite if self.limit else False  # without a limit, such a step ends the run
        self._unread.figures = figures.to("cpu", non_blocking=True)
        if figures.is_cuda:
            self._unread.copied = torch.cuda.Event()
            self._unread.copied.record()

    def check_finite(self, loss_scaled: bool, log_skip: bool) -> bool:
        """Was the last step finite? If not, logs a warning, or raises RunError past the limit. Checks each step once.

        loss_scaled: with float16's loss scaler, a gradient of Inf is normal. The scaler searches for the largest scale
        and skips such steps itself.
        """
        if self._unread is None:
            return True
        step, self._unread = self._unread, None
        if step.copied:
            step.copied.synchronize()
        norm, loss = step.figures.tolist()
        if math.isfinite(loss) and (loss_scaled or math.isfinite(norm)):
            return True
        message = (
            f"the {'gradient' if math.isfinite(loss) else 'loss'} of batch {step.number:,} is not finite "
            f"(loss {loss:.4g}, gradient norm {norm:.4g}, learning rate {step.lr:.3g})"
        )
        if self.skipped >= self.limit:
            raise RunError(
                f"{message}: stopped before optimizer step {step.number + 1:,}, which would corrupt the weights; "
                "a lower optim.lr often helps"
            )
        self.skipped += 1
        self.skips_this = True
        if log_skip:
            log.warning(f"{message}: skipped, {self.skipped} of at most {self.limit}")
        return False
