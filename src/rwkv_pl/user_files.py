"""The user's own config files, in the folder that --config-dir names."""

import contextlib
import copy
import functools
import os
import re
import sys
from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from hydra._internal import config_loader_impl
from hydra._internal.config_repository import ConfigRepository
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.override_parser.types import Override
from hydra.plugins.config_source import ConfigResult

from rwkv_pl.errors import UserError
from rwkv_pl.terminal import SWEEP_JOB_ENV

# Hydra's names of the source of the user's files: --config-dir, and hydra.searchpath, with which old runs stored it.
USER_PROVIDERS = ("command-line", "hydra.searchpath in command-line")


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


# Parsed files of installed packages, which never change: by package and name. Each job of a sweep is composed alone.
_built_in: dict[tuple[str, str], ConfigResult | None] = {}


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
            found = [source for source in found if source in self.sources]
        try:
            if not found or found[0].scheme() != "pkg":
                return super().load_config(config_path)
            key = found[0].path, config_path
            if key not in _built_in:
                _built_in[key] = super().load_config(config_path)
            return copy.deepcopy(_built_in[key])  # Hydra changes it
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
                raise missing_package_error(name)


def missing_package_error(name: Any) -> UserError:
    return UserError(
        f"experiment={name}: the first line of its file must be '# @package _global_', "
        "or Hydra does not apply its settings"
    )
