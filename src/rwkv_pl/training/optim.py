"""The optimizer's parameter groups, and the learning rate as a pure function of the step.

Every number comes from the config, never from a checkpoint, so a resumed run follows what it is given.
"""

import inspect
import math
from typing import Any

from torch import nn
from torch.optim import Optimizer

from rwkv_pl.config import Optim, Schedule
from rwkv_pl.errors import UserError


def parameter_groups(model: nn.Module, lr_scale: dict[str, float]) -> list[dict[str, Any]]:
    """The parameters by the last part of their names, and by whether weight decay falls on them.

    It does on two-dimensional parameters named `*.weight`, and on nothing else. The groups do not depend on any number,
    so a checkpoint fits them whatever the numbers are by then; `write_numbers` fills these in.
    UserError where a name in `lr_scale` matches no parameter.
    """
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        last = name.rpartition(".")[2]
        groups.setdefault((last, last == "weight" and parameter.dim() == 2), []).append(parameter)
    names = {name for name, _ in groups}
    if unmatched := set(lr_scale) - names:
        raise UserError(
            f"optim.lr_scale.{min(unmatched)} matches no parameter of the model; "
            f"the last parts of their names are {', '.join(sorted(names))}"
        )
    return [{"params": members, "name": name, "decays": decays} for (name, decays), members in groups.items()]


def build_optimizer(target: type[Optimizer], groups: list[dict[str, Any]], optim: Optim) -> Optimizer:
    """`target` over the groups; one pass over memory a step (`fused`) where the class has it."""
    offered = inspect.signature(target).parameters
    for name in ("lr", "betas", "eps", "weight_decay"):
        if name not in offered:
            raise UserError(f"optim._target_: {optim._target_} takes no {name}; choose one like torch.optim.AdamW")
    fused: dict[str, Any] = {"fused": True} if "fused" in offered else {}
    optimizer = target(groups, lr=optim.lr, betas=tuple(optim.betas), eps=optim.eps, **fused)  # type: ignore[call-arg]
    # A fused step could unscale float16 gradients itself, but then they could not be clipped before it.
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
    return optimizer


def write_numbers(optimizer: Optimizer, optim: Optim, lr_scale: dict[str, float]) -> None:
    """Puts the config's numbers into the groups, over what a checkpoint has restored; the rate comes at each step."""
    for group in optimizer.param_groups:
        group["lr_scale"] = lr_scale.get(group["name"], 1.0)
        group["betas"] = tuple(optim.betas)
        group["eps"] = optim.eps
        group["weight_decay"] = optim.weight_decay if group["decays"] else 0.0


def learning_rate(step: int, optim: Optim, schedule: Schedule, max_steps: int) -> float:
    """The rate of optimizer step `step`, counted from 0.

    Warm-up is linear and reaches optim.lr on its last step; the decay reaches final_lr on step decay_steps - 1.
    max_steps: the run's length, which serves where decay_steps is null; -1 where the run has none.
    """
    if step < schedule.warmup_steps:
        return optim.lr * (step + 1) / schedule.warmup_steps
    if schedule.name == "constant":
        return optim.lr
    end = schedule.decay_steps or max_steps
    progress = min(1.0, (step + 1 - schedule.warmup_steps) / max(1, end - schedule.warmup_steps))
    if schedule.name == "cosine":
        return schedule.final_lr + (optim.lr - schedule.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))
    return optim.lr * (schedule.final_lr / optim.lr) ** progress


def check_schedule(schedule: Schedule, max_steps: int) -> None:
    """Raises UserError where the schedule needs a length that the run does not have, or has no room for its decay."""
    if schedule.name == "constant":
        return
    if schedule.decay_steps is None and max_steps < 1:
        raise UserError(
            f"schedule={schedule.name} needs a length: "
            "give schedule.decay_steps, trainer.max_steps or trainer.max_epochs"
        )
    if schedule.decay_steps is None and max_steps <= schedule.warmup_steps:
        raise UserError(
            f"schedule.warmup_steps ({schedule.warmup_steps}) leaves no room for schedule={schedule.name} "
            f"in a run of {max_steps} steps; shorten the warm-up or give schedule.decay_steps"
        )
