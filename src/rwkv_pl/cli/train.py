"""rwkv-train: prints help or settings, or starts or resumes a run or a sweep.

The config is checked before anything heavy is imported, so that a mistake is reported at once.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from omegaconf import OmegaConf

from rwkv_pl.cli import sweep
from rwkv_pl.cli.arguments import parse_arguments, print_hydra_info, require_used
from rwkv_pl.cli.entry import cli_entry_point, default_sigint
from rwkv_pl.cli.explain import print_settings
from rwkv_pl.overrides import parse_overrides
from rwkv_pl.runs import ranks
from rwkv_pl.runs.launch import find_run_folder, launch
from rwkv_pl.runs.stored import StoredRun
from rwkv_pl.terminal import STOPPED_AT_START, SWEEP_JOB_ENV, exit_at_once, ignore_unwritable_screen, print_loading
from rwkv_pl.texts import take_as_typed


@cli_entry_point
def main() -> None:
    """The command. Exit codes: 0 trained, 1 failed while training, 2 bad input."""
    if SWEEP_JOB_ENV in os.environ:
        ignore_unwritable_screen()
    argv = sys.argv[1:] = take_as_typed(sys.argv[1:])
    args = parse_arguments(argv)
    overrides = parse_overrides(args.overrides, sweep=args.multirun)
    resumed = next((o.value() for o in overrides if o.key_or_group == "resume"), None)
    others = [o for o in overrides if o.key_or_group != "resume"]
    if args.explain is not None:
        print_settings(args.explain, [str(o.input_line) for o in overrides], args.config_dir)
    elif args.cfg and resumed is not None:
        print(OmegaConf.to_yaml(StoredRun(find_run_folder(resumed)).apply_overrides(others)[0]), end="")
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
            launch(overrides, args.config_dir, _load_training())
        except KeyboardInterrupt as error:  # during the training, StopOnSignal handles Ctrl-C
            raise KeyboardInterrupt(*(error.args or [STOPPED_AT_START])) from error


@contextmanager
def _load_training() -> Iterator[ModuleType]:
    if ranks.is_first_process():
        print_loading()
    with default_sigint(lambda *_: exit_at_once(STOPPED_AT_START, 130)):
        from rwkv_pl.runs import train

    yield train


if __name__ == "__main__":
    sys.argv[0] = "rwkv-train"  # the name that error messages of a sweep's jobs start with
    main()
