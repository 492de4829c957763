"""Builds the optimizer and its parameter groups.

All hyperparameters come from the config, never from a checkpoint, so a resumed run uses the settings that it is given.
"""

import inspect
from typing import Any

from torch import nn
from torch.optim import Optimizer

from rwkv_pl.checks import suggest_key
from rwkv_pl.config import Optim
from rwkv_pl.errors import UserError, one_line
from rwkv_pl.model.language_model import LanguageModel


def parameter_groups(model: nn.Module, lr_scale: dict[str, float], split_blocks: bool = False) -> list[dict[str, Any]]:
    """Group the parameters by the last part of their names and by whether weight decay applies.

    Weight decay applies where the model's `has_weight_decay` says so, or without that method to two-dimensional
    parameters named `*.weight`. The groups do not depend on any hyperparameter, so a checkpoint fits them after a
    change of the settings. `set_hyperparameters` sets the values.

    split_blocks: put the weight matrices of the blocks into a separate group, for `MuonAdamW`.

    Raises UserError if a name in `lr_scale` matches no parameter.
    """
    has_weight_decay = getattr(model, "has_weight_decay", LanguageModel.has_weight_decay)
    groups: dict[tuple[str, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        last = name.rpartition(".")[2]
        decays = has_weight_decay(name, parameter)
        in_block = split_blocks and decays and name.startswith("blocks.")
        groups.setdefault((last, decays, in_block), []).append(parameter)
    names = {name for name, *_ in groups}
    if unmatched := set(lr_scale) - names:
        raise UserError(
            f"optim.lr_scale.{min(unmatched)} matches no parameter of the model; "
            f"the last parts of their names are {', '.join(sorted(names))}"
        )
    split: dict[str, Any] = {"muon": True} if split_blocks else {}
    return [
        # Lightning's LearningRateMonitor needs different names.
        {"params": members, "name": name + ".decayed" * decays + ".blocks" * in_block, "decays": decays}
        | (split if in_block else {})
        for (name, decays, in_block), members in groups.items()
    ]


def build_optimizer(target: Any, groups: list[dict[str, Any]], optim: Optim) -> Optimizer:
    """Build the optimizer class `target` on the groups, with the arguments of the config.

    If the class supports fused=True (one pass over memory per step), it is used. Raises UserError for an argument that
    the class does not have, and for values that it rejects.
    """
    _, *parameters = inspect.signature(target).parameters.values()  # without the model's parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    offered = {p.name: p.default for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    arguments = optim.arguments
    if not optim.weight_decay and "weight_decay" not in offered:
        del arguments["weight_decay"]
    for name in arguments:
        if name not in offered and not takes_any:
            # An experiment sets these for its own optimizer, also if another is chosen.
            off = {"betas": "null", "eps": "null", "weight_decay": "0"}.get(name)
            fix = f": set optim.{name}={off}" if off else suggest_key(name, offered)
            raise UserError(f"optim.{name}: {optim._target_} has no argument {name}{fix}")
    default = offered.get("betas")
    if optim.betas is not None and isinstance(default, tuple) and len(default) != len(optim.betas):
        raise UserError(f"optim.betas must be {len(default)} numbers for {optim._target_}, got {optim.betas}")
    if "fused" in offered:
        arguments = {"fused": True} | arguments
    try:
        optimizer = target(groups, **arguments)
    except Exception as error:  # any class can be given, and can reject its arguments in any way
        raise UserError(f"optim refuses its settings: {one_line(error)[:300]}") from error
    # A fused step could unscale float16 gradients itself, but then they could not be clipped before.
    optimizer._step_supports_amp_scaling = False
    return optimizer


def set_hyperparameters(optimizer: Optimizer, optim: Optim, lr_scale: dict[str, float]) -> None:
    """Set the config's hyperparameters in all groups, replacing those restored from a checkpoint.

    They come from `optimizer.defaults`: the arguments of the constructor and its defaults. The learning rate is set
    before each step instead. Groups that `parameter_groups` did not build are left alone.
    """
    numbers = {key: value for key, value in optimizer.defaults.items() if key != "lr"}
    for group in optimizer.param_groups:
        if "decays" not in group:
            continue
        group.update(numbers)
        group["lr_scale"] = lr_scale.get(group["name"].partition(".")[0], 1.0)
        group["weight_decay"] = optim.weight_decay if group["decays"] else 0.0
