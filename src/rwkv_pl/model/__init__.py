"""The model versions, by the name that `model.name` and checkpoints carry: {name: (module class, config class)}."""

from rwkv_pl.config import RWKV4Config
from rwkv_pl.model.rwkv4 import RWKV4

VERSIONS = {"rwkv4": (RWKV4, RWKV4Config)}
