import pytest
import torch
from lightning.pytorch import Trainer, callbacks
from versions import FEWEST_CHANNELS, small_model

from rwkv_pl import CorpusDataModule, LitRWKV
from rwkv_pl.config import Optim
from rwkv_pl.training.callbacks import weight_averaging


def fit(folder, average, version, resume_from=None):
    """Train 6 steps with a validation after every second one; return the checkpoint of the last and its score."""
    module = LitRWKV(small_model(version, vocab_size=256, n_layer=1, n_embd=FEWEST_CHANNELS[version]), Optim(lr=1e-2))
    saves = callbacks.ModelCheckpoint(folder, "{step}", every_n_train_steps=3, save_top_k=-1)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", max_steps=6, val_check_interval=2, callbacks=[average, saves], **quiet)
    data = CorpusDataModule(folder.parent / "corpus.txt", batch_size=4, ctx_len=32)
    trainer.fit(module, data, ckpt_path=resume_from, weights_only=True)
    return torch.load(folder / "step=6.ckpt", weights_only=True), trainer.callback_metrics["val/bits_per_byte"]


@pytest.mark.parametrize(
    ("name", "options", "version"),
    [
        ("WeightAveraging", {}, "rwkv4"),
        ("EMAWeightAveraging", {"decay": 0.5, "update_every_n_steps": 2}, "rwkv7"),
    ],
)
def test_averages_and_checkpoints_are_those_of_lightning(tmp_path, name, options, version):
    """Also if a run with Lightning's callback continues."""
    (tmp_path / "corpus.txt").write_bytes(b"The quick brown fox jumps over the lazy dog. " * 90)
    expected, score = fit(tmp_path / "lightning", getattr(callbacks, name)(**options), version)
    ours = getattr(weight_averaging, name)
    whole = fit(tmp_path / "whole", ours(**options), version)
    resumed = fit(tmp_path / "resumed", ours(**options), version, tmp_path / "lightning" / "step=3.ckpt")
    for found, bits in (whole, resumed):
        assert bits == score
        assert found["callbacks"][name] == expected["callbacks"][name]
        for part in ("state_dict", "current_model_state", "averaging_state"):
            assert found[part].keys() == expected[part].keys()
            for key, tensor in expected[part].items():
                assert torch.equal(found[part][key], tensor), (part, key)
