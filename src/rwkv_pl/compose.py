"""Composes the config with Hydra and checks it.

Only Hydra and the standard library are imported here, so that a mistake is reported before anything heavy is loaded.
"""

import contextlib
import functools
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from importlib import resources
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra._internal import config_loader_impl
from hydra._internal.config_repository import ConfigRepository
from hydra.core.config_search_path import ConfigSearchPath, SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, Override
from hydra.errors import HydraException, MissingConfigException
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rwkv_pl.checks import KIND_NAMES, check_kind, check_kinds, suggest_key
from rwkv_pl.config import (
    CONFIG_MODULE,
    GROUPS,
    Train,
    check_trainer,
    corpus_defaults,
    read_conf,
    split_own_arguments,
)
from rwkv_pl.errors import UserError, one_line
from rwkv_pl.targets import MOVED, check_target, find_targets, trusted_modules
from rwkv_pl.terminal import SWEEP_JOB_ENV, quote_override
from rwkv_pl.texts import yaml_texts_as_written

# For a number in a config that depends on another: ${divide:1.5,${model.n_embd}}
OmegaConf.register_new_resolver("divide", lambda a, b: a / b, replace=True)

# Hydra's names of the source of the user's files: --config-dir, and hydra.searchpath, with which old runs stored it.
USER_PROVIDERS = ("command-line", "hydra.searchpath in command-line")

# For a file inside conf/, wherever it is installed: ${conf:experiment/debug.txt}
OmegaConf.register_new_resolver("conf", lambda name: str(resources.files(CONFIG_MODULE) / name), replace=True)

Schema = TypeVar("Schema")

# The groups of which several files can be chosen, and the file that conf/train.yaml chooses.
FIRST_FILE = {"callbacks": "default", "logger": "tensorboard"}

# Hydra's own settings with a value that runs rely on: the value, and the reason.
HYDRA_FIXED: dict[str, tuple[Any, str]] = {
    "mode": (None, "-m starts a sweep"),
    "output_subdir": (".hydra", "resume= reads the settings of a run there"),
    "job.name": ("train", "the log of a run is train.log"),
    "job.chdir": (False, "relative paths count from the folder of the command"),
    "callbacks": ({}, "callbacks= takes Lightning's"),
}

# Lightning's callbacks that only write to loggers.
NEED_LOGGER = tuple(f"lightning.pytorch.callbacks.{name}" for name in ("DeviceStatsMonitor", "LearningRateMonitor"))

# Loggers whose packages are optional extras. The extra, the package and the module have the same name.
EXTRA_LOGGERS = ("wandb", "mlflow")


def parse_overrides(overrides: Sequence[str], sweep: bool = False) -> list[Override]:
    """Parse key=value texts. Raises UserError for invalid grammar, +, ++ and ~, and several values without `sweep`."""
    parser = OverridesParser.create()
    parsed = []
    for text in overrides:
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            if re.fullmatch(r"[\w./@]+", text) and not Path(text).exists():
                raise UserError(f"{text} needs a value: write {text}=VALUE") from error
            if "at: '~'" in str(error):
                raise UserError(f"{text!r} can't be parsed as key=value: write the home folder instead of ~") from error
            reason = one_line(str(error).splitlines()[0])
            raise UserError(f"{text!r} can't be parsed as key=value ({reason}): quote special characters") from error
        key = override.key_or_group
        if override.is_add() or override.is_force_add():
            is_resume = any(other.startswith("resume=") for other in overrides)
            raise UserError(f"{text}: cannot add a key, {_explain_added_key(override, is_resume)}")
        if key == "hydra.searchpath":  # a resume, or a sweep's job, would not have it
            raise UserError(f"{key} is not used: give your folder as --config-dir FOLDER")
        if key == "hydra":
            raise UserError(f"{text}: set Hydra's own settings one by one, as in hydra.run.dir=FOLDER")
        if override.is_delete():
            raise UserError(f"{text}: cannot remove a key; write {key}=null, or choose another file of its group")
        if override.is_sweep_override() and override.is_hydra_override():
            raise UserError(f"{text}: Hydra's own settings take one value; quote a comma")
        if override.is_sweep_override() and key == "plugins":
            raise UserError(
                f"{text}: all jobs of a sweep have the same plug-ins, write plugins=[{override.get_value_string()}]"
            )
        if override.is_sweep_override() and not sweep:
            raise UserError(f"{text} has several values: add -m to run them all{suggest_list(override)}")
        chosen = override.value()
        if override.package is not None:
            raise UserError(f"{text}: cannot change the package of a group: leave out the @")
        if isinstance(chosen, Glob):
            raise UserError(f"{text}: glob() is not supported, list the names")
        if is_group_choice(override):
            names = chosen.list if isinstance(chosen, ChoiceSweep) else chosen if isinstance(chosen, list) else [chosen]
            if None in names or not isinstance(chosen, str | list | ChoiceSweep):
                raise UserError(f"{text}: {key} takes the name of a file; --help lists them")
            # Hydra also accepts a path to any other folder, whose files can make it run programs.
            parts = [part for name in names for part in re.split(r"[/\\]", str(getattr(name, "text", name)))]
            if any(part in ("", ".", "..") or ":" in part for part in parts):
                raise UserError(
                    f"{key} takes the name of a file, not a path (for your own files: --config-dir): {text}"
                )
        parsed.append(override)
    return parsed


def suggest_list(override: Override) -> str:
    """Return ", or write ..." with the values of a sweep as a list, if they are typed as a,b."""
    value = override.get_value_string()
    is_list = isinstance(chosen := override.value(), ChoiceSweep) and chosen.simple_form
    return f", or for a list write '{override.key_or_group}=[{value}]'" if is_list else ""


def _explain_added_key(override: Override, is_resume: bool) -> str:
    """The fix for `+key=value`: the key exists, or it is an argument that only the optimizer's class has."""
    group, _, name = override.key_or_group.partition(".")
    sign = "++" if override.is_force_add() else "+"
    if not name and group in FIRST_FILE:
        return f"to add one, list them all: '{group}=[{FIRST_FILE[group]},{override.get_value_string()}]'"
    if group == "optim" and split_own_arguments({name: None})[1]:
        return f"drop the {sign} if it exists; {_explain_new_argument(group, is_resume)}"
    return f"every setting already exists: drop the {sign}"


def _explain_new_argument(group: str, is_resume: bool) -> str:
    """Say how to set an argument of a class of the group that is not a key of its file."""
    if is_resume:  # which has no --config-dir
        return "another argument of its class needs a new run"
    return (
        f"another argument of its class needs your own file with that key, mine/{group}/NAME.yaml: "
        f"--config-dir mine {group}=NAME"
    )


def compose(overrides: Sequence[str], config_dir: str | None = None, name: str = "train") -> DictConfig:
    """Compose conf/NAME.yaml with the overrides, including Hydra's own part. Raises UserError."""
    require_global_package(parse_overrides(overrides, sweep=True), config_dir)
    with (
        prefer_user_files(),  # first: initialize_config_module makes the loader
        yaml_texts_as_written(),
        initialize_config_module(CONFIG_MODULE, version_base="1.3", job_name=name),
    ):
        try:
            if config_dir:
                loader: Any = GlobalHydra.instance().config_loader()
                schema = SearchPathQuery(provider="schema", path=None)
                loader.config_search_path.prepend("command-line", f"file://{config_dir}", anchor=schema)
                loader.repository.initialize_sources(loader.config_search_path)
            composed = hydra_compose(name, overrides=list(overrides), return_hydra_config=True)
            if name == "train":
                _check_hydra(composed.hydra, len(overrides))
            return composed
        except KeyError as error:
            raise UserError(f"hydra.job.env_copy names {error}, an environment variable that is not set") from error
        except RecursionError as error:
            raise UserError("a file of --config-dir includes itself in its defaults") from error
        except MissingConfigException as error:
            group, _, name = (error.missing_cfg_file or "").rpartition("/")
            # Hydra lists the options for a single choice, but not for a list of choices.
            folders = [
                resources.files(CONFIG_MODULE).joinpath(group),
                *([Path(config_dir, group)] if config_dir else []),
            ]
            files = {file.name for folder in folders if folder.is_dir() for file in folder.iterdir()}
            there = error.options or sorted(file[:-5] for file in files if file.endswith(".yaml"))
            raise UserError(f"{group}={name} does not exist; available: {', '.join(there)}") from error
        except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
            reason = error
    explain_unknown_key(overrides, config_dir, name)
    cause = f" ({one_line(reason.__cause__)})" if reason.__cause__ else ""
    # Hydra advises to write +key, which parse_overrides rejects.
    raise UserError(re.sub(r" To append to your config use \S+", "", one_line(reason) + cause)) from reason


def _check_hydra(hydra: DictConfig, n_overrides: int) -> None:
    """Raise UserError for a setting of Hydra itself that a command line or a file must not change."""
    if os.environ.get("LOCAL_RANK", "0") == "0":  # Lightning sets some for the processes that it starts
        for key, (value, reason) in HYDRA_FIXED.items():
            given = OmegaConf.select(hydra, key)
            if given != value:
                raise UserError(f"hydra.{key}={getattr(given, 'name', given)} is not supported, {reason}: leave it out")
    if None in (hydra.launcher, hydra.sweeper):
        raise UserError("hydra.launcher and hydra.sweeper can't be null: leave them out")
    if not isinstance(hydra.verbose, bool | str | ListConfig):
        raise UserError(f"hydra.verbose must be true, false or a list of loggers, got {hydra.verbose}")
    if len(hydra.overrides.task) + len(hydra.overrides.hydra) != n_overrides:
        raise UserError("hydra.overrides cannot be set, Hydra writes the typed settings there: leave it out")


def absolute_config_dir(given: str | Path, name: str) -> str:
    """Return the absolute path of the user's folder. name: of the argument. Raises UserError if it is not a folder."""
    folder = Path(given).expanduser().absolute()
    if not folder.is_dir():
        raise UserError(f"{name}={folder} is not a folder: give the one with your own files")
    return str(folder)


def typed_config_dir(sources: Any) -> str | None:
    """Return the --config-dir among Hydra's `runtime.config_sources`."""
    files = (source for source in sources if source["schema"] == "file")
    return next((str(source["path"]) for source in files if source["provider"] in USER_PROVIDERS), None)


class UserFilesFirst(ConfigRepository):
    """Finds a file in the user's folders before the built-in one of the same name; Hydra itself does the opposite.

    Except train.yaml and eval.yaml: such a file could name further search paths, and a stored run its folder.
    """

    def initialize_sources(self, config_search_path: ConfigSearchPath) -> None:
        super().initialize_sources(config_search_path)
        self.sources.sort(key=lambda source: source.provider not in USER_PROVIDERS)

    def load_config(self, config_path: str) -> ConfigResult | None:
        sources, is_main = self.sources, config_path in ("train", "eval")
        found = [source for source in sources if source.is_config(config_path)]
        if found and found[0].provider in USER_PROVIDERS and found[-1].provider not in USER_PROVIDERS:
            file = Path(found[0].path, f"{config_path.removesuffix('.yaml')}.yaml")
            _print_once(
                f"{file} is not read: write its settings into an experiment"
                if is_main
                else f"{file} replaces the built-in file of that name"
            )
        if is_main:
            self.sources = [source for source in sources if source.provider not in USER_PROVIDERS]
        try:
            return super().load_config(config_path)
        finally:
            self.sources = sources


@functools.cache
def _print_once(line: str) -> None:
    if not {"COMP_LINE", SWEEP_JOB_ENV} & os.environ.keys():  # neither while a shell completes, nor for each job again
        print(line, file=sys.stderr)


@contextlib.contextmanager
def prefer_user_files() -> Iterator[None]:
    """Make Hydra's loaders find the user's files first."""
    before = config_loader_impl.ConfigRepository
    config_loader_impl.ConfigRepository = UserFilesFirst  # type: ignore[misc]
    try:
        yield
    finally:
        config_loader_impl.ConfigRepository = before  # type: ignore[misc]


def explain_unknown_key(overrides: Sequence[str], config_dir: str | None, name: str = "train") -> None:
    """Raise UserError, with the nearest key, for the first override whose key does not exist."""
    parsed = parse_overrides(overrides, sweep=True)
    choices = [override for override in parsed if is_group_choice(override)]
    if len(choices) == len(parsed):
        return
    mixes = [override for override in parsed if override.key_or_group == "data.corpora"]
    of_corpora = any(override.key_or_group.startswith("data.corpora.") for override in parsed)
    base = compose([str(o.input_line) for o in choices + (mixes if of_corpora else [])], config_dir, name)
    for override in parsed:
        if override not in choices:
            require_key(override.key_or_group, base)
        if override in mixes and base.data.corpora and isinstance(corpora := override.value(), dict):
            for name, settings in corpora.items():
                for key in settings if isinstance(settings, dict) else ():
                    require_key(f"data.corpora.{name}.{key}", base)


def require_key(key: str, config: Any, is_resume: bool = False) -> None:
    """Raise UserError if the dotted `key` is not in `config`; the message names the nearest key.

    is_resume: whether `config` is that of a run to resume.
    """
    node, seen = config, ""
    for part in key.split("."):
        if not isinstance(node, dict | DictConfig) or part not in node:
            if seen.startswith("trainer."):
                defaults = trainer_defaults()
                check_trainer({part: defaults.get(part)}, defaults)
                if is_resume:  # of a run that is older than this setting
                    return
                raise UserError(f"{key} is not in the chosen file: add it there")
            names = [str(name) for name in node if name != "hydra"] if isinstance(node, dict | DictConfig) else []
            hint = suggest_key(part, names) if names else f"; {seen.rstrip('.')} is a value"
            group, *inside = seen.rstrip(".").split(".")
            if group in FIRST_FILE and not inside and _is_file(group, part):
                hint = f"; choose its file too: '{group}=[{','.join([*names, part])}]'"
            if names and re.fullmatch(r"data\.corpora\.[^.]+\.", seen):
                known = corpus_defaults(node.get("name", "text"))
                hint = ": add it to your file, or to data.corpora={...}" if part in known else suggest_key(part, known)
            if names and ((group == "optim" and not inside) or (group in FIRST_FILE and inside)):
                hint += f"; {_explain_new_argument(group, is_resume)}"
            groups = [name for name in GROUPS if isinstance(config.get(name), dict | DictConfig)]
            if key == part and (owner := next((name for name in groups if part in config[name]), None)):
                hint = f"; did you mean {owner}.{part}?"
            raise UserError(f"{key} is not a setting{hint}")
        node, seen = node[part], f"{seen}{part}."


def _is_file(group: str, name: str) -> bool:
    return resources.files(CONFIG_MODULE).joinpath(group, f"{name}.yaml").is_file()


def is_group_choice(override: Override) -> bool:
    """Whether the override chooses a file (schedule=cosine) rather than sets a value."""
    return override.key_or_group in GROUPS or "/" in override.key_or_group


def trainer_defaults() -> dict[str, Any]:
    """Read conf/trainer/default.yaml."""
    return read_conf("trainer/default.yaml")


def check_config(config: DictConfig, overrides: Sequence[Override] = (), config_dir: str | None = None) -> Train:
    """Check types and ranges of a composed config. Raises UserError with the key, its value and the allowed values."""
    plain = to_plain_dict(config)
    for group in GROUPS[:-1]:
        if not isinstance(plain.get(group), dict):
            raise UserError(f"{group}={plain.get(group)} is not the name of a file in conf/{group}; --help lists them")
    if any(override.key_or_group.startswith(("callbacks.", "logger.", "optim.")) for override in overrides):
        choices = {o.key_or_group: o.input_line or "" for o in overrides if is_group_choice(o)}
        choices.pop("experiment", None)
        if optim := OmegaConf.select(config, "hydra.runtime.choices.optim"):
            choices["optim"] = f"optim={quote_override(optim)}"  # an experiment may have chosen it
        base = compose(list(choices.values()), config_dir)
        for group in ("callbacks", "logger"):
            check_kinds(group, plain[group], OmegaConf.to_container(base[group]))
        check_kinds("optim", plain["optim"], split_own_arguments(OmegaConf.to_container(base.optim))[1])  # type: ignore[arg-type]
    defaults = trainer_defaults()
    plain["trainer"] = defaults | plain["trainer"]
    check_trainer(plain["trainer"], defaults)
    for group in ("callbacks", "logger"):
        for name, arguments in plain[group].items():
            if name == "_target_":
                raise UserError(
                    f"{group}._target_ needs a name above it in the file: write mine: {{_target_: {arguments}}}"
                )
            if not isinstance(arguments, dict) or "_target_" not in arguments:
                raise UserError(f"{group}.{name} must be a mapping with its class as _target_, got {arguments}")
            arguments["_target_"] = MOVED.get(str(arguments["_target_"]), arguments["_target_"])
            if arguments["_target_"] in NEED_LOGGER and not plain["logger"]:
                raise UserError(f"{group}.{name} needs a logger: leave out logger=none, or {group}.{name}")
    given = next((override for override in overrides if override.key_or_group == "plugins"), None)
    if plain.get("plugins") and given is None:
        raise UserError("a config file cannot set plugins, which run code: type plugins=[...] on the command line")
    plain["plugins"] = trusted_modules(given.value() if given else None)
    for where, target in find_targets(plain):
        check_target(where, target, plain["plugins"])
    for name in EXTRA_LOGGERS:
        if name in plain["logger"] and not find_spec(name):
            raise UserError(f"logger.{name} needs a package that is not installed: pip install 'rwkv_pl[{name}]'")
    if plain.pop("experiment", None) is not None:
        raise _missing_package_error(OmegaConf.select(config, "hydra.runtime.choices.experiment"))
    if plain.keys() - {of.name for of in fields(Train)}:
        require_global_package(overrides, config_dir)
    common, own = split_own_arguments(plain["optim"])
    return to_dataclass(plain | {"optim": common | {"own": own}}, Train)


def require_global_package(overrides: Sequence[Override], config_dir: str | None) -> None:
    """Raise UserError if a chosen experiment is a file in --config-dir without `# @package _global_` in its header.

    Hydra's header is the lines before the first one that does not start with `# @`. Without the package, Hydra puts the
    file's settings below the key `experiment`, where nothing reads them.
    """
    values = {override.key_or_group: override.value() for override in overrides}
    names = values.get("experiment")
    for name in names if isinstance(names, list) else [names]:
        file = Path(config_dir or "", "experiment", f"{str(name).removesuffix('.yaml')}.yaml")
        if config_dir and isinstance(name, str) and file.is_file():
            lines = file.read_text(encoding="utf-8-sig", errors="replace").splitlines()
            header = takewhile(re.compile(r"\s*(#\s*@|$)").match, lines)
            if not any(re.fullmatch(r"\s*#\s*@package\s+_global_\s*", line) for line in header):
                raise _missing_package_error(name)


def _missing_package_error(name: Any) -> UserError:
    return UserError(
        f"experiment={name}: the first line of its file must be '# @package _global_', "
        "or Hydra does not apply its settings"
    )


def to_plain_dict(config: DictConfig) -> dict[str, Any]:
    """Convert a composed config to plain types, without Hydra's part. Raises UserError if an interpolation fails."""
    config = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    try:
        return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise UserError(one_line(error)) from error


def to_dataclass(plain: dict[str, Any], schema: type[Schema]) -> Schema:
    """Convert `plain` to the dataclass `schema`. Raises UserError with the key, its value and the allowed values."""
    _check_flags(plain, schema)
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), plain))  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        key = error.full_key or ""
        if "not in" in str(error.msg):
            parent = key.rpartition(".")[0]
            keys = OmegaConf.select(OmegaConf.structured(schema), parent) if parent else OmegaConf.structured(schema)
            raise UserError(f"{key} is not a setting{suggest_key(key.rpartition('.')[2], keys)}") from error
        if key:
            check_kind(key, error.value, _find_kinds(schema, key))
        raise UserError(f"{key}: {one_line(str(error.msg).split('full_key')[0])}") from error


def _check_flags(plain: dict[str, Any], schema: Any, prefix: str = "") -> None:
    """Require true or false for the flags of a dataclass: OmegaConf accepts any number as true."""
    for of in fields(schema):
        if of.name in plain and is_dataclass(of.type):
            check_kind(f"{prefix}{of.name}", plain[of.name], (dict,))
            _check_flags(plain[of.name], of.type, f"{prefix}{of.name}.")
        elif of.name in plain and of.type is bool:
            check_kind(f"{prefix}{of.name}", plain[of.name], (bool,))


def _find_kinds(schema: type, key: str) -> tuple[type, ...]:
    """The types of the values of a dotted key of a dataclass: () if any."""
    kinds: Sequence[Any] = [schema]
    for part in re.split(r"[.\[]", key):
        kind = get_args(kinds[0])[0] if part.endswith("]") else get_type_hints(kinds[0])[part]
        kinds = [each for each in get_args(kind) if each is not NoneType] if NoneType in get_args(kind) else [kind]
    return tuple(each for each in (get_origin(kind) or kind for kind in kinds) if each in KIND_NAMES)
