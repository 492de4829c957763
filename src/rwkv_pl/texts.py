"""Settings that are a path or a name. They take the text as written, also if Hydra or YAML reads it as a number.

Hydra would make 20250203 of 2025_02_03, and 100000.0 of 1e5.
"""

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import _utils as omegaconf_utils

from rwkv_pl.config import DATA_PATHS, GROUPS
from rwkv_pl.terminal import quote_override

# The settings that are a path.
PATH_KEYS = (*(f"data.{name}" for name in DATA_PATHS), "weights", "resume", "out", "hydra.run.dir", "hydra.sweep.dir")

# Further settings that are a text, and arguments of any callback and logger.
TEXT_KEYS = (*PATH_KEYS, "data.url", "data.field", "hydra.sweep.subdir", "trainer.max_time")
TEXT_NAMES = (
    "name", "filename", "dirpath", "save_dir", "project", "run_name", "experiment_name", "tracking_uri",
    "id", "run_id", "group", "entity", "job_type", "prefix", "duration", "tensorboard.version",
)  # fmt: skip

# The parts of a value in Hydra's grammar: quoted texts, starts of functions, separators, plain texts.
TOKENS = re.compile(
    r"""'(?:\\.|[^'\\])*' | "(?:\\.|[^"\\])*" | \w+\( | [,()] | (?:\\.|\$\{[^}]*\}|[^,()'"\\])+ | .""", re.X | re.S
)

# The functions of a sweep whose arguments are texts; those of range(), interval() and sort() are numbers.
CHOICES = ("", "choice(", "shuffle(")

# The part of a key that names a corpus of a mix, and the texts in an inline mapping of corpora.
OF_CORPUS = re.compile(r"corpora\.[^.]+\.(?=\w+$)")
IN_CORPORA = re.compile(rf"""(?<=[{{,])(\s*(?:name|url|field|{"|".join(DATA_PATHS)})\s*:\s*)([^,{{}}'"]+)""")

NUMBER_TAGS = tuple(f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "bool"))


def is_text(key: str) -> bool:
    """Whether the setting is a path or a name. key: dotted; its first parts may be missing, as in a group's file."""
    key = OF_CORPUS.sub("", key)
    return f".{key}".endswith(tuple(f".{name}" for name in TEXT_NAMES)) or any(
        f".{known}".endswith(f".{key}") for known in TEXT_KEYS
    )


def take_as_typed(overrides: Sequence[str]) -> list[str]:
    """Quote texts that Hydra would read as numbers or can't parse (non-ASCII ones), and expand ~ in paths."""
    return [_quote_texts(text) for text in _expand_home(overrides)]


def _quote_texts(override: str) -> str:
    key, equals, value = override.partition("=")
    if not equals or key.startswith("-"):
        return override
    if key.startswith("data.corpora"):
        value = IN_CORPORA.sub(lambda found: found[1] + _quote_if_needed(found[2], is_name=True), value)
    is_name = is_text(key) or key in GROUPS or "/" in key
    tokens, functions, quoted = TOKENS.findall(value), [""], ""
    for before, token, after in zip(["", *tokens], tokens, [*tokens[1:], ""], strict=False):
        if token.endswith("("):
            functions.append(token)
        elif token == ")":
            functions = functions[:-1] or [""]
        plain = token.strip()
        is_value = before in ("", ",", functions[-1]) and after in ("", ",", ")")
        is_plain = is_value and functions[-1] in CHOICES and plain[:1] not in ("", *"[{'\",()")
        quoted += _quote_if_needed(token, is_name) if is_plain else token
    return f"{key}={quoted}"


def _quote_if_needed(token: str, is_name: bool) -> str:
    plain = token.strip()
    if plain.isascii() and not (is_name and _reads_as_number(plain)):
        return token
    return quote_override(re.sub(r"\\([\\()\[\]{}:=, \t])", r"\1", plain))


def _reads_as_number(text: str) -> bool:
    try:
        return isinstance(OverridesParser.create().parse_override(f"key={text}").value(), bool | int | float)
    except HydraException:
        return False


def _expand_home(argv: Sequence[str]) -> list[str]:
    """Replace ~ at the start of a path by the home folder: a shell does so only where a word starts with it.

    With several values, or in another setting, ~ stays, and the parser refuses it.
    """

    def expand(text: str) -> str:
        key, _, value = text.partition("=")
        path = value.strip("'\"")
        is_path = OF_CORPUS.sub("", key) in PATH_KEYS
        if not is_path or not re.match(r"~([/\\]|$)", path) or ("," in value and path == value):
            return text
        return f"{key}={quote_override(Path(path).expanduser())}"

    return [expand(text) for text in argv]


@contextlib.contextmanager
def yaml_texts_as_written() -> Iterator[None]:
    """Inside the block, OmegaConf reads paths and names in YAML files as they are written."""
    original = omegaconf_utils.get_yaml_loader

    def get_loader() -> Any:
        class Loader(original()):  # type: ignore[misc]
            def get_single_node(self) -> Any:
                node = super().get_single_node()
                if node is not None:  # an empty file
                    _keep_texts(node, "", set())
                return node

        return Loader

    omegaconf_utils.get_yaml_loader = get_loader
    try:
        yield
    finally:
        omegaconf_utils.get_yaml_loader = original


def _keep_texts(node: Any, key: str, seen: set[int]) -> None:
    if id(node) in seen:  # an alias can contain itself
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            part = str(name.value)
            _keep_texts(value, part if "." in part or not key else f"{key}.{part}", seen)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _keep_texts(value, key, seen)
    elif node.style is None and node.tag in NUMBER_TAGS and (is_text(key) or key.startswith("defaults.")):
        node.tag = yaml.resolver.BaseResolver.DEFAULT_SCALAR_TAG
