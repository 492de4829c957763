"""The optimizer and its parameter groups.

Every number comes from the config, never from a checkpoint, so a resumed run follows what it is given.
"""

import inspect
from typing import Any

from torch import nn
from torch.optim import Optimizer

from rwkv_pl.checks import suggest_key
from rwkv_pl.config import Optim
from rwkv_pl.errors import UserError, one_line


def parameter_groups(model: nn.Module, lr_scale: dict[str, float], split_blocks: bool = False) -> list[dict[str, Any]]:
    """The parameters by the last part of their names, and by whether weight decay falls on them.

    It does on two-dimensional parameters named `*.weight`, and on nothing else. The groups do not depend on any number,
    so a checkpoint fits them whatever the numbers are by then; `set_hyperparameters` fills these in.
    split_blocks: the weight matrices of the blocks get a group without embedding and head, for `MuonAdamW`.
    UserError where a name in `lr_scale` matches no parameter.
    """
    groups: dict[tuple[str, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        last = name.rpartition(".")[2]
        decays = last == "weight" and parameter.dim() == 2
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
        {"params": members, "name": name, "decays": decays} | (split if in_block else {})
        for (name, decays, in_block), members in groups.items()
    ]


def build_optimizer(target: Any, groups: list[dict[str, Any]], optim: Optim) -> Optimizer:
    """The optimizer class `target` over the groups, with the config's arguments.

    Fused, in one pass over memory a step, if the class has that form. UserError for an argument that it does not take,
    and for values that it refuses.
    """
    _, *parameters = inspect.signature(target).parameters.values()  # without the model's parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    offered = {p.name: p.default for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    arguments = optim.arguments
    if not optim.weight_decay and "weight_decay" not in offered:
        del arguments["weight_decay"]
    for name in arguments:
        if name not in offered and not takes_any:
            raise UserError(f"optim.{name}: {optim._target_} takes no {name}{suggest_key(name, offered)}")
    default = offered.get("betas")
    if optim.betas is not None and isinstance(default, tuple) and len(default) != len(optim.betas):
        raise UserError(f"optim.betas must be {len(default)} numbers for {optim._target_}, got {optim.betas}")
    if "fused" in offered:
        arguments = {"fused": True} | arguments
    try:
        optimizer = target(groups, **arguments)
    except Exception as error:  # a class can refuse its arguments in any way
        raise UserError(f"optim refuses its settings: {one_line(error)[:300]}") from error
    # A fused step could unscale float16 gradients itself, but then they could not be clipped before it.
    optimizer._step_supports_amp_scaling = False
    return optimizer


def set_hyperparameters(optimizer: Optimizer, optim: Optim, lr_scale: dict[str, float]) -> None:
    """Puts the config's numbers into the groups, over those that a checkpoint restored; the rate comes at each step.

    `optimizer.defaults` are the arguments that the class was called with, and its own for those not given.
    """
    numbers = {key: value for key, value in optimizer.defaults.items() if key != "lr"}
    for group in optimizer.param_groups:
        group.update(numbers)
        group["lr_scale"] = lr_scale.get(group["name"], 1.0)
        group["weight_decay"] = optim.weight_decay if group["decays"] else 0.0
