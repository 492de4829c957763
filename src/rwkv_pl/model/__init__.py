"""The model versions: name in `model.name` and in checkpoints -> (module class, config class)."""

from typing import Any

from rwkv_pl.config import MODEL_CONFIGS
from rwkv_pl.model.language_model import LanguageModel
from rwkv_pl.model.rwkv4 import RWKV4
from rwkv_pl.model.rwkv7 import RWKV7

_CLASSES: dict[str, type[LanguageModel]] = {"rwkv4": RWKV4, "rwkv7": RWKV7}

MODELS: dict[str, tuple[type[LanguageModel], Any]] = {
    name: (_CLASSES[name], config) for name, config in MODEL_CONFIGS.items()
}
