"""What a checkpoint must be for a run to go on from it: all looked at before the run is touched."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rwkv_pl.errors import CorruptFileError, UserError, one_line
from rwkv_pl.training.module import LitRWKV
from rwkv_pl.training.optimizer import build_optimizer, set_hyperparameters
from rwkv_pl.weights.checkpoint import read_checkpoint
from rwkv_pl.weights.metadata import KEY, Metadata


def load_resume_checkpoint(path: Path) -> tuple[dict[str, Any], Metadata]:
    """A checkpoint that rwkv-train wrote, tensors mapped, and its metadata, checked. Raises UserError."""
    content = read_checkpoint(path)
    if KEY not in content:
        raise UserError(f"{path} was not written by rwkv-train: take it as weights={path}")
    metadata = Metadata.from_checkpoint(content, path)
    if "optimizer_states" not in content and "loops" not in content:
        raise UserError(f"{path} holds weights without the state of a training: take it as weights={path}")
    if type(content.get("global_step")) is not int or content["global_step"] < 0:
        raise CorruptFileError(f"{path} is not a whole checkpoint: it does not say its step")
    return content, metadata


def check_same_run(metadata: Metadata, now: dict[str, Any], path: Path) -> None:
    """Raises UserError if the run of the checkpoint differs from `now`."""
    before = metadata.past or {}
    for key, here in now.items():
        there = before.get(key)
        if there is None or repr(here) == repr(there):
            continue
        if key == "corpus":
            raise UserError(
                f"data.path, with data.val_path where there is one, is not the text that {path} was trained on "
                f"(digest {here[:12]}, there {str(there)[:12]}): give that one"
            )
        raise UserError(f"{key}={here} contradicts {path}, which was trained with {key}={there}")


def check_loadable(content: dict[str, Any], module: LitRWKV, optimizer: Optimizer, path: Path) -> None:
    """Loads the checkpoint into an outline of the module, on the meta device. Raises CorruptFileError unless it fits,
    and UserError if the optimizer can't go on from it with its new settings."""
    try:
        module.load_state_dict(content["state_dict"], assign=True)
        (state,) = content["optimizer_states"]
        optimizer.load_state_dict(state)
        moved = content["global_step"] > content[KEY].get("skipped", 0)
        # A loss scaler leaves out the first steps, until its scale is found.
        unmoved = not optimizer.state and (not moved or "MixedPrecision" in content)
        if not unmoved:
            check_optimizer_state(optimizer, module)
        steps = content["loops"]["fit_loop"]["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]
        if steps["total"]["completed"] != content["global_step"]:
            raise ValueError(f"its loop is at step {steps['total']['completed']}, itself at {content['global_step']}")
        for count in ("total", "current"):
            content["loops"]["fit_loop"]["epoch_loop.batch_progress"][count].keys()
        for name, of_callback in content["callbacks"].items():
            if not isinstance(of_callback, dict):
                raise TypeError(f"the state of {name} is a {type(of_callback).__name__}")
    except UserError:
        raise
    except Exception as error:  # what was made by hand can fail in any way
        raise CorruptFileError(f"{path} does not fit this run ({one_line(error)[:200]})") from error


def check_optimizer_state(optimizer: Optimizer, module: LitRWKV) -> None:
    """Compares a restored optimizer with a twin over tiny parameters.

    The twin takes a step with the restored numbers: what it then keeps of each parameter, the restored state must have,
    in the same shapes. It takes another step with the numbers of the config, as the run is going to. Raises ValueError
    for a state that does not fit, UserError if that second step fails.
    """
    groups = []
    for group in optimizer.param_groups:
        tiny = [nn.Parameter(torch.zeros([2] * p.dim(), dtype=p.dtype)) for p in group["params"]]
        groups.append(group | {"params": tiny})
    twin = build_optimizer(type(optimizer), groups, module.optim)
    pairs = [
        pair
        for real, small in zip(optimizer.param_groups, twin.param_groups, strict=True)
        for pair in zip(real["params"], small["params"], strict=True)
    ]
    for _, small in pairs:
        small.grad = torch.ones_like(small)
    twin.step()
    if not all(twin.state.get(small, {}).keys() <= optimizer.state.get(real, {}).keys() for real, small in pairs):
        raise ValueError("its optimizer knows only some of the parameters")
    set_hyperparameters(twin, module.optim, module.lr_scale)
    try:
        twin.step()
    except Exception as error:
        reason = f"{type(error).__name__}: {one_line(error)[:200]}"
        raise UserError(
            f"optim can't change to these settings on a resume ({reason}): keep those of the run"
        ) from error
    for real, small in pairs:
        for name, kept in twin.state.get(small, {}).items():
            value = optimizer.state[real].get(name) if real in optimizer.state else None
            if value is None or not isinstance(kept, Tensor) or kept.shape not in (small.shape, torch.Size()):
                continue
            # A fused step does not look, and writes past the end of what is too small.
            wanted = real.shape if kept.shape == small.shape else kept.shape
            if value.shape != wanted:
                raise ValueError(f"{name} of {tuple(value.shape)} for a parameter of {tuple(real.shape)}")
