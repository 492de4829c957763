import pytest
import torch
from lightning.pytorch import Trainer, callbacks

from rwkv_pl import RWKV4, CorpusDataModule, LitRWKV, RWKV4Config
from rwkv_pl.config import Optim
from rwkv_pl.training.callbacks import weight_averaging


def fit(folder, average, resume_from=None):
    """Train 6 steps with a validation after every second one; return the checkpoint of the last and its score."""
    torch.manual_seed(0)
    module = LitRWKV(RWKV4(RWKV4Config(256, 1, 16)), Optim(lr=1e-2))
    saves = callbacks.ModelCheckpoint(folder, "{step}", every_n_train_steps=3, save_top_k=-1)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", max_steps=6, val_check_interval=2, callbacks=[average, saves], **quiet)
    data = CorpusDataModule(folder.parent / "corpus.txt", batch_size=4, ctx_len=32)
    trainer.fit(module, data, ckpt_path=resume_from, weights_only=True)
    return torch.load(folder / "step=6.ckpt", weights_only=True), trainer.callback_metrics["val/bits_per_byte"]


@pytest.mark.parametrize(
    ("name", "options"),
    [("WeightAveraging", {}), ("EMAWeightAveraging", {"decay": 0.5, "update_every_n_steps": 2})],
)
def test_averages_and_checkpoints_are_those_of_lightning(tmp_path, name, options):
    """Also if a run with Lightning's callback continues."""
    (tmp_path / "corpus.txt").write_bytes(b"The quick brown fox jumps over the lazy dog. " * 90)
    expected, score = fit(tmp_path / "lightning", getattr(callbacks, name)(**options))
    ours = getattr(weight_averaging, name)
    whole = fit(tmp_path / "whole", ours(**options))
    resumed = fit(tmp_path / "resumed", ours(**options), tmp_path / "lightning" / "step=3.ckpt")
    for found, bits in (whole, resumed):
        assert bits == score
        assert found["callbacks"][name] == expected["callbacks"][name]
        for part in ("state_dict", "current_model_state", "averaging_state"):
            assert found[part].keys() == expected[part].keys()
            for key, tensor in expected[part].items():
                assert torch.equal(found[part][key], tensor), (part, key)
