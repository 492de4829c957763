"""The package as a whole: import cost and public names."""

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

import rwkv_pl
from rwkv_pl.config import MODEL_CONFIGS, Model
from rwkv_pl.model import MODELS

CONF = Path(__file__).parents[1] / "conf"


def test_import_alone_loads_no_torch():
    code = (
        "import sys, rwkv_pl; rwkv_pl.Optim, rwkv_pl.Schedule;"
        "sys.exit('torch' in sys.modules or 'lightning' in sys.modules or 'omegaconf' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_command_line_module_loads_no_torch():
    code = "import sys, rwkv_pl.cli.train; sys.exit('torch' in sys.modules or 'lightning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("name", rwkv_pl.__all__)
def test_public_name_is_importable(name):
    assert callable(getattr(rwkv_pl, name))


def test_every_model_version_has_a_config_class_and_a_conf_file():
    assert {name: config for name, (_, config) in MODELS.items()} == MODEL_CONFIGS
    for name in MODELS:
        keys = yaml.safe_load((CONF / "model" / f"{name}.yaml").read_text(encoding="utf-8"))
        assert keys.keys() == {field.name for field in fields(Model)}
        assert keys.keys() - {"name"} <= {field.name for field in fields(MODEL_CONFIGS[name])}
        assert keys["name"] == name


def test_unknown_name_raises_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'wkv5'"):
        rwkv_pl.wkv5  # noqa: B018
