"""Checks whether a run can resume from a checkpoint, before the run is changed."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rwkv_pl.errors import CorruptFileError, UserError, one_line
from rwkv_pl.training.module import LitRWKV
from rwkv_pl.training.optimizer import build_optimizer, set_hyperparameters
from rwkv_pl.training.stream import STREAM_KEY, check_stored
from rwkv_pl.weights.checkpoint import read_checkpoint
from rwkv_pl.weights.metadata import KEY, Metadata
from rwkv_pl.weights.parts import load_outlines


def load_resume_checkpoint(path: Path) -> tuple[dict[str, Any], Metadata]:
    """Read a checkpoint of rwkv-train, with mapped tensors, and its metadata. Raises UserError if it can't resume."""
    content = read_checkpoint(path)
    if KEY not in content:
        raise UserError(f"{path} was not written by rwkv-train, so it can't resume: use it as weights={path}")
    metadata = Metadata.from_checkpoint(content, path)
    if "optimizer_states" not in content and "loops" not in content:
        raise UserError(f"{path} has weights, but no optimizer state, so it can't resume: use it as weights={path}")
    if type(content.get("global_step")) is not int or content["global_step"] < 0:
        raise CorruptFileError(f"{path} is not a complete checkpoint: its step is missing")
    return content, metadata


def check_same_run(metadata: Metadata, now: dict[str, Any], path: Path) -> None:
    """Raise UserError if the run of the checkpoint differs from `now`."""
    before = metadata.past or {}
    for key, here in now.items():
        there = before.get(key)
        if there is None or repr(here) == repr(there):
            continue
        if key.partition(".")[0] == "corpus":
            where = f"data.corpora.{key.partition('.')[2]}" if key != "corpus" else "data"
            raise UserError(
                f"{where}.path (with {where}.val_path, if set) is not the text that {path} was trained on "
                f"(digest {here[:12]}, not {str(there)[:12]}): give that text"
            )
        raise UserError(f"{key}={here} contradicts {path}, which was trained with {key}={there}: use that value")


def check_loadable(content: dict[str, Any], module: LitRWKV, optimizer: Optimizer, path: Path) -> None:
    """Load the checkpoint into an outline of the module on the meta device. Raises CorruptFileError if it does not
    fit, and UserError if the optimizer can't continue from it with its new settings."""
    try:
        content = load_outlines(content)
        module.load_state_dict(content["state_dict"], assign=True)
        (state,) = content["optimizer_states"]
        optimizer.load_state_dict(state)
        moved = content["global_step"] > content[KEY].get("skipped", 0)
        # A loss scaler skips the first steps until it has found its scale.
        unmoved = not optimizer.state and (not moved or "MixedPrecision" in content)
        if not unmoved:
            check_optimizer_state(optimizer, module)
        steps = content["loops"]["fit_loop"]["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]
        if steps["total"]["completed"] != content["global_step"]:
            raise ValueError(f"loop step {steps['total']['completed']}, but global step {content['global_step']}")
        if module.past["data.stream"] and content["global_step"]:
            check_stored(content.get(STREAM_KEY), module.model, module.past["data.batch_size"])
        for count in ("total", "current"):
            content["loops"]["fit_loop"]["epoch_loop.batch_progress"][count].keys()
        for name, of_callback in content["callbacks"].items():
            if not isinstance(of_callback, dict):
                raise TypeError(f"the state of {name} is a {type(of_callback).__name__}")
    except UserError:
        raise
    except Exception as error:  # a checkpoint that was changed by hand can fail in any way
        raise CorruptFileError(f"{path} does not fit this run ({one_line(error)[:200]})") from error


def check_optimizer_state(optimizer: Optimizer, module: LitRWKV) -> None:
    """Compare a restored optimizer with a twin over tiny parameters.

    The twin takes one step with the restored hyperparameters. The restored state must have all entries that the twin
    then keeps for a parameter, with matching shapes. The twin takes a second step with the hyperparameters of the
    config, as the run will. Raises ValueError if the state does not fit, UserError if the second step fails.
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
            f"optim can't change to these settings in a resume ({reason}): keep those of the run"
        ) from error
    for real, small in pairs:
        for name, kept in twin.state.get(small, {}).items():
            value = optimizer.state[real].get(name) if real in optimizer.state else None
            if value is None or not isinstance(kept, Tensor) or kept.shape not in (small.shape, torch.Size()):
                continue
            # A fused step does not check shapes, and writes past the end of a tensor that is too small.
            wanted = real.shape if kept.shape == small.shape else kept.shape
            if value.shape != wanted:
                raise ValueError(f"{name} of {tuple(value.shape)} for a parameter of {tuple(real.shape)}")
