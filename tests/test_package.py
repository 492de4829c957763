"""The package as a whole: what importing it costs, and what it offers."""

import subprocess
import sys

import pytest

import rwkv_pl


def test_import_alone_loads_no_torch():
    code = "import sys, rwkv_pl; sys.exit('torch' in sys.modules or 'lightning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_command_line_module_loads_no_torch():
    code = "import sys, rwkv_pl.cli.train; sys.exit('torch' in sys.modules or 'lightning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("name", rwkv_pl.__all__)
def test_public_names(name):
    assert callable(getattr(rwkv_pl, name))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'wkv5'"):
        rwkv_pl.wkv5  # noqa: B018
