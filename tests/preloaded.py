"""Imported once by the server from which forks.py forks: all that a command loads, and what it does before torch.

No torch operation runs here: after one with two threads a forked child hangs.
"""

import contextlib
import gc
import importlib
import inspect
import io
import os
import pkgutil
import sys
from pathlib import Path

import rwkv_pl

# Where this file was found; the commands do without.
entries = os.environ["PYTHONPATH"].split(os.pathsep)
entries.remove(str(Path(__file__).parent))
os.environ["PYTHONPATH"] = os.pathsep.join(entries)
if not entries:
    del os.environ["PYTHONPATH"]

MODULES = (
    "hydra._internal.core_plugins.importlib_resources_config_source",
    "lightning.pytorch",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "rich._emoji_codes",
    "torch.utils.tensorboard",
    *(module.name for module in pkgutil.walk_packages(rwkv_pl.__path__, "rwkv_pl.")),
)

for name in MODULES:
    importlib.import_module(name)


def compose_once() -> None:
    """Hydra's plugins and parsers are slow the first time."""
    from command import SMALL

    from rwkv_pl.cli.train import main

    before, sys.argv = sys.argv, ["rwkv-train", "--cfg", "job", *SMALL]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        main()
    sys.argv = before


compose_once()
inspect.getmodule(inspect.currentframe(), "none")  # caches the file of every module: registering an operator asks
gc.collect()
gc.freeze()  # a collection in a child would copy every page
