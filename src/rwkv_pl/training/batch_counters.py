"""Lightning's batch counters in a checkpoint, moved to the last optimizer step.

Inside an accumulation window, weights and optimizer do not change. So a checkpoint saved there has the state of the
last step, and the micro-batches of the window are read again.
"""

import math
from typing import Any


def rewind(checkpoint: dict[str, Any], accumulate: int, batches_per_epoch: int | float) -> None:
    """Sets the counters to the end of the last optimizer step.

    accumulate: micro-batches of a step. batches_per_epoch: math.inf if it is not known.
    """
    total, current = _progress(checkpoint)
    earlier = total["ready"] - current["ready"]  # batches of the epochs before this one
    if batches_per_epoch < math.inf:
        # Lightning makes a step at the end of an epoch, even if the window is incomplete.
        steps_before = earlier // batches_per_epoch * math.ceil(batches_per_epoch / accumulate)
        done = min((checkpoint["global_step"] - steps_before) * accumulate, batches_per_epoch)
    else:
        done = current["processed"] // accumulate * accumulate
    if current["ready"] == current["processed"] == done == batches_per_epoch:
        # Nothing to rewind. Inside on_train_batch_end of an epoch's last batch, `completed` is one behind: from that
        # alone Lightning knows that the epoch has ended, and reads no further batch of it.
        return
    _set_batches(checkpoint, earlier, done)


def rescale(checkpoint: dict[str, Any], before: int | None, accumulate: int) -> None:
    """Counts in the micro-batches of a run that divides a step into `accumulate`, not into `before`.

    before: None if the checkpoint does not have it.
    """
    total, current = _progress(checkpoint)
    if before is None:
        before = max(total["ready"] // max(checkpoint["global_step"], 1), 1)
    if before == accumulate:
        return
    earlier = total["ready"] - current["ready"]
    _set_batches(checkpoint, earlier // before * accumulate, current["ready"] // before * accumulate)


def _progress(checkpoint: dict[str, Any]) -> tuple[dict[str, int], dict[str, int]]:
    """The counters since the start of the run, and those of the current epoch."""
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    return progress["total"], progress["current"]


def _set_batches(checkpoint: dict[str, Any], earlier: int | float, done: int | float) -> None:
    for counters, count in zip(_progress(checkpoint), (earlier + done, done), strict=True):
        counters.update(dict.fromkeys(("ready", "started", "processed", "completed"), int(count)))
