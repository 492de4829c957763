"""Parses the overrides of a command line, key=value, and explains the wrong ones."""

import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, Override
from hydra.errors import HydraException
from omegaconf import DictConfig

from rwkv_pl.checks import suggest_key
from rwkv_pl.config import CONFIG_MODULE, GROUPS, check_trainer, corpus_defaults, read_conf, split_own_arguments
from rwkv_pl.errors import UserError, one_line

# The groups of which several files can be chosen, and the file that conf/train.yaml chooses.
FIRST_FILE = {"callbacks": "default", "logger": "tensorboard"}


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


def is_group_choice(override: Override) -> bool:
    """Whether the override chooses a file (schedule=cosine) rather than sets a value."""
    return override.key_or_group in GROUPS or "/" in override.key_or_group


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


def trainer_defaults() -> dict[str, Any]:
    """Read conf/trainer/default.yaml."""
    return read_conf("trainer/default.yaml")
