"""Starts or resumes one run from its overrides: for the command rwkv-train, and for `rwkv_pl.train`.

The config is checked before anything heavy is imported, so that a mistake is reported at once.
"""

import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import Any

from hydra.core.override_parser.types import Override

from rwkv_pl.compose import check_config, compose
from rwkv_pl.config import Data, Train
from rwkv_pl.errors import UserError
from rwkv_pl.files import require_own_files
from rwkv_pl.runs import agreement, ranks
from rwkv_pl.runs.folder import find_latest_run
from rwkv_pl.runs.processes import count_devices, start_processes
from rwkv_pl.runs.stored import StoredRun, require_inside_run_folder, require_no_download
from rwkv_pl.terminal import is_called_from_python, quote_override

# Set in the environment of a resumed sweep's jobs: their settings come from its folder and are not trusted.
RESUMED_ENV = "RWKV_PL_RESUMED_SWEEP"


def launch(overrides: Sequence[Override], config_dir: str | None, training: AbstractContextManager[ModuleType]) -> Path:
    """Start a run, or resume the one that `resume=` names. Returns its folder.

    training: loads and yields rwkv_pl.runs.train; entered after the config was checked.
    """
    agreement.begin_run()
    resumed = next((o.value() for o in overrides if o.key_or_group == "resume"), None)
    with agreement.fail_together():
        if resumed is not None:
            return _resume(resumed, [o for o in overrides if o.key_or_group != "resume"], config_dir, training)
        return _start(overrides, config_dir, training)


def _start(overrides: Sequence[Override], config_dir: str | None, training: AbstractContextManager[ModuleType]) -> Path:
    composed = compose([str(o.input_line) for o in overrides], config_dir)
    config = check_config(composed, overrides, config_dir)
    _require_text(config.data, {o.key_or_group for o in overrides})
    _check_devices(config)
    if RESUMED_ENV in os.environ:
        require_inside_run_folder(config, Path(composed.hydra.run.dir))
        require_no_download(config.data, Path.cwd())
    typed = any(o.key_or_group == "hydra.run.dir" for o in overrides)
    with start_processes(config.trainer), training as train:
        folder: Path = train.start(config, composed, typed)
    return folder


def _require_text(data: Data, typed: set[str]) -> None:
    """Raise UserError for a path that was probably meant as the user's own text: enwik8 would be downloaded there."""
    is_typed = "data.path" in typed and not typed & {"data", "experiment"}
    if is_typed and data.name == "enwik8" and not Path(str(data.path)).exists():
        raise UserError(
            f"data.path={data.path} does not exist: for your own text, add data=text; to download enwik8 into that "
            "folder, add data=enwik8"
        )


def _resume(
    resumed: Any,
    later: list[Override],
    config_dir: str | None,
    training: AbstractContextManager[ModuleType],
) -> Path:
    if config_dir:
        raise UserError(
            "--config-dir cannot be used with resume=, which reads the one of the run's start: leave it out"
        )
    folder = find_run_folder(resumed)
    if not is_called_from_python():
        # The processes of the other devices start with the same arguments, which must name the same run.
        sys.argv = [argument for argument in sys.argv if argument != "resume=latest"]
        sys.argv += [f"resume={quote_override(folder)}"] if resumed == "latest" else []
    stored = StoredRun(folder)
    require_own_files(folder)
    if ranks.is_first_process() and any(o.key_or_group == "hydra.run.dir" for o in later):
        raise UserError("a run resumes in its own folder: leave out hydra.run.dir, or move the folder")
    config, entry = stored.apply_overrides([o for o in later if not o.key_or_group.startswith("hydra")])
    _check_devices(config)
    hydra_overrides = [str(o.input_line) for o in later if o.key_or_group.startswith("hydra")]
    with start_processes(config.trainer), training as train:
        train.resume(stored, config, entry, hydra_overrides)
    return folder


def _check_devices(config: Train) -> None:
    """Raise UserError for devices that a call from Python cannot use, or that cannot share a batch."""
    trainer = config.trainer
    devices, num_nodes = count_devices(trainer), trainer["num_nodes"]
    ranks.require_own_processes(devices, num_nodes)
    if devices * num_nodes > 1:  # else the check at the start of the training is as soon
        from rwkv_pl.data.order import check_division

        accumulate = trainer["accumulate_grad_batches"]
        check_division(config.data.batch_size, devices * num_nodes, 1 if accumulate == "auto" else accumulate)


def find_run_folder(resumed: Any) -> Path:
    """Return the folder that the value of `resume=` names: a path, or `latest`."""
    if resumed == "latest":
        return Path(agreement.decide_on_first_rank("latest", lambda: str(find_latest_run(Path("outputs").absolute()))))
    return Path(str(resumed)).absolute()
