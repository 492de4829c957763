"""Classes that a config names by `_target_`: from a few known modules, or from a module that the user has named.

`plugins=[mypkg]` counts on the command line, and a line of the user's own `plugins` file counts for every command. A
YAML file, a stored run and a stored sweep cannot name one, since importing a module runs its code.
"""

import os
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from rwkv_pl.checks import suggest_key
from rwkv_pl.errors import UserError, one_line

# By group; `_target_` is one of these modules and exactly one more name.
TARGET_MODULES = {
    "optim": ("torch.optim", "rwkv_pl.training.muon"),
    "callbacks": (
        "lightning.pytorch.callbacks",
        "rwkv_pl.training.callbacks.checkpoints",
        "rwkv_pl.training.callbacks.sample_text",
    ),
    "logger": ("lightning.pytorch.loggers",),
}

# Classes that have moved, by the names that stored runs have for them.
MOVED = {
    "rwkv_pl.training.checkpoints.BestCheckpoint": "rwkv_pl.training.callbacks.checkpoints.BestCheckpoint",
    "rwkv_pl.training.checkpoints.LastCheckpoint": "rwkv_pl.training.callbacks.checkpoints.LastCheckpoint",
    "rwkv_pl.training.sample.SampleText": "rwkv_pl.training.callbacks.sample_text.SampleText",
}

# The class that a group's classes derive from.
BASES = {
    "optim": ("torch.optim", "Optimizer"),
    "callbacks": ("lightning.pytorch", "Callback"),
    "logger": ("lightning.pytorch.loggers", "Logger"),
}


def user_plugins_file() -> Path:
    """Modules that every command of this user may load classes from, one a line."""
    import platformdirs

    folder = os.environ.get("RWKV_PL_CONFIG") or platformdirs.user_config_path("rwkv_pl", appauthor=False)
    return Path(folder) / "plugins"


def trusted_modules(typed: Any = None) -> list[str]:
    """The modules of a typed `plugins=` value, a name or a list of names, then those of the user's own file."""
    names = typed if isinstance(typed, list) else [] if typed in (None, "") else [typed]
    found = [(str(name), f"plugins={name}") for name in names]
    file = user_plugins_file()
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        lines = []
    except (OSError, UnicodeError) as error:
        raise UserError(f"{file} can't be read: {one_line(error)}") from error
    found += [(name, f"{file}: {name}") for line in lines if (name := line.partition("#")[0].strip())]
    for name, where in found:
        if not all(part.isidentifier() for part in name.split(".")):
            raise UserError(f"{where} is not the name of a module, such as mypkg or mypkg.callbacks")
    return list(dict.fromkeys(name for name, _ in found))


def find_targets(plain: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Every `_target_` of a config, with the dotted key of the mapping that holds it."""
    if isinstance(plain, dict):
        for key, value in plain.items():
            if key == "_target_":
                yield where, value
            else:
                yield from find_targets(value, f"{where}.{key}" if where else str(key))
    elif isinstance(plain, list):
        for i, value in enumerate(plain):
            yield from find_targets(value, f"{where}[{i}]")


def check_target(where: str, target: Any, plugins: Sequence[str] = ()) -> None:
    """Raises UserError unless `target` is one name in a module of its group or of `plugins`. Imports nothing."""
    group, *inside = where.split(".")
    modules = TARGET_MODULES.get(group, ())
    if not modules or len(inside) != (0 if group == "optim" else 1):
        raise UserError(f"{where}._target_ is not a setting: classes are named in optim, callbacks and logger alone")
    module, _, name = str(target).rpartition(".")
    if module not in (*modules, *plugins) or not name.isidentifier():
        own = name.isidentifier() and module and all(part.isidentifier() for part in module.split("."))
        hint = f"; to load a class of your own, which runs its code, add plugins=[{module}]" if own else ""
        raise UserError(f"{where}._target_ must be a class of {' or '.join(modules)}, got {target}{hint}")
    if name == "CSVLogger":
        raise UserError(f"{where}._target_={target} is not used: metrics.csv is always there, and it would delete that")


def load_class(where: str, target: str) -> type:
    """The class that a checked `_target_` names, of its group's kind. Raises UserError, also for what importing it
    raises."""
    module, _, name = target.rpartition(".")
    try:
        namespace = import_module(module)
    except ModuleNotFoundError as error:
        missing = f"there is no module {error.name}: install it, or add its folder to PYTHONPATH"
        raise UserError(f"{where}._target_={target}: {missing}") from error
    except Exception as error:  # what a module of the user's own raises
        raise UserError(
            f"{where}._target_={target} can't be imported: {type(error).__name__}: {one_line(error)}"
        ) from error
    found = getattr(namespace, name, None)
    base_module, base_name = BASES[where.partition(".")[0]]
    base = getattr(import_module(base_module), base_name)
    if not isinstance(found, type):
        there = [key for key, value in vars(namespace).items() if isinstance(value, type) and issubclass(value, base)]
        raise UserError(
            f"{where}._target_={target} is not a class of {module}{suggest_key(name, there) if there else ''}"
        )
    if not issubclass(found, base):
        raise UserError(f"{where}._target_={target} is not a {base_module}.{base_name}")
    return found
