"""--explain: every setting with its value, its kind and the comment of its YAML file.

`python -m rwkv_pl.cli.explain` prints docs/guides/settings.md.
"""

import itertools
import re
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from types import NoneType
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from rwkv_pl.checks import KIND_NAMES
from rwkv_pl.compose import CONFIG_MODULE, compose, to_plain_dict
from rwkv_pl.config import GROUPS, TRAINER_KINDS, TRAINER_NULLABLE, Data, Eval, Model, Optim, Schedule, Train
from rwkv_pl.errors import UserError, one_line
from rwkv_pl.overrides import require_key
from rwkv_pl.runs.stored import flatten
from rwkv_pl.terminal import console

# Groups of a sweep's own settings.
HYDRA_GROUPS = ("hydra/launcher", "hydra/sweeper")
SCHEMAS = {"data": Data, "model": Model, "optim": Optim, "schedule": Schedule}
# A key is the name of a callback or logger, so that the files of the group share no key.
NAMED_GROUPS = ("callbacks", "logger")


class Setting(typing.NamedTuple):
    """key: dotted, as typed. value: as YAML. kind: in words."""

    key: str
    value: str
    kind: str
    comment: str


@dataclass(frozen=True)
class ConfigFile:
    """A file of a group. head: the comment at its top, one line per paragraph; the commands in it are indented.
    comments: by dotted key, those of its defaults included. values: those that the file sets itself.
    choices: the files that it chooses, by group: the `override` lines of its defaults.
    """

    name: str
    head: str
    comments: dict[str, str]
    values: dict[str, Any]
    choices: dict[str, Any]

    @property
    def summary(self) -> str:
        """The first sentence of the head."""
        return re.split(r"(?<=[.?!])\s|\n", self.head, maxsplit=1)[0]

    @property
    def choices_line(self) -> str:
        return " ".join(f"{group}={to_yaml(name)}" for group, name in self.choices.items())


def print_settings(topic: str, overrides: Sequence[str], config_dir: str | None, name: str = "train") -> None:
    """Prints the settings of a group, or of a key, or all if `topic` is empty. Raises UserError for another topic."""
    config = compose(overrides, config_dir, name)
    folders = [resources.files(CONFIG_MODULE), *([Path(config_dir)] if config_dir else [])]
    known = (*GROUPS, *HYDRA_GROUPS) if name == "train" else ("data",)
    groups = {group: read_group(folders, group) for group in known}
    plain = to_plain_dict(config)
    settings = {group: list_settings(config, plain, group, files, name) for group, files in {"": {}, **groups}.items()}
    if topic and topic not in groups:
        if "." not in topic and topic not in config:
            require_key(topic, {key: config.get(key) for key in dict.fromkeys([*config, *groups])})
        settings.pop("experiment", None)
        found: list[tuple[str, ...]] = [s for each in settings.values() for s in each if _is_below(s.key, topic)]
        if not found:  # a key of files that are not chosen
            found = [
                (f"{group}={file.name}", *setting)
                for group, files in groups.items()
                for file in files.values()
                for setting in _describe(group, file.values, file.comments, name)
                if _is_below(setting.key, topic)
            ]
        if not found:
            require_key(topic, config)
            value = OmegaConf.select(config, topic)
            found = [(topic, to_yaml(OmegaConf.to_container(value) if OmegaConf.is_config(value) else value))]
        _print_table(found)
        return
    for group in [topic] if topic else ["", *groups]:
        files, choice = groups.get(group, {}), _choice(config, group)
        if group:
            head = files[choice].head.replace("\n", "\n  ") if choice in files else ""
            print(f"\n{group}={choice or 'NAME'}  {head}".rstrip())
        _print_table(settings[group])
        if topic or group == "experiment":
            print("  files:")
            _print_table([(f"{group}={name}", file.summary, file.choices_line) for name, file in files.items()])
    if not topic:
        print("\n--explain GROUP lists the files of a group, --explain GROUP=FILE the settings of a file.")


def _is_below(key: str, topic: str) -> bool:
    return f"{key}.".startswith(f"{topic}.")


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for i in range(max((len(row) for row in rows), default=0)):
        table.add_column(no_wrap=i == 0, overflow="fold")
    for row in rows:
        table.add_row(*(Text(("  " if i == 0 else "") + cell) for i, cell in enumerate(row)))
    if rows:
        screen = console()
        with screen.capture() as printed:
            screen.print(table)
        print("\n".join(line.rstrip() for line in printed.get().splitlines()))  # rich pads every line


def _choice(config: DictConfig, group: str) -> str | None:
    """The file of the group, or the files; None if the config has no such group."""
    if group in NAMED_GROUPS and group in config:
        return ",".join(str(name) for name in config[group]) or "none"
    return OmegaConf.select(config, f"hydra.runtime.choices.{group}")


def list_settings(
    config: DictConfig, plain: dict[str, Any], group: str, files: dict[str, ConfigFile], name: str = "train"
) -> list[Setting]:
    """The settings of a group as composed; group "": those that are in no group. plain: the config in plain types."""
    choice = _choice(config, group)
    if group == "experiment":
        return _list_experiment(files[choice]) if choice in files else []
    if group == "":
        comments = read_file([resources.files(CONFIG_MODULE)], "", name).comments
        return _describe(group, {key: value for key, value in plain.items() if key not in GROUPS}, comments, name)
    shown = files.values() if group in NAMED_GROUPS else [files[choice]] if choice in files else []
    comments = {key: text for file in shown for key, text in file.comments.items()}
    own: Any = (
        OmegaConf.to_container(OmegaConf.select(config, group.replace("/", "."))) if "/" in group else plain[group]
    )
    return _describe(group, own, comments, name)


def _describe(group: str, values: dict[str, Any], comments: dict[str, str], name: str = "train") -> list[Setting]:
    prefix = group.replace("/", ".")
    settings = []
    for key, value in (flatten(values) if group in NAMED_GROUPS else values).items():
        if not key.endswith("_target_") or group == "optim":
            kind = describe_kind(group, key, value, name)
            settings.append(Setting(f"{prefix}.{key}".lstrip("."), to_yaml(value), kind, comments.get(key, "")))
    return settings


def _list_experiment(file: ConfigFile) -> list[Setting]:
    values = file.choices | flatten(file.values) | flatten(file.values.get("hydra") or {}, "hydra.")
    return [Setting(key, to_yaml(value), "", "") for key, value in values.items()]


def to_yaml(value: Any) -> str:
    """A value as YAML, on one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False).removesuffix("...\n").strip()


def describe_kind(group: str, key: str, value: Any, name: str = "train") -> str:
    """The kinds of values that a setting takes, in words."""
    schema = SCHEMAS.get(group) or ((Eval if name == "eval" else Train) if group == "" else None)
    hints = typing.get_type_hints(schema) if schema else {}
    if key in hints:
        kinds = typing.get_args(hints[key]) if NoneType in typing.get_args(hints[key]) else (hints[key],)
    elif group == "trainer" and key in TRAINER_KINDS:
        nullable = value is None or key in TRAINER_NULLABLE
        kinds = (*TRAINER_KINDS[key], *([NoneType] if nullable else []))
    else:
        kinds = (type(value),)
    words = [KIND_NAMES.get(typing.get_origin(kind) or kind, "any") for kind in kinds if kind is not NoneType]
    return " or ".join(words + ["null"] * (NoneType in kinds)) if words else "any"


def read_group(folders: Sequence[Any], group: str) -> dict[str, ConfigFile]:
    """The files of a group by name, those of later folders first of all."""
    files: dict[str, ConfigFile] = {}
    for folder in folders if group else ():
        place = folder.joinpath(*group.split("/"))
        if place.is_dir():
            names = sorted(file.name.removesuffix(".yaml") for file in place.iterdir() if file.name.endswith(".yaml"))
            files |= {name: read_file(folders, group, name) for name in names}
    return files


def read_file(folders: Sequence[Any], group: str, name: str) -> ConfigFile:
    """Reads a file's comments, and those of the files of the same group in its `defaults`.

    The file is that of the last folder that has it. Raises UserError if it is not a mapping in YAML.
    """
    path = _find_file(folders, group, name)
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    comments: dict[str, str] = {}
    try:
        values = yaml.safe_load(text) or {}
        if not isinstance(values, dict):
            raise UserError(f"{path} must be a mapping of settings, got {one_line(values)[:80]}")
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {one_line(error)}") from error
    choices: dict[str, Any] = {}
    for default in (values.pop("defaults", None) or []) if group else ():
        if isinstance(default, dict):
            choices |= {key.split()[-1].lstrip("/"): name for key, name in default.items()}
        elif _find_file(folders, group, default):  # of the same group, and not _self_
            comments |= read_file(folders, group, default).comments
    if isinstance(root := yaml.compose(text), yaml.MappingNode):
        comments |= dict(_comments_of(root, lines))
    head = [line for line in itertools.takewhile(lambda line: line.startswith("#"), lines) if "@package" not in line]
    return ConfigFile(name, _join_lines(head), comments, values, choices)


def _find_file(folders: Sequence[Any], group: str, name: str) -> Any:
    parts = [part for part in group.split("/") if part]
    places = [folder.joinpath(*parts, f"{name}.yaml") for folder in folders]
    return next((place for place in reversed(places) if place.is_file()), None)


def _join_lines(lines: Sequence[str]) -> str:
    """The lines of a comment as paragraphs: a command, which is indented, is a line; addresses come last."""
    paragraphs: list[str] = []
    for line in sorted(lines, key=lambda line: line.startswith("# http")):
        is_command = line.startswith("#  ")
        if is_command or not paragraphs or paragraphs[-1].startswith(" "):
            paragraphs.append(("  " if is_command else "") + line.lstrip("# "))
        else:
            paragraphs[-1] += f" {line.lstrip('# ')}"
    return "\n".join(paragraphs)


def _comments_of(node: yaml.MappingNode, lines: list[str], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The comment after each value, with the lines below it that hold a comment alone and are indented further."""
    for key, value in node.value:
        name = f"{prefix}{key.value}"
        block = isinstance(value, yaml.MappingNode) and not value.flow_style
        end = key.end_mark if block else value.end_mark
        rest = lines[end.line][end.column :] if end.line < len(lines) else ""
        if comment := re.match(r"\s*#\s*(.*)", rest):
            words = [comment[1]]
            for line in lines[end.line + 1 :]:
                further = re.fullmatch(r"(\s+)#\s*(.*)", line)
                if not further or len(further[1]) <= key.start_mark.column:
                    break
                words.append(further[2])
            yield name, " ".join(words)
        if block:
            yield from _comments_of(value, lines, f"{name}.")


HEAD = """# Settings

Generated by `python -m rwkv_pl.cli.explain` from the files in [conf/](../../conf). `rwkv-train --explain` prints the
same for the settings that you type. A setting is typed as `key=value`, a file of a group as `group=file`. An experiment
is listed with the files that it chooses, then its settings.
"""


def markdown() -> str:
    """docs/guides/settings.md."""
    conf, config = resources.files(CONFIG_MODULE), compose([])
    text = [HEAD, "## Without a group\n", *_rows(list_settings(config, to_plain_dict(config), "", {}))]
    for group in (*GROUPS, *HYDRA_GROUPS):
        text.append(f"## {group}\n")
        for name, file in read_group([conf], group).items():
            text += _paragraphs(f"**`{group}={name}`**: ", file.head)
            if group == "experiment":
                text += ["```text", *(f"{s.key}={s.value}" for s in _list_experiment(file)), "```\n"]
            else:
                text += _rows(_describe(group, file.values, file.comments))
    return "\n".join(text).rstrip("\n") + "\n"


def _rows(settings: Sequence[Setting]) -> list[str]:
    if not settings:
        return []
    rows = [f"| `{s.key}` | `{s.value}` | {s.kind} | {_cell(s.comment)} |" for s in settings]
    return ["| setting | value | kind | meaning |", "|---|---|---|---|", *rows, ""]


def _paragraphs(title: str, head: str) -> list[str]:
    """The head of a file, with its commands in blocks of code."""
    parts: list[str] = []
    for is_command, group in itertools.groupby(head.splitlines(), lambda line: line.startswith(" ")):
        lines = [line.strip() for line in group]
        parts += ["```bash", *lines, "```\n"] if is_command else [_cell(" ".join(lines)) + "\n"]
    return [title + parts[0], *parts[1:]]


def _cell(text: str) -> str:
    """Text as Markdown: settings (key=value, key=) as code, the rest escaped."""
    parts = re.split(r"('[\w./]+=[^']+'|\b[a-z][\w./]*=(?:[\w./-]*\w)?)", text)
    return "".join(f"`{part}`" if i % 2 else re.sub(r"([|<*])", r"\\\1", part) for i, part in enumerate(parts))


if __name__ == "__main__":
    print(markdown(), end="")
