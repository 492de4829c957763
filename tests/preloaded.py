"""Imported once by the server of forks.py: all modules that a command loads, and its set-up before torch.

No torch operation runs here: after an operation with two threads, a forked child hangs.
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

# The folder of this file was added to find it; the commands do not have it.
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
    """Load Hydra's plugins and parsers, which are slow the first time."""
    from command import SMALL

    from rwkv_pl.cli.train import main

    before, sys.argv = sys.argv, ["rwkv-train", "--cfg", "job", *SMALL]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        main()
    sys.argv = before


compose_once()
inspect.getmodule(inspect.currentframe(), "none")  # caches every module's source: registering an operator reads it
gc.collect()
gc.freeze()  # a garbage collection in a child would copy every page
