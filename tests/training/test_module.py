"""LitRWKV in a plain Trainer, as a Python user runs it."""

import csv
import math
from collections import Counter

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset

from rwkv_pl import RWKV4, CorpusDataModule, LitRWKV, Optim, RWKV4Config, Schedule, TokensDataModule
from rwkv_pl.errors import RunError, UserError
from rwkv_pl.ops.cross_entropy import head_cross_entropy
from rwkv_pl.training.callbacks.metrics import MetricsRecorder
from rwkv_pl.training.loss import split_batch, split_tokens
from rwkv_pl.training.schedule import learning_rate

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


def test_module_without_settings_learns():
    torch.manual_seed(0)
    loader = rows(n=2)
    module = LitRWKV(RWKV4(RWKV4Config(256, 2, 32)))
    (batch,) = loader
    first = module.loss(*split_batch(batch))[1].item()
    Trainer(accelerator="cpu", max_steps=30, **QUIET).fit(module, loader)
    assert module.loss(*split_batch(batch))[1].item() < 0.9 * first


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
    assert figures.keys() == {"test/loss", "test/bits_per_byte"}
    assert 0 < figures["test/bits_per_byte"] < 10


def read_rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def rows(vocab_size=256, n=12, ctx_len=16):
    """A plain DataLoader of batches (2, T+1)."""
    tokens = torch.randint(vocab_size, (n, ctx_len + 1), generator=torch.Generator().manual_seed(0))
    return DataLoader(list(tokens), batch_size=2)


def test_batches_of_other_forms_train_alike():
    tokens = torch.randint(256, (6, 17), generator=torch.Generator().manual_seed(0))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    forms = [
        DataLoader(list(tokens), 2),
        DataLoader(TensorDataset(tokens), 2),
        DataLoader(TensorDataset(inputs, targets), 2),
    ]
    weights = []
    for loader in forms:
        torch.manual_seed(0)
        module = LitRWKV(RWKV4(RWKV4Config(256, 1, 8)), Optim(lr=1e-2))
        Trainer(accelerator="cpu", max_epochs=1, **QUIET).fit(module, loader, loader)
        weights.append(module.model.head.weight)
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[0], weights[2])


def test_padding_is_not_counted_in_the_loss():
    module = LitRWKV(RWKV4(RWKV4Config(256, 1, 8)))
    tokens = torch.randint(256, (1, 17), generator=torch.Generator().manual_seed(0))
    padded = torch.cat([tokens, torch.full((1, 9), -1)], dim=1)
    whole, with_padding = module.loss(*split_batch(tokens))[1], module.loss(*split_batch(padded))[1]
    torch.testing.assert_close(whole, with_padding, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"input_ids": torch.zeros(1, 2)}, r"a batch must be tokens \(B, T\+1\), or a pair .*, not dict"),
        (torch.zeros(5, dtype=torch.int64), r"not \[\(5,\)\]"),
        ((torch.zeros(1, 2), torch.zeros(1, 3)), r"inputs \(1, 2\) and targets \(1, 3\) must have one shape"),
        ((torch.zeros(1, 2), torch.zeros(1, 2)), "targets must be an int64 tensor, not torch.float32"),
    ],
)
def test_batch_of_another_form_is_an_error(batch, message):
    with pytest.raises(TypeError, match=message):
        split_batch(batch)


def test_targets_may_be_int32_but_not_below_minus_one():
    targets = torch.tensor([[3, -1]], dtype=torch.int32)
    assert split_batch([targets, targets])[1].tolist() == [[3, -1]]
    assert split_batch([targets, targets])[1].dtype == split_batch(targets)[1].dtype == torch.int64
    with pytest.raises(IndexError, match="targets must be tokens, or -1 if not counted, got -100"):
        split_batch([targets, torch.tensor([[3, -100]])])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": RWKV4Config(256, 1, 8)}, r"LitRWKV takes a model, RWKV4\(RWKV4Config\(...\)\), or a function"),
        ({"optim": {"lr": 1}}, r"optim must be rwkv_pl.Optim\(...\), got {'lr': 1}"),
        ({"optim": Schedule()}, r"optim must be rwkv_pl.Optim"),
        ({"schedule": "cosine"}, r"schedule must be rwkv_pl.Schedule\(...\), got 'cosine'"),
        ({"loss_chunk_len": 0}, "loss_chunk_len must be at least 1, got 0"),
    ],
)
def test_argument_of_another_kind_is_an_error(arguments, message):
    with pytest.raises(UserError, match=message):
        LitRWKV(**{"model": RWKV4(RWKV4Config(256, 1, 8))} | arguments)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Optim(torch.optim.SGD, lr=1), "optim._target_, the name of a class, must be a string, got <class"),
        (lambda: Optim(lr="1e-3"), "optim.lr must be a number, got '1e-3'"),
        (lambda: Optim(betas=0.9), "optim.betas must be numbers from 0 to below 1, got 0.9"),
        (lambda: Schedule("cosine", warmup_steps=2.5), "schedule.warmup_steps must be a whole number, got 2.5"),
        (lambda: RWKV4Config(0, 1, 8), "model.vocab_size must be at least 1, got 0"),
        (lambda: RWKV4Config(256.0, 1, 8), "model.vocab_size must be a whole number, got 256.0"),
        (lambda: CorpusDataModule("x", batch_size=0), "batch_size must be at least 1, got 0"),
        (lambda: CorpusDataModule("x", ctx_len=32.0), "ctx_len must be a whole number, got 32.0"),
        (lambda: CorpusDataModule("x", eval_batch_size="4"), "eval_batch_size must be a whole number, got '4'"),
    ],
)
def test_number_of_another_kind_is_an_error(build, message):
    with pytest.raises(UserError, match=message):
        build()


class Rates(Callback):
    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.values.append(pl_module.last_lr)


def test_schedule_takes_its_length_from_the_epochs():
    module = LitRWKV(RWKV4(RWKV4Config(256, 1, 8)), Optim(lr=1.0), Schedule("cosine", warmup_steps=3))
    Trainer(accelerator="cpu", max_epochs=2, callbacks=[rates := Rates()], **QUIET).fit(module, rows())
    expected = [learning_rate(n, module.optim, module.schedule, 12) for n in range(12)]
    assert rates.values == expected
    assert min(rates.values[:-1]) > 0 and rates.values[-1] == 0


@pytest.mark.parametrize(
    ("length", "message"),
    [
        ({"max_epochs": -1}, "schedule=cosine needs a length: set schedule.decay_steps, trainer.max_steps or"),
        ({"max_steps": 3}, r"schedule.warmup_steps"),
    ],
)
def test_schedule_without_room_is_an_error(length, message):
    module = LitRWKV(RWKV4(RWKV4Config(256, 1, 8)), schedule=Schedule("cosine", warmup_steps=3))
    with pytest.raises(UserError, match=message):
        Trainer(accelerator="cpu", **QUIET, **length).fit(module, rows())


def test_bits_per_byte_count_the_bytes_of_the_data_modules_vocabulary(tmp_path):
    (tmp_path / "corpus.txt").write_text("Öl für die Mühle, süße Äpfel. " * 300, encoding="utf-8")
    data = CorpusDataModule(tmp_path / "corpus.txt", vocab="char", batch_size=4, ctx_len=32)
    data.setup()
    module = LitRWKV(RWKV4(RWKV4Config(data.vocabulary.size, 1, 16)))
    (figures,) = Trainer(accelerator="cpu", **QUIET).validate(module, data, verbose=False)
    lo, hi = data.token_file.splits.val
    n_bytes = data.vocabulary.bytes_per_token[data.token_file.tokens[lo:hi]].sum()
    assert figures["val/bits_per_byte"] == pytest.approx(
        figures["val/loss"] * (hi - lo) / n_bytes / math.log(2), rel=1e-5
    )
    assert module.vocabulary == data.vocabulary.to_dict()
    small = LitRWKV(RWKV4(RWKV4Config(256, 1, 16)))
    with pytest.raises(UserError, match=f"the vocabulary has {data.vocabulary.size} tokens and the model 256"):
        Trainer(accelerator="cpu", **QUIET).validate(small, data, verbose=False)


@pytest.mark.parametrize("given", [[2] * 300, np.full(300, 2), torch.full((300,), 2)], ids=["list", "array", "tensor"])
def test_bytes_per_token_are_given_in_any_form(given):
    module = LitRWKV(RWKV4(RWKV4Config(300, 1, 8)), bytes_per_token=given)
    (figures,) = Trainer(accelerator="cpu", **QUIET).validate(module, rows(300), verbose=False)
    assert figures["val/bits_per_byte"] == pytest.approx(figures["val/loss"] / math.log(2) / 2)


@pytest.mark.parametrize("given", [[1.5] * 300, [-1] * 300, [[2]] * 300, ["a"] * 300, {1: 2}, []], ids=repr)
def test_bytes_per_token_that_count_no_bytes_are_an_error(given):
    with pytest.raises(UserError, match="bytes_per_token must be one whole number of at least 0 for each token, got"):
        LitRWKV(RWKV4(RWKV4Config(300, 1, 8)), bytes_per_token=given)


def test_score_is_that_of_the_last_data_module(data, tmp_path, monkeypatch):
    module = LitRWKV(RWKV4(RWKV4Config(256, 1, 16)))  # larger than one of the vocabularies
    trainer = Trainer(accelerator="cpu", **QUIET)
    assert "val/bits_per_byte" in trainer.validate(module, data, verbose=False)[0]
    monkeypatch.setenv("RWKV_PL_CACHE", str(tmp_path))
    ids = TokensDataModule([*range(40)] * 50, vocab_size=40, batch_size=4, ctx_len=32)
    assert trainer.validate(module, ids, verbose=False)[0].keys() == {"val/loss", "val/bits_per_token"}
    assert module.vocabulary is None


def test_tokens_of_unknown_bytes_are_scored_per_token():
    module = LitRWKV(RWKV4(RWKV4Config(300, 1, 8)))
    (figures,) = Trainer(accelerator="cpu", **QUIET).validate(module, rows(300), verbose=False)
    assert figures["val/bits_per_token"] == pytest.approx(figures["val/loss"] / math.log(2))
    assert "val/bits_per_byte" not in figures
    stopping = EarlyStopping("val/bits_per_byte")
    with pytest.raises(
        UserError, match="EarlyStopping monitors val/bits_per_byte, but the bytes of each token are unknown"
    ):
        Trainer(accelerator="cpu", max_steps=2, callbacks=[stopping], **QUIET).fit(module, rows(300), rows(300))


@pytest.mark.parametrize(("size", "score"), [(300, "bits_per_token"), (256, "bits_per_byte")])
def test_ids_in_memory_are_scored_per_token_unless_they_are_bytes(tmp_path, monkeypatch, size, score):
    module = LitRWKV(RWKV4(RWKV4Config(size, 1, 16)))  # loads the kernel from the user's cache
    module.model(torch.zeros(1, 2, dtype=torch.int64))
    monkeypatch.setenv("RWKV_PL_CACHE", str(tmp_path))
    data = TokensDataModule([*range(40)] * 50, vocab_size=size, batch_size=4, ctx_len=32)
    trainer = Trainer(accelerator="cpu", max_steps=20, **QUIET | ENDLESS)
    trainer.fit(module, data)
    assert trainer.callback_metrics.keys() >= {"val/loss", f"val/{score}"}
    assert float(trainer.callback_metrics[f"val/{score}"]) < 0.9 * math.log2(size)
    assert module.vocabulary is None


def test_metrics_reach_lightnings_loggers_and_callbacks(tmp_path):
    module = LitRWKV(
        RWKV4(
            RWKV4Config(256, 1, 8),
        ),
        Optim(lr=1e-3),
    )
    monitor, best = LearningRateMonitor(), ModelCheckpoint(tmp_path, monitor="train/loss", every_n_train_steps=2)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=6,
        accumulate_grad_batches=2,
        log_every_n_steps=2,
        logger=CSVLogger(tmp_path),
        callbacks=[monitor, best],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    seen = []
    module.loss = lambda *tokens: seen.append(found := LitRWKV.loss(module, *tokens)) or found
    trainer.fit(module, rows(n=24), rows())
    found = read_rows(tmp_path / "lightning_logs" / "version_0" / "metrics.csv")
    columns = {"train/loss", "train/l2wrap", "train/grad_norm", "lr", "val/loss", "val/bits_per_byte"}
    assert columns <= {name for row in found for name in row}
    assert len(monitor.lrs) == len(trainer.optimizers[0].param_groups)
    assert "train/loss" in trainer.progress_bar_metrics
    # Of the whole optimizer step: the mean over its micro-batches.
    logged = [float(row["train/loss"]) for row in found if row.get("train/loss")]
    steps = [float(a[1] + b[1]) / 2 for a, b in zip(seen[0:12:2], seen[1:12:2], strict=True)]
    assert logged == pytest.approx(steps[1::2], rel=1e-5)
    assert float(best.best_model_score) == pytest.approx(min(steps[1::2]), rel=1e-5)


def test_loaded_model_trains_with_dropout():
    model = RWKV4(RWKV4Config(256, 1, 8, dropout=0.5)).eval()
    Trainer(accelerator="cpu", max_steps=1, **QUIET).fit(LitRWKV(model), rows())
    assert model.training and model.blocks[0].dropout.training


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


def test_model_smaller_than_the_ids_is_an_error():
    data = TokensDataModule(list(range(300)) * 4, vocab_size=300, ctx_len=8)
    with pytest.raises(UserError, match="the vocabulary has 300 tokens and the model 256: build the model with"):
        Trainer(accelerator="cpu", max_steps=1, **QUIET).fit(LitRWKV(RWKV4(RWKV4Config(256, 1, 8))), data)
    with pytest.raises(UserError, match="the vocabulary has 300 tokens and the model 256: build the model with"):
        Trainer(accelerator="cpu", max_steps=1, **QUIET).fit(LitRWKV(lambda: RWKV4(RWKV4Config(256, 1, 8))), data)


def test_fit_on_a_cpu_tunes_the_allocator(monkeypatch):
    calls = []
    monkeypatch.setattr("rwkv_pl.training.module.tune_allocator", lambda: calls.append(1))
    Trainer(accelerator="cpu", max_steps=1, **QUIET).fit(LitRWKV(RWKV4(RWKV4Config(256, 1, 8))), rows())
    assert calls == [1]
