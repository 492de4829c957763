"""LitRWKV in a plain Trainer, as a Python user runs it."""

import math
from collections import Counter

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from rwkv_pl import RWKV4, CorpusDataModule, LitRWKV, RWKV4Config
from rwkv_pl.errors import RunError
from rwkv_pl.ops.cross_entropy import head_cross_entropy
from rwkv_pl.training.callbacks.metrics import MetricsRecorder
from rwkv_pl.training.loss import split_tokens

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


def train(data, **arguments):
    torch.manual_seed(0)
    module = LitRWKV(RWKV4(RWKV4Config(256, 2, 32)))
    module.optim.lr = 1e-2
    trainer = Trainer(
        **({"accelerator": "cpu", "max_steps": 30, "val_check_interval": 10} | QUIET | ENDLESS | arguments)
    )
    trainer.fit(module, data)
    return trainer, module


def test_training_reduces_the_loss_and_ends_with_a_validation(data):
    trainer, _ = train(data)
    assert trainer.global_step == 30
    # Forty-five characters, repeated: far below the 8 bits of a model that knows nothing.
    assert float(trainer.callback_metrics["val/bits_per_byte"]) < 3


def test_validation_averages_over_every_byte(data):
    trainer, module = train(data, max_steps=2)
    module.eval()
    nats = n_targets = 0
    with torch.no_grad():
        for batch in data.val_dataloader():
            inputs, targets = split_tokens(batch)
            nats += float(head_cross_entropy(module.model.head, module.model.hidden(inputs)[0], targets)[0].sum())
            n_targets += int((targets >= 0).sum())
    lo, hi = data.corpus.splits.val
    assert n_targets == hi - lo
    assert float(trainer.callback_metrics["val/bits_per_byte"]) == pytest.approx(
        nats / n_targets / math.log(2), rel=1e-5
    )


def test_test_split_reports_the_same_metrics(data):
    trainer, module = train(data, max_steps=2)
    (figures,) = trainer.test(module, data, verbose=False)
    assert not figures  # read from callback_metrics, like the validation's
    assert 0 < float(trainer.callback_metrics["test/bits_per_byte"]) < 10


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_training_in_other_precisions(data, precision):
    trainer, _ = train(data, precision=precision)
    assert float(trainer.callback_metrics["val/bits_per_byte"]) < 3


class NonfiniteLoss(LitRWKV):
    """The loss of batch 3 is NaN. late: a fused optimizer reports it, read one step later, as on a GPU."""

    late = False

    def training_step(self, batch, batch_idx):
        parts = super().training_step(batch, batch_idx)
        if batch_idx == 3:
            parts["loss"] = parts["loss"] * math.nan
            self._loss = self._loss * math.nan
        return parts

    def skips_nonfinite_on_device(self, optimizer):
        return self.late and optimizer.defaults["fused"]


def train_with_nonfinite_loss(data, late, skip, steps):
    torch.manual_seed(0)
    module = NonfiniteLoss(RWKV4(RWKV4Config(256, 2, 32)), skip_nonfinite=skip)
    module.late, module.optim.lr = late, 1e-2
    trainer = Trainer(accelerator="cpu", max_steps=steps, val_check_interval=100, **QUIET, **ENDLESS)
    error = None
    try:
        trainer.fit(module, data)
    except RunError as raised:
        error = str(raised)
    state = trainer.optimizers[0].state_dict()["state"]
    return (
        error,
        module._guard.skipped,
        list(module.model.state_dict().values()) + [v for s in state.values() for v in s.values()],
    )


@pytest.mark.parametrize("steps", [4, 6])
def test_gpu_skips_a_nonfinite_batch_without_a_sync(data, steps):
    """The same bits as with a check on the host, also if only the validation follows the batch."""
    early, late = (train_with_nonfinite_loss(data, late, skip=1, steps=steps) for late in (False, True))
    assert (early[:2], late[:2]) == ((None, 1), (None, 1))
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(early[2], late[2], strict=True))


@pytest.mark.parametrize("steps", [4, 6])
def test_gpu_run_stops_before_the_nonfinite_step(data, steps):
    early, late = (train_with_nonfinite_loss(data, late, skip=0, steps=steps) for late in (False, True))
    assert "loss of batch 3 is not finite" in early[0] and "before optimizer step 4" in early[0]
    assert late[0] == early[0]
    assert all(torch.equal(a, b) for a, b in zip(early[2], late[2], strict=True))


def test_step_without_logging_has_at_most_one_device_sync(data, tmp_path, monkeypatch):
    """On a GPU each query is a sync: steps without logging may have one, for the previous step's result."""
    asked, logged = Counter(), Counter()
    step = 0

    def count_calls(name, whole):
        def call(tensor, *arguments):
            asked[step] += 1
            return whole(tensor, *arguments)

        monkeypatch.setattr(torch.Tensor, name, call)

    class Steps(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            nonlocal step
            step = trainer.global_step + 1

        def on_train_batch_end(self, *_):
            nonlocal step
            step = 0

    for name in ("tolist", "item", "cpu", "numpy", "__float__", "__int__", "__bool__", "__index__"):
        count_calls(name, getattr(torch.Tensor, name))
    monkeypatch.setattr(LitRWKV, "skips_nonfinite_on_device", lambda self, optimizer: optimizer.defaults["fused"])
    monkeypatch.setattr(LitRWKV, "log", lambda self, *_, **__: logged.update([step]))
    callbacks = [MetricsRecorder(tmp_path, 4 * 32), Steps()]
    train(data, max_steps=8, val_check_interval=100, limit_val_batches=0, log_every_n_steps=5, callbacks=callbacks)
    assert {step: asked[step] for step in range(2, 9) if step != 5} == dict.fromkeys((2, 3, 4, 6, 7, 8), 1) | {
        2: 0,
        6: 0,
    }
    assert asked[5] <= 4
    assert not logged
