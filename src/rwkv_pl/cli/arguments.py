"""The command line of rwkv-train and rwkv-eval: Hydra's flags, and the ones that Hydra itself handles.

Hydra 1.3's own parser can't be used: it passes a help object that argparse rejects since Python 3.14.
"""

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from typing import Any, NoReturn

from hydra import version as hydra_version
from hydra._internal import utils as hydra_utils
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from rwkv_pl.checks import suggest_flag
from rwkv_pl.compose import CONFIG_MODULE, compose
from rwkv_pl.errors import UserError
from rwkv_pl.overrides import parse_overrides
from rwkv_pl.texts import yaml_texts_as_written
from rwkv_pl.user_files import absolute_config_dir, prefer_user_files, require_global_package

SHELL_COMMAND_PATTERN = "(install|uninstall|query)=(bash|fish|zsh)"
INFO_TOPICS = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")


class HydraParser(argparse.ArgumentParser):
    """Parser of Hydra's flags. Raises UserError."""

    def __init__(self) -> None:
        super().__init__(add_help=False)
        flag = self.add_argument
        flag("--help", "-h", action="store_true", help="Show the command's use and its settings")
        flag("--hydra-help", action="store_true", help="Show these flags and Hydra's own groups")
        flag("--version", action="version", version=f"rwkv_pl {version('rwkv_pl')}", help="Show the version")
        flag("overrides", nargs="*", help="Settings as key=value; dots separate the levels of a key")
        flag("--cfg", "-c", choices=["job", "hydra", "all"], help="Show the config, run nothing [job|hydra|all]")
        flag("--resolve", action="store_true", help="With --cfg: resolve interpolations")
        flag("--package", "-p", help="With --cfg: show only this part of the config")
        flag("--run", "-r", action="store_true", help="Run one job, which is the default")
        flag("--multirun", "-m", action="store_true", help="Sweep: run each combination of the given values")
        flag(
            "--shell-completion", "-sc", action="store_true",
            help='Complete keys and choices; in bash: eval "$(rwkv-train -sc install=bash)"',
        )  # fmt: skip
        flag("--config-path", "-cp", help="Not used: see --config-dir")
        flag("--config-name", "-cn", help="Not used: see --config-dir")
        flag("--config-dir", "-cd", help="A folder with your own files for the config's groups")
        flag("--experimental-rerun", help="Not used: resume a run with resume=RUN")
        flag("--info", "-i", nargs="?", const="all", choices=INFO_TOPICS, help=f"About Hydra [{'|'.join(INFO_TOPICS)}]")

        flag(
            "--explain", nargs="?", const="", metavar="GROUP",
            help="Each setting with its value, kind and meaning: of a GROUP, a GROUP=FILE, a KEY, or all",
        )  # fmt: skip

    def error(self, message: str) -> NoReturn:
        hint = suggest_flag(message, self._option_string_actions) or "settings are written key=value, see --help"
        raise UserError(f"{message}; {hint}")


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line. Raises UserError for a flag that does not exist or is not used here."""
    args = HydraParser().parse_intermixed_args(argv)
    if args.config_path or args.config_name:
        raise UserError("--config-path and --config-name are not used: put your own files below a --config-dir")
    explains = args.explain is not None
    if explains and "=" in args.explain:
        args.overrides.append(args.explain)
        args.explain = args.explain.partition("=")[0]
    if explains and (more := [text for text in args.overrides if "=" not in text]):
        raise UserError(f"--explain takes one name, got {' '.join([args.explain, *more])}: leave out all but one")
    if args.multirun and args.cfg:
        raise UserError("--cfg shows the settings of one run: leave out -m")
    actions = {
        "--explain": explains,
        "--run": args.run,
        "--multirun": args.multirun,
        "--cfg": args.cfg,
        "--info": args.info,
    }
    given = [flag for flag, value in (actions | {"--shell-completion": args.shell_completion}).items() if value]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} exclude each other: give one of them")
    if args.shell_completion and not re.fullmatch(SHELL_COMMAND_PATTERN, " ".join(args.overrides)):
        raise UserError("--shell-completion takes install=SHELL, uninstall=SHELL or query=SHELL: bash, fish or zsh")
    if args.shell_completion and args.overrides[0].startswith("query") and "COMP_LINE" not in os.environ:
        raise UserError(f"--shell-completion {args.overrides[0]} is called by the shell, which sets COMP_LINE")
    if args.experimental_rerun:
        raise UserError("--experimental-rerun is not used: resume a run with resume=RUN")
    if args.config_dir:
        args.config_dir = absolute_config_dir(args.config_dir, "--config-dir")
    return args


def require_used(overrides: Sequence[Override], multirun: bool) -> None:
    """Raise UserError for a setting of Hydra that only a sweep reads, or only a run."""
    fixes = {"hydra.sweep.dir": "a run's is hydra.run.dir=FOLDER; -m starts a sweep"}
    if multirun:
        in_file = "set it in a file of --config-dir DIR, DIR/experiment/NAME.yaml"
        fixes = {"hydra.run.dir": "a sweep's is hydra.sweep.dir=FOLDER", "job_logging": in_file}
    for override in overrides:
        for name, fix in fixes.items():
            if name in override.key_or_group:
                raise UserError(f"{override.input_line} has no effect {'with' if multirun else 'without'} -m: {fix}")


def print_hydra_info(
    argv: Sequence[str], overrides: Sequence[str], config_dir: str | None, name: str = "train"
) -> None:
    """Let Hydra handle --help, --cfg, --info or completion. overrides: the settings in `argv`."""
    if sys.stdout is None:
        raise UserError("standard output is closed: redirect it to a file or /dev/null instead")
    require_global_package(parse_overrides(overrides), config_dir)
    try:
        run_with_hydra(lambda _: None, argv, name)
    except (HydraException, OmegaConfBaseException, RecursionError):
        compose(overrides, config_dir, name)  # raises the error as one line
        raise


def run_with_hydra(task: Callable[[DictConfig], Any], argv: Sequence[str], name: str = "train") -> None:
    """Do the work of hydra.main with our own parser: Python 3.14 rejects Hydra's."""
    parser = HydraParser()
    hydra_version.setbase("1.3")
    with use_our_parser_for_completion(), prefer_user_files(), yaml_texts_as_written():
        hydra_utils._run_hydra(
            args=parser.parse_intermixed_args(argv),
            args_parser=parser,
            task_function=task,
            config_path=f"pkg://{CONFIG_MODULE}",
            config_name=name,
        )


@contextlib.contextmanager
def use_our_parser_for_completion() -> Iterator[None]:
    """Make Hydra's shell completion parse the typed line with our parser: Python 3.14 rejects Hydra's."""
    before = hydra_utils.get_args
    hydra_utils.get_args = HydraParser().parse_intermixed_args
    try:
        yield
    finally:
        hydra_utils.get_args = before
