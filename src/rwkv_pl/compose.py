"""Composes the config with Hydra and checks it.

Only Hydra and the standard library are imported here, so that a mistake is reported before anything heavy is loaded.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import fields
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rwkv_pl.checks import KIND_NAMES, check_kind, check_kinds, suggest_key
from rwkv_pl.config import CONFIG_MODULE, GROUPS, Train, check_trainer, split_own_arguments
from rwkv_pl.errors import UserError, one_line
from rwkv_pl.overrides import is_group_choice, parse_overrides, require_key, trainer_defaults
from rwkv_pl.targets import MOVED, check_target, find_targets, trusted_modules
from rwkv_pl.terminal import quote_override
from rwkv_pl.texts import yaml_texts_as_written
from rwkv_pl.user_files import missing_package_error, prefer_user_files, require_global_package

# For a number in a config that depends on another: ${divide:1.5,${model.n_embd}}
OmegaConf.register_new_resolver("divide", lambda a, b: a / b, replace=True)

# For a file inside conf/, wherever it is installed: ${conf:experiment/debug.txt}
OmegaConf.register_new_resolver("conf", lambda name: str(resources.files(CONFIG_MODULE) / name), replace=True)

Schema = TypeVar("Schema")

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
        raise missing_package_error(OmegaConf.select(config, "hydra.runtime.choices.experiment"))
    if plain.keys() - {of.name for of in fields(Train)}:
        require_global_package(overrides, config_dir)
    common, own = split_own_arguments(plain["optim"])
    return to_dataclass(plain | {"optim": common | {"own": own}}, Train)


def to_plain_dict(config: DictConfig) -> dict[str, Any]:
    """Convert a composed config to plain types, without Hydra's part. Raises UserError if an interpolation fails."""
    config = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    try:
        return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise UserError(one_line(error)) from error


def to_dataclass(plain: dict[str, Any], schema: type[Schema]) -> Schema:
    """Convert `plain` to the dataclass `schema`. Raises UserError with the key, its value and the allowed values."""
    for of in fields(schema):  # type: ignore[arg-type]
        if of.type is bool and of.name in plain:  # OmegaConf accepts any number as true
            check_kind(of.name, plain[of.name], (bool,))
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


def _find_kinds(schema: type, key: str) -> tuple[type, ...]:
    """The types of the values of a dotted key of a dataclass: () if any."""
    kinds: Sequence[Any] = [schema]
    for part in re.split(r"[.\[]", key):
        kind = get_args(kinds[0])[0] if part.endswith("]") else get_type_hints(kinds[0])[part]
        kinds = [each for each in get_args(kind) if each is not NoneType] if NoneType in get_args(kind) else [kind]
    return tuple(each for each in (get_origin(kind) or kind for kind in kinds) if each in KIND_NAMES)
