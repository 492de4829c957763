"""Weights from official files of every kind that is about, and one-line errors for the rest."""

import pytest
import torch

from rwkv_pl import RWKV4, RWKV4Config, load_weights
from rwkv_pl.config import UserError


@pytest.fixture
def model():
    torch.manual_seed(3)
    return RWKV4(RWKV4Config(vocab_size=30, n_layer=2, n_embd=12))


@pytest.mark.parametrize("squeezed", [False, True], ids=["as-is", "squeezed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_an_official_file(tmp_path, model, dtype, squeezed):
    weights = {name: value.to(dtype) for name, value in model.state_dict().items()}
    if squeezed:
        weights = {name: v.squeeze() if "time_mix" in name else v for name, v in weights.items()}
    torch.save(weights, tmp_path / "RWKV-4.pth")
    loaded, vocabulary = load_weights(tmp_path / "RWKV-4.pth")
    assert vocabulary is None
    assert loaded.config == model.config
    for name, value in loaded.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, model.state_dict()[name].to(dtype).float()), name


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("blocks.0.att.time_faaaa", "rwkv5"),
        ("blocks.0.att.time_maa_x", "rwkv6"),
        ("blocks.0.att.w0", "rwkv7"),
    ],
)
def test_later_versions_are_named(tmp_path, model, name, version):
    torch.save(model.state_dict() | {name: torch.zeros(2)}, tmp_path / "later.pth")
    with pytest.raises(UserError, match=f"holds a {version} model"):
        load_weights(tmp_path / "later.pth")


def test_a_later_checkpoint_format_is_named(tmp_path):
    torch.save({"rwkv_pl": {"format": 2, "model": "rwkv4"}, "state_dict": {}}, tmp_path / "new.ckpt")
    with pytest.raises(UserError, match="format 2, this rwkv_pl reads 1"):
        load_weights(tmp_path / "new.ckpt")


def test_a_hugging_face_folder_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="Hugging Face"):
        load_weights(tmp_path)
