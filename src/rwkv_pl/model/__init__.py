"""The model versions: name in `model.name` and in checkpoints -> (module class, config class)."""

from rwkv_pl.config import RWKV4Config
from rwkv_pl.model.rwkv4 import RWKV4

MODELS = {"rwkv4": (RWKV4, RWKV4Config)}
