"""rwkv-train: prints help or settings, or starts or resumes a run or a sweep.

The config is checked before anything heavy is imported, so that a mistake is reported at once.
"""

import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import OmegaConf

from rwkv_pl.cli import sweep
from rwkv_pl.cli.arguments import expand_home, parse_arguments, print_hydra_info, require_used
from rwkv_pl.cli.entry import cli_entry_point, default_sigint
from rwkv_pl.cli.explain import print_settings
from rwkv_pl.compose import check_config, compose, parse_overrides
from rwkv_pl.config import Data
from rwkv_pl.errors import UserError
from rwkv_pl.files import require_own_files
from rwkv_pl.runs import ranks
from rwkv_pl.runs.folder import find_latest_run
from rwkv_pl.runs.stored import StoredRun, require_inside_run_folder, require_no_download
from rwkv_pl.terminal import STOPPED_AT_START, SWEEP_JOB_ENV, exit_at_once, ignore_unwritable_screen, quote_override


@cli_entry_point
def main() -> None:
    """The command. Exit codes: 0 trained, 1 failed while training, 2 bad input."""
    if SWEEP_JOB_ENV in os.environ:
        ignore_unwritable_screen()
    argv = sys.argv[1:] = expand_home(sys.argv[1:])
    args = parse_arguments(argv)
    overrides = parse_overrides(args.overrides, sweep=args.multirun)
    resumed = next((o.value() for o in overrides if o.key_or_group == "resume"), None)
    others = [o for o in overrides if o.key_or_group != "resume"]
    if args.explain is not None:
        print_settings(args.explain, [str(o.input_line) for o in overrides], args.config_dir)
    elif args.cfg and resumed is not None:
        print(OmegaConf.to_yaml(StoredRun(_find_run_folder(resumed)).apply_overrides(others)[0]), end="")
    elif args.help or args.hydra_help or args.cfg or args.info or args.shell_completion:
        plain = [str(o.input_line) for o in overrides if not o.is_sweep_override()]
        print_hydra_info(argv, [] if args.shell_completion else plain, args.config_dir)
    elif args.multirun:
        ignore_unwritable_screen()
        ranks.refuse_sweep()
        require_used(overrides, multirun=True)
        if resumed is not None:
            sweep.resume_sweep(Path(str(resumed)).absolute(), others, args.config_dir)
        else:
            sweep.start_sweep(argv, overrides, args.config_dir)
    else:
        ignore_unwritable_screen()
        require_used(overrides, multirun=False)
        try:
            if resumed is not None:
                _resume(resumed, others, args.config_dir)
            else:
                _start(overrides, args.config_dir)
        except KeyboardInterrupt as error:  # during the training, StopOnSignal handles Ctrl-C
            raise KeyboardInterrupt(*(error.args or [STOPPED_AT_START])) from error


def _start(overrides: list[Override], config_dir: str | None) -> None:
    composed = compose([str(o.input_line) for o in overrides], config_dir)
    config = check_config(composed, overrides, config_dir)
    _require_text(config.data, {o.key_or_group for o in overrides})
    if sweep.RESUMED_ENV in os.environ:
        require_inside_run_folder(config, Path(composed.hydra.run.dir))
        require_no_download(config.data, Path.cwd())
    _load_training().start(config, composed, typed=any(o.key_or_group == "hydra.run.dir" for o in overrides))


def _require_text(data: Data, typed: set[str]) -> None:
    """Raise UserError for a path that was probably meant as the user's own text: enwik8 would be downloaded there."""
    is_typed = "data.path" in typed and not typed & {"data", "experiment"}
    if is_typed and data.name == "enwik8" and not Path(str(data.path)).exists():
        raise UserError(
            f"data.path={data.path} does not exist: for your own text, add data=text; to download enwik8 into that "
            "folder, add data=enwik8"
        )


def _resume(resumed: Any, later: list[Override], config_dir: str | None) -> None:
    if config_dir:
        raise UserError(
            "--config-dir cannot be used with resume=, which reads the one of the run's start: leave it out"
        )
    folder = _find_run_folder(resumed)
    # Lightning starts the processes of the other devices with the same arguments, which must name the same run.
    sys.argv = [argument for argument in sys.argv if argument != "resume=latest"]
    sys.argv += [f"resume={quote_override(folder)}"] if resumed == "latest" else []
    stored = StoredRun(folder)
    require_own_files(folder)
    if ranks.is_first_process() and any(o.key_or_group == "hydra.run.dir" for o in later):
        raise UserError("a run resumes in its own folder: leave out hydra.run.dir, or move the folder")
    config, entry = stored.apply_overrides([o for o in later if not o.key_or_group.startswith("hydra")])
    hydra_overrides = [str(o.input_line) for o in later if o.key_or_group.startswith("hydra")]
    _load_training().resume(stored, config, entry, hydra_overrides)


def _find_run_folder(resumed: Any) -> Path:
    if resumed == "latest":
        return Path(ranks.decide_on_first_rank("latest", lambda: str(find_latest_run(Path("outputs").absolute()))))
    return Path(str(resumed)).absolute()


def _load_training() -> ModuleType:
    if sys.stderr.isatty():
        print("loading torch and lightning ...", file=sys.stderr, flush=True)
    with default_sigint(lambda *_: exit_at_once(STOPPED_AT_START, 130)):
        from rwkv_pl.runs import train

    return train


if __name__ == "__main__":
    sys.argv[0] = "rwkv-train"  # the name that error messages of a sweep's jobs start with
    main()
