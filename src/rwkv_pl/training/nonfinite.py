"""Batches whose loss or gradient is NaN or Inf: skipped, up to a limit, or the end of the run."""

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
    """Looks at the loss and gradient norm of each optimizer step.

    limit: how many steps may be skipped; the next one raises RunError. skipped: how many were, earlier runs included.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.skipped = 0
        self._unread: _Step | None = None

    def look(self, norm: Tensor, loss: Tensor, step: int, lr: float) -> None:
        """Takes the figures of a step (scalars). `check_finite` reads them."""
        self._unread = _Step(step, lr, torch.stack([norm, loss.to(norm.dtype)]), None)

    def skip_on_device(self, optimizer: Optimizer) -> None:
        """Has the fused optimizer skip the step itself, so that the figures can be read when the device is busy with
        the next one."""
        assert self._unread is not None
        figures = self._unread.figures
        optimizer.found_inf = (figures * 0 != 0).any().float()  # type: ignore[attr-defined]
        self._unread.figures = figures.to("cpu", non_blocking=True)
        if figures.is_cuda:
            self._unread.copied = torch.cuda.Event()
            self._unread.copied.record()

    def check_finite(self, loss_scaled: bool, log_skip: bool) -> bool:
        """Is the last step finite? If not, this warns, or raises RunError past the limit; a step is judged once.

        loss_scaled: float16's loss scaler probes for the largest scale, and skips the steps whose gradient is Inf.
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
                f"{message}: stopped before optimizer step {step.number + 1:,}, which it would have spoilt; "
                "a lower optim.lr often helps"
            )
        self.skipped += 1
        if log_skip:
            log.warning(f"{message}: left out, {self.skipped} of at most {self.limit}")
        return False
