"""LitRWKV in a plain Trainer, as somebody uses it from Python."""

import math

import pytest
import torch
from lightning.pytorch import Trainer

from rwkv_pl import RWKV4, CorpusDataModule, LitRWKV, RWKV4Config
from rwkv_pl.training.loss import cross_entropy, split_tokens

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
ENDLESS = {
    "max_epochs": -1,
    "check_val_every_n_epoch": None,
    "num_sanity_val_steps": 0,
    "use_distributed_sampler": False,
}


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_bytes(b"The quick brown fox jumps over the lazy dog. " * 400)
    return CorpusDataModule(path, batch_size=4, ctx_len=32, eval_batch_size=3)


def trained(data, **arguments):
    torch.manual_seed(0)
    module = LitRWKV(RWKV4(RWKV4Config(256, 2, 32)))
    module.optim.lr = 1e-2
    trainer = Trainer(
        **({"accelerator": "cpu", "max_steps": 30, "val_check_interval": 10} | QUIET | ENDLESS | arguments)
    )
    trainer.fit(module, data)
    return trainer, module


def test_it_learns_and_ends_with_a_validation(data):
    trainer, _ = trained(data)
    assert trainer.global_step == 30
    # Forty-five characters again and again: far below the 8 bits of a model that knows nothing.
    assert float(trainer.callback_metrics["val/bits_per_byte"]) < 3


def test_validation_is_the_mean_over_every_byte(data):
    trainer, module = trained(data, max_steps=2)
    module.eval()
    nats = n_targets = 0
    with torch.no_grad():
        for batch in data.val_dataloader():
            inputs, targets = split_tokens(batch)
            nats += float(cross_entropy(module(inputs)[0], targets).sum())
            n_targets += int((targets >= 0).sum())
    lo, hi = data.corpus.splits.val
    assert n_targets == hi - lo
    assert float(trainer.callback_metrics["val/bits_per_byte"]) == pytest.approx(
        nats / n_targets / math.log(2), rel=1e-5
    )


def test_the_test_split_has_the_same_figures(data):
    trainer, module = trained(data, max_steps=2)
    (figures,) = trainer.test(module, data, verbose=False)
    assert not figures  # read from callback_metrics, as the validation's
    assert 0 < float(trainer.callback_metrics["test/bits_per_byte"]) < 10


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_other_precisions(data, precision):
    trainer, _ = trained(data, precision=precision)
    assert float(trainer.callback_metrics["val/bits_per_byte"]) < 3
