"""Classes that a config names as `_target_`: from a few trusted modules, or from a module that the user trusts.

The user trusts a module with `plugins=[mypkg]` on the command line, or for every command with a line in the user's
`plugins` file. A YAML file, a stored run or a stored sweep cannot do that, because importing a module runs its code.
"""

import os
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from rwkv_pl.checks import suggest_key
from rwkv_pl.errors import UserError, one_line

# Trusted modules by group. `_target_` is one of these modules, a dot and the name of a class.
TARGET_MODULES = {
    "optim": ("torch.optim", "rwkv_pl.training.muon"),
    "callbacks": (
        "lightning.pytorch.callbacks",
        "rwkv_pl.training.callbacks.checkpoints",
        "rwkv_pl.training.callbacks.sample_text",
        "rwkv_pl.training.callbacks.weight_averaging",
    ),
    "logger": ("lightning.pytorch.loggers",),
}

# New names of moved and replaced classes, by the old names, which stored runs may have.
MOVED = {
    "lightning.pytorch.callbacks.EMAWeightAveraging": "rwkv_pl.training.callbacks.weight_averaging.EMAWeightAveraging",
    "lightning.pytorch.callbacks.WeightAveraging": "rwkv_pl.training.callbacks.weight_averaging.WeightAveraging",
    "rwkv_pl.training.checkpoints.BestCheckpoint": "rwkv_pl.training.callbacks.checkpoints.BestCheckpoint",
    "rwkv_pl.training.checkpoints.LastCheckpoint": "rwkv_pl.training.callbacks.checkpoints.LastCheckpoint",
    "rwkv_pl.training.sample.SampleText": "rwkv_pl.training.callbacks.sample_text.SampleText",
}

# The base class of each group's classes.
BASES = {
    "optim": ("torch.optim", "Optimizer"),
    "callbacks": ("lightning.pytorch", "Callback"),
    "logger": ("lightning.pytorch.loggers", "Logger"),
}


def user_plugins_file() -> Path:
    """Return the path of the user's `plugins` file, which lists one trusted module per line."""
    import platformdirs

    folder = os.environ.get("RWKV_PL_CONFIG") or platformdirs.user_config_path("rwkv_pl", appauthor=False)
    return Path(folder) / "plugins"


def trusted_modules(typed: Any = None) -> list[str]:
    """Return the modules of a typed `plugins=` value (a name or a list of names) and of the user's `plugins` file."""
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
    """Yield every `_target_` of a config, with the dotted key of its mapping."""
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
    """Raise UserError unless `target` is one name in a module of its group or of `plugins`. Imports nothing."""
    group, *inside = where.split(".")
    modules = TARGET_MODULES.get(group, ())
    if not modules or len(inside) != (0 if group == "optim" else 1):
        raise UserError(f"{where}._target_ is not a setting: only optim, callbacks and logger have classes")
    module, _, name = str(target).rpartition(".")
    if module not in (*modules, *plugins) or not name.isidentifier():
        own = name.isidentifier() and module and all(part.isidentifier() for part in module.split("."))
        cure = f"add plugins=[{module}] if you trust its code; " if own else ""
        raise UserError(f"{where}._target_={target} is not a trusted class: {cure}trusted: {', '.join(modules)}")
    if name == "CSVLogger":
        raise UserError(f"{where}._target_={target} would delete metrics.csv, which is always written: leave it out")


def load_class(where: str, target: str) -> type:
    """Import the class that a checked `_target_` names. Raises UserError if the import fails or the base class is
    wrong."""
    module, _, name = target.rpartition(".")
    try:
        namespace = import_module(module)
    except ModuleNotFoundError as error:
        missing = f"no module {error.name}: install it, or add its folder to PYTHONPATH"
        raise UserError(f"{where}._target_={target}: {missing}") from error
    except Exception as error:  # the user's module can raise anything
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
        raise UserError(f"{where}._target_={target} is not a {base_module}.{base_name}: name a class derived from it")
    return found
