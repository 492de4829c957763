"""rwkv_pl: train RWKV language models with PyTorch Lightning, Hydra and a compiled WKV kernel.

The public names are loaded on first use: ``import rwkv_pl`` alone does not import torch.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "RWKV4": "rwkv_pl.model.rwkv4",
    "RWKV4Config": "rwkv_pl.config",
    "RWKV7": "rwkv_pl.model.rwkv7",
    "RWKV7Config": "rwkv_pl.config",
    "LitRWKV": "rwkv_pl.training.module",
    "Optim": "rwkv_pl.config",
    "Schedule": "rwkv_pl.config",
    "CorpusDataModule": "rwkv_pl.data.datamodule",
    "Enwik8DataModule": "rwkv_pl.data.datamodule",
    "MixDataModule": "rwkv_pl.data.datamodule",
    "TokensDataModule": "rwkv_pl.data.datamodule",
    "tune_allocator": "rwkv_pl.ops.heap",
    "wkv4": "rwkv_pl.ops.wkv4",
    "wkv7": "rwkv_pl.ops.wkv7",
    "use_kernel": "rwkv_pl.ops.backend",
    "generate": "rwkv_pl.inference.generate",
    "load_weights": "rwkv_pl.weights.read",
    "train": "rwkv_pl.runs.python_call",
    "Run": "rwkv_pl.runs.run",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
