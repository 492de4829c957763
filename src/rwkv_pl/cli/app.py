"""What the commands share: a command line to a checked config, errors as one line.

Only Hydra and the standard library are imported here, so that a mistake is told before anything heavy is loaded.
"""

import contextlib
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra import version as hydra_version
from hydra._internal.utils import _run_hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, Override
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rwkv_pl.cli.arguments import HydraParser, completed_by_our_parser
from rwkv_pl.config import (
    GROUPS,
    TARGET_MODULES,
    RunError,
    Train,
    UserError,
    check_kind,
    check_kinds,
    check_trainer,
    nearest,
    split_own,
)
from rwkv_pl.files import in_words

if TYPE_CHECKING:
    from rich.console import Console

# For a number in a config that follows another: ${divide:1.5,${model.n_embd}}
OmegaConf.register_new_resolver("divide", lambda a, b: a / b, replace=True)

CONFIG_MODULE = "rwkv_pl.conf"

# For a file that comes with the config, wherever that is installed: ${conf:experiment/debug.txt}
OmegaConf.register_new_resolver("conf", lambda name: str(resources.files(CONFIG_MODULE) / name), replace=True)

Schema = TypeVar("Schema")
BAD_INPUT, FAILED = 2, 1

# Loggers that are extras; the package's name is the module's.
EXTRA_LOGGERS = ("wandb", "mlflow")


def told_in_one_line(main: Callable[[], None]) -> Callable[[], None]:
    """A command that ends with one line and exit code 2 on bad input, 1 where the system refuses something."""

    def command() -> None:
        # Hydra then raises what it would print over several lines.
        os.environ.setdefault("HYDRA_FULL_ERROR", "1")
        if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
            # Threads of OpenMP spin while they wait for each other, by default so long that other work on the same
            # cores slows a training ten times and more. Read when torch is loaded.
            os.environ["GOMP_SPINCOUNT"] = "10000"
        try:
            with safe_import_path():
                main()
        except RunError as error:
            sys.exit(print_error(error, FAILED))
        except (UserError, HydraException, OmegaConfBaseException) as error:
            sys.exit(print_error(error))
        except BrokenPipeError:
            # As of `| head`. What Python would flush at its end goes nowhere.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(FAILED)
        except OSError as error:
            # A full disk, a folder that went away: what was written before is whole.
            sys.exit(print_error(in_words(error), FAILED))
        except KeyboardInterrupt:
            sys.exit(130)

    return command


@contextlib.contextmanager
def safe_import_path() -> Iterator[None]:
    """Python processes started inside, by whatever library, import nothing from the folder in which they start.

    That folder may be a stranger's: a resumed sweep's jobs start where the sweep's multirun.yaml says. Relative and
    empty entries of PYTHONPATH keep the meaning that they have for this process.

    This process looks for no plug-ins there either: an editable install leaves a relative name on sys.path, below which
    torch and Lightning would find entry points.
    """
    import hydra_plugins.rwkv_pl  # noqa: F401  an editable install finds it by that name

    path = list(sys.path)
    sys.path[:] = [entry for entry in path if Path(entry).is_absolute()]
    before = {name: os.environ.get(name) for name in ("PYTHONSAFEPATH", "PYTHONPATH")}
    os.environ["PYTHONSAFEPATH"] = "1"
    if before["PYTHONPATH"]:
        entries = before["PYTHONPATH"].split(os.pathsep)
        os.environ["PYTHONPATH"] = os.pathsep.join(str(Path(entry).absolute()) for entry in entries)
    try:
        yield
    finally:
        sys.path[:] = path
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextlib.contextmanager
def ended_by_ctrl_c() -> Iterator[None]:
    """Ctrl-C ends the process at once: an import may swallow what Python raises for it, or fail of it later."""
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def print_error(error: BaseException | str, code: int = BAD_INPUT) -> int:
    """One line on stderr, with the command's name. Returns the exit code."""
    print(f"{Path(sys.argv[0]).name}: {one_line(error)}", file=sys.stderr)
    return code


def console() -> "Console":
    """rich's, for a table."""
    import rich
    from rich.console import Console

    there = rich.get_console()
    return there if there.is_terminal else Console(width=200)  # into a file or a pipe nothing has to be folded


def one_line(error: BaseException | str) -> str:
    """An error's message without its line breaks."""
    return " ".join(str(error).split())


def parse_overrides(overrides: Sequence[str], sweep: bool = False) -> list[Override]:
    """key=value each. Raises UserError for what Hydra's grammar refuses, for +, ++ and ~, and for a, b without -m."""
    parser = OverridesParser.create()
    parsed = []
    for text in overrides:
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            reason = one_line(str(error).splitlines()[0])
            raise UserError(f"{text!r} can't be read as key=value ({reason}): quote special characters") from error
        key = override.key_or_group
        if override.is_add() or override.is_force_add():
            raise UserError(f"{text}: keys are not added, all there are exist already: leave out the +")
        if override.is_delete():
            raise UserError(f"{text}: keys are not removed; write {key}=null, or choose another file of its group")
        if override.is_sweep_override() and not sweep:
            raise UserError(f"{text} names several values: add -m to run them all, or write a list as [a,b]")
        chosen = override.value()
        if override.package is not None:
            raise UserError(f"{text}: leave out the @, each group has one place")
        if isinstance(chosen, Glob):
            raise UserError(f"{text}: glob() is not used here, list the names")
        none = chosen is None and key == "experiment"
        if is_group_choice(override):
            if not (none or isinstance(chosen, str | list | ChoiceSweep)):
                raise UserError(f"{text}: a file of {key} is chosen by its name; --help lists them")
            names = chosen.list if isinstance(chosen, ChoiceSweep) else chosen if isinstance(chosen, list) else [chosen]
            # Hydra would also take a path to any other folder, whose files can make it run programs.
            parts = [part for name in names for part in re.split(r"[/\\]", str(getattr(name, "text", name)))]
            if any(part in ("", ".", "..") or ":" in part for part in parts):
                raise UserError(f"{key} takes the name of a file, not a path (files of yours: --config-dir): {text}")
        parsed.append(override)
    return parsed


def compose(overrides: Sequence[str], config_dir: str | None = None, name: str = "train") -> DictConfig:
    """conf/NAME.yaml with the overrides, Hydra's own part included. Raises UserError in one line."""
    extra = [f"hydra.searchpath=[{quoted('file://' + config_dir)}]"] if config_dir else []
    with initialize_config_module(CONFIG_MODULE, version_base="1.3", job_name=name):
        try:
            return hydra_compose(name, overrides=[*overrides, *extra], return_hydra_config=True)
        except MissingConfigException as error:
            group, _, name = (error.missing_cfg_file or "").rpartition("/")
            # Hydra lists them for a single choice, not for a list of them.
            files = resources.files(CONFIG_MODULE).joinpath(group)
            there = error.options or sorted(f.name[:-5] for f in files.iterdir() if f.name.endswith(".yaml"))
            options = ", ".join(there)
            raise UserError(f"there is no {group}={name}; there are: {options}") from error
        except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
            reason = error
    explain_unknown_key(overrides, config_dir, name)
    cause = f" ({one_line(reason.__cause__)})" if reason.__cause__ else ""
    raise UserError(one_line(reason) + cause) from reason


def hand_over(
    task: Callable[[DictConfig], Any], argv: Sequence[str], multirun: bool = False, name: str = "train"
) -> None:
    """Lets Hydra make .hydra/ and train.log and call `task` with the composed config; under -m, its sweeper.

    As hydra.main does, which would parse the command line by a parser that Python 3.14 refuses.
    """
    if multirun:
        plugins()
    failure = []

    def run(config: DictConfig) -> Any:
        try:
            return task(config)
        except Exception as error:
            # Raised here, Hydra would print a line of its own before ours.
            failure.append(error)
            return None

    parser = HydraParser()
    hydra_version.setbase("1.3")
    with completed_by_our_parser():
        _run_hydra(
            args=parser.parse_intermixed_args(argv),
            args_parser=parser,
            task_function=task if multirun else run,
            config_path=f"pkg://{CONFIG_MODULE}",
            config_name=name,
        )
    if failure:
        raise failure[0]


def plugins() -> dict[str, Any]:
    """Our launcher and sweepers by the name of `_target_`, known to Hydra, whose own search does not see those of an
    editable install."""
    from hydra.core.plugins import Plugins

    known = Plugins.instance()

    from hydra_plugins.rwkv_pl.grid import GridSweeper
    from hydra_plugins.rwkv_pl.launcher import ProcessLauncher
    from hydra_plugins.rwkv_pl.study import StudySweeper

    ours = (ProcessLauncher, GridSweeper, StudySweeper)
    for plugin in ours:
        known.register(plugin)
    return {f"{plugin.__module__}.{plugin.__name__}": plugin for plugin in ours}


def typed_config_dir(sources: Any) -> str | None:
    """The --config-dir among Hydra's `runtime.config_sources`."""
    return next((str(source["path"]) for source in sources if source["provider"] == "command-line"), None)


def explain_unknown_key(overrides: Sequence[str], config_dir: str | None, name: str = "train") -> None:
    """Raises UserError, with the nearest key, for the first override whose key does not exist."""
    parsed = parse_overrides(overrides, sweep=True)
    choices = [override for override in parsed if is_group_choice(override)]
    if len(choices) == len(parsed):
        return
    base = compose([str(override.input_line) for override in choices], config_dir, name)
    for override in parsed:
        if override not in choices:
            require_key(override.key_or_group, base)


def require_key(key: str, config: Any) -> None:
    """Raises UserError where the dotted `key` is not in `config`, naming the nearest that is."""
    node, seen = config, ""
    for part in key.split("."):
        if not isinstance(node, dict | DictConfig) or part not in node:
            if seen.startswith("trainer."):
                check_trainer({part: None}, trainer_defaults())
            names = [name for name in node if name != "hydra"] if isinstance(node, dict | DictConfig) else []
            hint = nearest(part, names) if names else f"; {seen.rstrip('.')} is a value"
            groups = [group for group in GROUPS if isinstance(config.get(group), dict | DictConfig)]
            if key == part and (group := next((group for group in groups if part in config[group]), None)):
                hint = f"; did you mean {group}.{part}?"
            raise UserError(f"{key} is not a setting{hint}")
        node, seen = node[part], f"{seen}{part}."


def is_group_choice(override: Override) -> bool:
    """Does it choose a file (schedule=cosine), rather than set a value?"""
    return override.key_or_group in GROUPS or "/" in override.key_or_group


def trainer_defaults() -> dict[str, Any]:
    """conf/trainer/default.yaml."""
    text = resources.files(CONFIG_MODULE).joinpath("trainer/default.yaml").read_text(encoding="utf-8")
    return OmegaConf.to_container(OmegaConf.create(text))  # type: ignore[return-value]


def check(config: DictConfig, overrides: Sequence[Override] = (), config_dir: str | None = None) -> Train:
    """The composed config, its types and ranges held. Raises UserError: the key, what was given, what is allowed."""
    plain = resolved(config)
    for group in GROUPS[:-1]:
        if not isinstance(plain.get(group), dict):
            raise UserError(f"{group}={plain.get(group)} is not a choice of a file in conf/{group}")
    if any(override.key_or_group.startswith(("callbacks.", "logger.", "optim.")) for override in overrides):
        choices = {o.key_or_group: o.input_line or "" for o in overrides if is_group_choice(o)}
        choices.pop("experiment", None)
        if optim := OmegaConf.select(config, "hydra.runtime.choices.optim"):
            choices["optim"] = f"optim={quoted(optim)}"  # an experiment may have chosen it
        base = compose(list(choices.values()), config_dir)
        for group in ("callbacks", "logger"):
            check_kinds(group, plain[group], OmegaConf.to_container(base[group]))
        check_kinds("optim", plain["optim"], split_own(base.optim)[1])
    defaults = trainer_defaults()
    plain["trainer"] = defaults | plain["trainer"]
    check_trainer(plain["trainer"], defaults)
    for group in ("callbacks", "logger"):
        for name, arguments in plain[group].items():
            if not isinstance(arguments, dict) or "_target_" not in arguments:
                raise UserError(f"{group}.{name} must be a mapping that names its class as _target_, got {arguments}")
    for where, target in targets(plain):
        check_target(where, target)
    for name in EXTRA_LOGGERS:
        if name in plain["logger"] and not find_spec(name):
            raise UserError(f"logger.{name} needs a package that is not installed: pip install 'rwkv_pl[{name}]'")
    if plain.pop("experiment", None) is not None:
        raise UserError(
            "an experiment's file begins with the line '# @package _global_': without it its settings go astray"
        )
    common, own = split_own(plain["optim"])
    return typed(plain | {"optim": common | {"own": own}}, Train)


def resolved(config: DictConfig) -> dict[str, Any]:
    """A composed config in plain types, without Hydra's part. Raises UserError where an interpolation leads nowhere."""
    config = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    try:
        return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise UserError(one_line(error)) from error


def typed(plain: dict[str, Any], schema: type[Schema]) -> Schema:
    """`plain` as the dataclass `schema`. Raises UserError: the key, what was given, what is allowed."""
    for of in fields(schema):  # type: ignore[arg-type]
        if of.type is bool and of.name in plain:  # OmegaConf takes any number for true
            check_kind(of.name, plain[of.name], (bool,))
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), plain))  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        key = error.full_key or ""
        if "not in" in str(error.msg):
            parent = key.rpartition(".")[0]
            keys = OmegaConf.select(OmegaConf.structured(schema), parent) if parent else OmegaConf.structured(schema)
            raise UserError(f"{key} is not a setting{nearest(key.rpartition('.')[2], keys)}") from error
        raise UserError(f"{key}: {one_line(str(error.msg).split('full_key')[0])}") from error


def targets(plain: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Every `_target_` of a config, with the dotted key of the mapping that holds it."""
    if isinstance(plain, dict):
        for key, value in plain.items():
            if key == "_target_":
                yield where, value
            else:
                yield from targets(value, f"{where}.{key}" if where else str(key))
    elif isinstance(plain, list):
        for i, value in enumerate(plain):
            yield from targets(value, f"{where}[{i}]")


def check_target(where: str, target: Any) -> None:
    """A class is named by one of its group's modules and exactly one more name. Raises UserError."""
    group, *inside = where.split(".")
    modules = TARGET_MODULES.get(group, ())
    if not modules or len(inside) != (0 if group == "optim" else 1):
        raise UserError(f"{where}._target_ is not a setting: classes are named in optim, callbacks and logger alone")
    module, _, name = str(target).rpartition(".")
    if module not in modules or not name.isidentifier():
        raise UserError(f"{where}._target_ must be a class of {' or '.join(modules)}, got {target}")
    if name == "CSVLogger":
        raise UserError(f"{where}._target_={target} is not used: metrics.csv is always there, and it would delete that")


def load_target(where: str, target: str) -> type:
    """The class that a checked `_target_` names. Raises UserError where the module has no such class."""
    from importlib import import_module

    module, _, name = target.rpartition(".")
    found = getattr(import_module(module), name, None)
    if not isinstance(found, type):
        raise UserError(f"{where}._target_={target} is not a class of {module}")
    return found


def quoted(value: str | Path) -> str:
    """A text as the value of a Hydra override, whatever characters it has."""
    return "'" + str(value).replace("\\", "\\\\").replace("'", "\\'") + "'"
