"""The learning rate as a pure function of the step: there is no scheduler object, so there is no state to save."""

import math

from rwkv_pl.config import Optim, Schedule
from rwkv_pl.errors import UserError


def learning_rate(step: int, optim: Optim, schedule: Schedule, max_steps: int) -> float:
    """The learning rate of optimizer step `step`, counted from 0.

    The warm-up is linear and reaches optim.lr at its last step. The decay reaches final_lr at step decay_steps - 1.
    max_steps: the length of the run, used if decay_steps is null; -1 if the run has no length.
    """
    if step < schedule.warmup_steps:
        return optim.lr * (step + 1) / schedule.warmup_steps
    if schedule.name == "constant":
        return optim.lr
    end = schedule.decay_steps or max_steps
    begin = decay_start(schedule, end)
    progress = min(1.0, (step + 1 - begin) / max(1, end - begin))
    if schedule.name == "cosine":
        return schedule.final_lr + (optim.lr - schedule.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))
    if schedule.name == "exponential":
        return optim.lr * (schedule.final_lr / optim.lr) ** progress
    return optim.lr + (schedule.final_lr - optim.lr) * max(0.0, progress)  # linear, wsd


def decay_start(schedule: Schedule, end: int) -> int:
    """The step at which the decay to final_lr (at step `end` - 1) starts: the end of the warm-up, except in wsd."""
    if schedule.decay_share is None:
        return schedule.warmup_steps
    return end - max(1, round(schedule.decay_share * end))


def check_schedule(schedule: Schedule, max_steps: int) -> None:
    """Raise UserError if the schedule needs a length that the run does not have, or if its decay does not fit in."""
    if schedule.name == "constant":
        return
    if schedule.decay_steps is None and max_steps < 1:
        raise UserError(
            f"schedule={schedule.name} needs a length: "
            "set schedule.decay_steps, trainer.max_steps or trainer.max_epochs"
        )
    if schedule.decay_steps is None and max_steps <= schedule.warmup_steps:
        raise UserError(
            f"schedule.warmup_steps={schedule.warmup_steps} must be below the run's {max_steps:,} steps: "
            f"set schedule.warmup_steps={max_steps // 10}"
        )
    end = schedule.decay_steps or max_steps
    if decay_start(schedule, end) < schedule.warmup_steps:
        raise UserError(
            f"schedule.decay_share={schedule.decay_share} of {end} steps starts before the end of "
            f"schedule.warmup_steps ({schedule.warmup_steps}): lower one of them"
        )
