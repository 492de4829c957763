"""The settings of a resumed run: its stored config, the changes of earlier resumes, then those given now."""

import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, cast

import yaml
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from rwkv_pl.checks import check_kinds
from rwkv_pl.compose import check_config, compose, is_group_choice, parse_overrides, require_key, typed_config_dir
from rwkv_pl.config import Data, Train, split_own_arguments
from rwkv_pl.data.documents import exists
from rwkv_pl.errors import UserError, one_line
from rwkv_pl.files import atomic_write, is_outside
from rwkv_pl.runs.folder import has_started

# What contradicts the past of a run. (data.path and data.val_path may change: the corpus is known by its content.)
FIXED_KEYS = (
    "seed",
    "weights",
    "data.name",
    "data.batch_size",
    "data.ctx_len",
    "data.vocab",
    "data.vocab_path",
    "data.split",
    "model.name",
    "model.n_layer",
    "model.n_embd",
    "optim._target_",
)


class StoredRun:
    """A run folder with its `.hydra/`. Raises UserError where it is none."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if folder.is_file():
            raise UserError(f"resume={folder} is a file: give the run's folder")
        if (folder / "multirun.yaml").is_file():
            raise UserError(f"resume={folder} is a sweep: rwkv-train -m resume={folder} goes on with it")
        if not (folder / ".hydra" / "config.yaml").is_file():
            raise UserError(f"resume={folder} is no run folder: it holds no .hydra/config.yaml")
        if not has_started(folder):
            raise UserError(f"{folder} was broken off before its run began: start it by the same command as then")
        try:
            self.first_config = self._read("config.yaml", dict)
            self.hydra = self._read("hydra.yaml", dict)["hydra"]
            self.overrides = [str(text) for text in self._read("overrides.yaml", list)]
            self.resumes = self._read("resumes.yaml", list) if (folder / ".hydra" / "resumes.yaml").exists() else []
            self.cwd = Path(self.hydra["runtime"]["cwd"])
            """Where the run first started: relative paths count from there."""
            self.config_dir = typed_config_dir(self.hydra["runtime"]["config_sources"])
            """The --config-dir of the first start."""
            self.config()
        except Exception as error:  # what is not what was written can fail in any way
            raise UserError(f"{folder}/.hydra is damaged: {one_line(error)[:200]}") from error

    def _read(self, name: str, kind: type) -> Any:
        content = OmegaConf.to_container(OmegaConf.load(self.folder / ".hydra" / name))
        if not isinstance(content, kind):
            raise TypeError(f"{name} holds no {kind.__name__}")
        return content

    def config(self) -> DictConfig:
        """As of the last resume. A setting that was not there when the run started has its default."""
        defaults = {field.name: field.default for field in fields(Train) if field.default is not MISSING}
        config = cast(DictConfig, OmegaConf.create(defaults | self.first_config))
        for entry in self.resumes:
            _apply(config, entry)
        config.plugins = []  # whoever resumes the run types them
        return config

    def _compose(self, texts: list[str]) -> DictConfig:
        """Of all overrides that the run ever had; values of a file that is no longer chosen are dropped with it."""
        overrides = [o for o in parse_overrides(texts) if not o.key_or_group.startswith(("hydra", "plugins"))]
        choices = compose([o.input_line or "" for o in overrides if is_group_choice(o)], self.config_dir)

        def is_known(override: Override) -> bool:
            return is_group_choice(override) or OmegaConf.select(choices, override.key_or_group, default=...) is not ...

        return compose([o.input_line or "" for o in overrides if is_known(o)], self.config_dir)

    def apply_overrides(self, later: Sequence[Override]) -> tuple[Train, dict[str, Any]]:
        """The config with later overrides, checked, and what is to be kept of them. Raises UserError."""
        before = self.config()
        config = self.config()
        plugins = [override for override in later if override.key_or_group == "plugins"]
        later = [override for override in later if override not in plugins]
        entry: dict[str, Any] = {"overrides": [o.input_line for o in later], "remove": [], "set": {}}
        choices = [override for override in later if is_group_choice(override)]
        if choices:
            texts = self.overrides + [text for earlier in self.resumes for text in earlier["overrides"]]
            then = flatten(self._compose(texts))
            now = flatten(self._compose(texts + [o.input_line or "" for o in choices]))
            entry["remove"] = sorted(then.keys() - now.keys())
            entry["set"] = {key: value for key, value in now.items() if key not in then or then[key] != value}
        _apply(config, entry)
        values = {o.key_or_group: o.value() for o in later if not is_group_choice(o)}
        for key in ("data.path", "data.val_path"):
            path = str(values.get(key) or "")
            if path and exists(Path(path)):
                values[key] = str(Path(path).absolute())  # typed here and now, wherever the run began
        for key in values:
            require_key(key, config)
        _apply(config, {"remove": [], "set": values})
        entry["set"] |= values
        for key in FIXED_KEYS:
            old, new = OmegaConf.select(before, key), OmegaConf.select(config, key)
            if old != new:
                raise UserError(
                    f"{key}={new} contradicts the past of {self.folder}, which has {key}={old}: start a new run for it"
                )
        checked = check_config(config, [*later, *plugins], self.config_dir)
        check_kinds(
            "optim",
            checked.optim.own,
            split_own_arguments(cast(dict[str, Any], OmegaConf.to_container(before.optim)))[1],
        )
        require_inside_run_folder(checked, self.folder, set(values))
        require_no_download(checked.data, self.cwd, set(values))
        return checked, entry

    def append_resume(self, entry: dict[str, Any]) -> None:
        """Appends what this resume changed to .hydra/resumes.yaml; the first start's files stay as they are."""
        self.resumes.append({"time": time.strftime("%Y-%m-%d %H:%M:%S"), **entry})
        with atomic_write(self.folder / ".hydra" / "resumes.yaml") as file:
            file.write(yaml.safe_dump(self.resumes, sort_keys=False).encode())


def require_inside_run_folder(config: Train, folder: Path, typed: Collection[str] = ()) -> None:
    """Raises UserError if a callback or logger would write outside of the run's folder and that is not typed now."""

    def strings(value: Any, key: str) -> Iterator[tuple[str, str]]:
        if isinstance(value, str):
            yield key, value
        elif isinstance(value, dict):
            for name, inner in value.items():
                yield from strings(inner, f"{key}.{name}")
        elif isinstance(value, list):
            for inner in value:
                yield from strings(inner, key)

    for group in ("callbacks", "logger"):
        for key, text in strings(getattr(config, group), group):
            if key not in typed and not key.endswith("._target_") and is_outside(text, folder, key):
                raise UserError(f"{key}={text} leads out of {folder}: type it again if you trust this run")


def require_no_download(data: Data, cwd: Path, typed: Collection[str] = ()) -> None:
    """Raises UserError if a stored run's corpus is to be downloaded, unless the folder and the URL are typed now.

    Whoever wrote the settings could name any folder to write in, and have environment variables in the URL.
    """
    if data.name != "enwik8" or data.path is None:
        return
    folder = cwd / data.path
    if not any((folder / name).exists() for name in ("enwik8", "enwik8.zip")):
        missing = [key for key in ("data.path", "data.url") if key not in typed and getattr(data, key[5:])]
        if missing:
            how = " ".join(f"{key}={getattr(data, key[5:])}" for key in missing)
            raise UserError(f"{folder} has no enwik8; to download it, if you trust this run, type {how}")


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key to value, Hydra's own part left out."""
    if isinstance(config, DictConfig):
        config = OmegaConf.to_container(config)
    found: dict[str, Any] = {}
    for key, value in config.items():
        if prefix == "" and key == "hydra":
            continue
        if isinstance(value, dict) and value:
            found |= flatten(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _apply(config: DictConfig, entry: dict[str, Any]) -> None:
    for key in entry["remove"]:
        while key:
            parent, _, name = key.rpartition(".")
            node = OmegaConf.select(config, parent) if parent else config
            if isinstance(node, DictConfig):
                node.pop(name, None)
            # A mapping goes with the last that it held.
            key = "" if node else parent
    for key, value in entry["set"].items():
        OmegaConf.update(config, key, value, merge=False, force_add=True)
