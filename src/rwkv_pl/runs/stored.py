"""The settings of a resumed run: its stored config, the changes of earlier resumes, then those given now."""

import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any, cast

import yaml
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, ListConfig, OmegaConf

from rwkv_pl.checks import check_kinds
from rwkv_pl.compose import check_config, compose
from rwkv_pl.config import CORPORA, MIX, Checkpoints, Data, Train, corpus_defaults, read_conf, split_own_arguments
from rwkv_pl.data.documents import exists
from rwkv_pl.errors import UserError, one_line
from rwkv_pl.files import atomic_write, is_outside
from rwkv_pl.overrides import is_group_choice, parse_overrides, require_key
from rwkv_pl.runs.folder import MULTIRUN, has_started
from rwkv_pl.texts import yaml_texts_as_written
from rwkv_pl.user_files import typed_config_dir

# Settings that a resume cannot change. data.path and data.val_path can: the corpus is identified by its content.
FIXED_KEYS = (
    "seed",
    "weights",
    "data.name",
    "data.batch_size",
    "data.ctx_len",
    "data.vocab",
    "data.vocab_size",
    "data.vocab_path",
    "data.dtype",
    "data.split",
    "data.stream",
    "model.name",
    "model.n_layer",
    "model.n_embd",
    "optim._target_",
)

# Settings of a corpus of a mix that a resume can change.
FREE_CORPUS_KEYS = ("path", "val_path", "url")


class StoredRun:
    """A run folder with the settings in its `.hydra/`. Raises UserError if the folder is not a run's."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if folder.is_file():
            raise UserError(f"resume={folder} is a file: give the run's folder")
        if (folder / MULTIRUN).is_file():
            raise UserError(f"resume={folder} is a sweep: to resume it, rwkv-train -m resume={folder}")
        if not (folder / ".hydra" / "config.yaml").is_file():
            raise UserError(f"resume={folder} is not a run folder: it has no .hydra/config.yaml")
        if not has_started(folder):
            raise UserError(f"{folder} was interrupted before its training started: repeat the command that started it")
        try:
            self.first_config = self._read("config.yaml", dict)
            self.hydra = self._read("hydra.yaml", dict)["hydra"]
            self.overrides = [str(text) for text in self._read("overrides.yaml", list)]
            self.resumes = self._read("resumes.yaml", list) if (folder / ".hydra" / "resumes.yaml").exists() else []
            self.cwd = Path(self.hydra["runtime"]["cwd"])
            """The folder where the run first started: relative paths count from there."""
            self.config_dir = typed_config_dir(self.hydra["runtime"]["config_sources"])
            """The --config-dir of the first start."""
            self.config()
        except Exception as error:  # files that were changed by hand can fail in any way
            raise UserError(f"{folder}/.hydra is corrupt: {one_line(error)[:200]}") from error

    def _read(self, name: str, kind: type) -> Any:
        with yaml_texts_as_written():
            content = OmegaConf.to_container(OmegaConf.load(self.folder / ".hydra" / name))
        if not isinstance(content, kind):
            raise TypeError(f"{name} does not contain a {kind.__name__}")
        return content

    def config(self) -> DictConfig:
        """Return the config as of the last resume. A setting that is newer than the run has its default."""
        config = cast(DictConfig, OmegaConf.create(self.first_config))
        add_new_settings(config)
        for entry in self.resumes:
            _apply(config, entry)
        for arguments in (config.get("callbacks") or {}).values():
            # Earlier versions took any name; best.ckpt is written now, whatever the name.
            name, is_best = str(arguments.get("filename")), str(arguments.get("_target_")).endswith(".BestCheckpoint")
            if is_best and "{step" not in name and not is_outside(name, self.folder):
                arguments.filename = "best"
        add_corpus_defaults(config)
        config.plugins = []  # they must be typed at each resume
        return config

    def _compose(self, texts: list[str]) -> DictConfig:
        """Compose the config from all overrides of the run; drop the values of a file that is no longer chosen."""
        overrides = [o for o in parse_overrides(texts) if not o.key_or_group.startswith(("hydra", "plugins"))]
        choices = compose([o.input_line or "" for o in overrides if is_group_choice(o)], self.config_dir)

        def is_known(override: Override) -> bool:
            return is_group_choice(override) or OmegaConf.select(choices, override.key_or_group, default=...) is not ...

        return compose([o.input_line or "" for o in overrides if is_known(o)], self.config_dir)

    def apply_overrides(self, later: Sequence[Override]) -> tuple[Train, dict[str, Any]]:
        """Return the checked config with later overrides, and the entry for resumes.yaml. Raises UserError."""
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
        for key in values:
            require_key(key, config, is_resume=True)
        # Typed paths are relative to the folder of this command, not of the run's start.
        values = {key: make_absolute(key, value) for key, value in values.items()}
        _apply(config, {"remove": [], "set": values})
        add_corpus_defaults(config)
        entry["set"] |= values
        was, now = _fixed_settings(before), _fixed_settings(config)
        for key in was | now:
            old, new = was.get(key), now.get(key)
            if old != new:
                raise UserError(
                    f"{key}={new} contradicts the past of {self.folder}, which has {key}={old}: start a new run instead"
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
        """Append the changes of this resume to .hydra/resumes.yaml; the files of the first start stay unchanged."""
        self.resumes.append({"time": time.strftime("%Y-%m-%d %H:%M:%S"), **entry})
        with atomic_write(self.folder / ".hydra" / "resumes.yaml") as file:
            file.write(yaml.safe_dump(self.resumes, sort_keys=False).encode())


def require_inside_run_folder(config: Train, folder: Path, typed: Collection[str] = ()) -> None:
    """Raise UserError if a callback or logger would write outside of the run folder, unless its key is in `typed`."""

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
                raise UserError(f"{key}={text} is outside of {folder}: type it again if you trust this run")


def require_no_download(data: Data, cwd: Path, typed: Collection[str] = ()) -> None:
    """Raise UserError if a stored run's corpus must be downloaded, unless its folder and URL are in `typed`.

    Untrusted settings could name any folder to write in, and send environment variables in the URL.
    """
    for name, part in data.parts().items():
        if part.name != "enwik8" or part.path is None:
            continue
        folder = cwd / part.path
        if not any((folder / file).exists() for file in ("enwik8", "enwik8.zip")):
            where = f"data.corpora.{name}" if name else "data"
            settings = {f"{where}.path": part.path, f"{where}.url": part.url}
            missing = [f"{key}={value}" for key, value in settings.items() if key not in typed and value]
            if missing:
                raise UserError(
                    f"{folder} has no enwik8; to download it, if you trust this run, type {' '.join(missing)}"
                )


def add_new_settings(config: DictConfig) -> None:
    """Give a stored config the settings that are newer than its run, at their defaults: a resume can then set them."""
    newer: dict[str, Any] = {of.name: of.default for of in fields(Train) if of.default is not MISSING}
    newer |= {f"checkpoints.{key}": value for key, value in asdict(Checkpoints()).items()}
    if (name := OmegaConf.select(config, "data.name")) in (*CORPORA, MIX):
        of_type = read_conf(f"data/{name}.yaml")
        newer |= {f"data.{of.name}": of.default for of in fields(Data) if of.name in of_type.keys() - {"split"}}
    for key, value in newer.items():
        if OmegaConf.select(config, key, default=...) is ...:
            OmegaConf.update(config, key, value, force_add=True)


def add_corpus_defaults(config: DictConfig) -> None:
    """Give each corpus of a mix the settings of its type that its file leaves out: a resume can then set them."""
    corpora = OmegaConf.select(config, "data.corpora") if OmegaConf.select(config, "data.name") == MIX else None
    for given in corpora.values() if isinstance(corpora, DictConfig) else ():
        if isinstance(given, DictConfig):
            for key, value in corpus_defaults(given.get("name", "text")).items():
                given.setdefault(key, value)


def _fixed_settings(config: DictConfig) -> dict[str, Any]:
    """Return the settings that a resume cannot change."""
    found = {key: OmegaConf.select(config, key) for key in FIXED_KEYS}
    corpora = OmegaConf.select(config, "data.corpora")
    is_mapping = isinstance(corpora, DictConfig)
    found["data.corpora"] = [str(name) for name in corpora] if is_mapping else corpora
    for key, value in flatten(corpora, "data.corpora.").items() if is_mapping else ():
        if key.rpartition(".")[2] not in FREE_CORPUS_KEYS:
            found[key] = value
    return found


def make_absolute(key: str, value: Any) -> Any:
    """Make the path of a text absolute if it exists in the current folder. value: of a setting, or of a mapping."""
    if isinstance(value, dict):
        return {name: make_absolute(f"{key}.{name}", inner) for name, inner in value.items()}
    is_path = key.startswith("data.") and key.rpartition(".")[2] in ("path", "val_path")
    return str(Path(str(value)).absolute()) if is_path and value and exists(Path(str(value))) else value


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten a config to dotted keys and their values, without Hydra's own part."""
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


def normalize_value(value: Any) -> Any:
    """Convert a setting so that equal values compare as equal: 0 and 0.0, or up to rounding, but not 1 and true."""
    if isinstance(value, list | ListConfig):
        return [normalize_value(each) for each in value]
    if isinstance(value, dict | DictConfig):
        return {key: normalize_value(each) for key, each in value.items()}
    return repr(value) if isinstance(value, bool) or not isinstance(value, int | float) else f"{value:.15g}"


def _apply(config: DictConfig, entry: dict[str, Any]) -> None:
    for key in entry["remove"]:
        while key:
            parent, _, name = key.rpartition(".")
            node = OmegaConf.select(config, parent) if parent else config
            if isinstance(node, DictConfig):
                node.pop(name, None)
            # A mapping that is now empty is removed too.
            key = "" if node else parent
    for key, value in entry["set"].items():
        OmegaConf.update(config, key, value, merge=False, force_add=True)
