"""The data modules and LitRWKV with the features of Lightning: the table in docs/guides/library.md."""

import csv
import subprocess
import sys
import warnings
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch import Callback, Trainer, callbacks
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner
from systems import WINE
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from rwkv_pl import RWKV4, CorpusDataModule, LitRWKV, RWKV4Config
from rwkv_pl.config import Optim, Schedule
from rwkv_pl.errors import UserError
from rwkv_pl.training.loss import split_tokens

QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
BARE = {"logger": False, "enable_checkpointing": False}
PASS = 26  # steps


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_bytes((b"The quick brown fox jumps over the lazy dog. " * 90)[:3600])
    return CorpusDataModule(path, batch_size=4, ctx_len=32)


def build(**settings):
    torch.manual_seed(0)
    return LitRWKV(RWKV4(RWKV4Config(256, 1, 16, **settings)), Optim(lr=1e-2))


class Batches(Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(batch)


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [
        ({"max_epochs": 1}, PASS),
        ({"max_epochs": 2}, 2 * PASS),
        ({"max_steps": 30}, 30),
        ({"max_epochs": 1, "accumulate_grad_batches": 2}, PASS),
        ({"max_epochs": 3, "limit_train_batches": 4}, 12),
        ({"max_epochs": 1, "limit_train_batches": 0.2}, 5),
        ({"max_epochs": 3, "overfit_batches": 2}, 6),
        ({"fast_dev_run": True}, 1),
        ({"max_epochs": 1, "val_check_interval": 0.5}, PASS),
        ({"max_epochs": 2, "limit_train_batches": 3, "reload_dataloaders_every_n_epochs": 1}, 6),
        ({"max_epochs": 2, "limit_train_batches": 3, "check_val_every_n_epoch": 2}, 6),
        ({"max_steps": 3, "detect_anomaly": True, "deterministic": True, "gradient_clip_val": 0.1}, 3),
        ({"max_steps": 3, "barebones": True, "accelerator": "cpu"}, 3),
    ],
    ids=str,
)
def test_trainer_arguments(data, arguments, steps):
    quiet = {} if "barebones" in arguments else QUIET if "fast_dev_run" in arguments else QUIET | BARE
    trainer = Trainer(**quiet, **arguments, callbacks=None if "barebones" in arguments else [batches := Batches()])
    module = build()
    trainer.fit(module, data)
    assert trainer.global_step == steps
    assert not trainer.should_stop
    if "barebones" in arguments:
        return
    assert "val/bits_per_byte" in trainer.callback_metrics
    # Epochs of any length continue in the order of the run; overfit_batches repeats its batches instead.
    order = [0, 1] * 3 if "overfit_batches" in arguments else range(steps)
    assert torch.equal(torch.cat(batches.seen), torch.cat([read_batch(data, n) for n in order]))


def read_batch(data, n):
    """Batch n of a run, whose order goes on through several passes."""
    fresh = CorpusDataModule(data.source.path, batch_size=4, ctx_len=32)
    fresh.setup()
    return fresh.train_dataloader().dataset[n]


class Rates(Callback):
    def __init__(self):
        self.rates = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.rates.append(pl_module.last_lr)


@pytest.mark.parametrize(
    "callback",
    [
        callbacks.BatchSizeFinder(steps_per_trial=1, max_trials=2),
        # psutil cannot measure the processor in wine.
        *([] if WINE else [callbacks.DeviceStatsMonitor()]),
        callbacks.EarlyStopping("val/bits_per_byte"),
        callbacks.EMAWeightAveraging(),
        callbacks.LambdaCallback(),
        callbacks.LearningRateMonitor("step"),
        callbacks.ModelPruning("l1_unstructured", amount=0.1),
        callbacks.ModelSummary(),
        callbacks.RichModelSummary(),
        callbacks.RichProgressBar(),
        callbacks.StochasticWeightAveraging(1e-3, swa_epoch_start=1),
        callbacks.ThroughputMonitor(len),
        callbacks.Timer("00:01:00:00"),
        callbacks.TQDMProgressBar(),
    ],
    ids=lambda callback: type(callback).__name__,
)
@pytest.mark.filterwarnings("ignore")
def test_callbacks(data, callback, tmp_path):
    arguments = QUIET | {"enable_progress_bar": "ProgressBar" in type(callback).__name__}
    arguments |= {"logger": CSVLogger(tmp_path), "enable_checkpointing": False, "default_root_dir": tmp_path}
    trainer = Trainer(max_epochs=3, limit_train_batches=4, log_every_n_steps=2, callbacks=[callback], **arguments)
    trainer.fit(module := build(), data)
    assert trainer.global_step == 12
    assert float(trainer.callback_metrics["train/loss"]) < 5
    if isinstance(callback, callbacks.StochasticWeightAveraging):
        assert module.last_lr < 1e-2  # its own rate
    else:
        assert module.last_lr == 1e-2


def test_accumulation_schedule(data):
    schedule = callbacks.GradientAccumulationScheduler({0: 1, 1: 2})
    trainer = Trainer(max_epochs=2, callbacks=[schedule], **QUIET, **BARE)
    with pytest.raises(UserError, match="GradientAccumulationScheduler would not change the steps: batch_size counts"):
        trainer.fit(build(), data)
    rows = torch.randint(256, (8, 17), generator=torch.manual_seed(0))
    trainer = Trainer(max_epochs=2, callbacks=[schedule], **QUIET, **BARE)
    trainer.fit(build(), DataLoader(TensorDataset(rows), batch_size=2))
    assert trainer.global_step == 4 + 2


def test_iterable_dataset_without_a_length():
    class Rows(IterableDataset):
        def __iter__(self):
            return iter(torch.randint(256, (12, 17), generator=torch.manual_seed(0)))

    trainer = Trainer(max_epochs=2, accumulate_grad_batches=2, **QUIET, **BARE)
    trainer.fit(build(), DataLoader(Rows(), batch_size=2))
    assert trainer.global_step == 6


def test_learning_rate_finder_sets_the_rates_it_tries(data, tmp_path):
    module, rates = build(), []
    step = module.optimizer_step
    module.optimizer_step = lambda *args, **rest: (step(*args, **rest), rates.append(module.last_lr))
    found = Tuner(Trainer(max_epochs=1, default_root_dir=tmp_path, **QUIET, **BARE)).lr_find(
        module, data, num_training=20
    )
    assert rates == pytest.approx(found.results["lr"])
    assert module.optim.lr == found.suggestion()


def test_learning_rate_finder_as_a_callback(data, tmp_path):
    finder = callbacks.LearningRateFinder(num_training_steps=20)
    trainer = Trainer(max_epochs=1, callbacks=[finder], default_root_dir=tmp_path, **QUIET, **BARE)
    trainer.fit(module := build(), data)
    assert trainer.global_step == PASS
    assert module.last_lr == module.optim.lr == finder.optimal_lr.suggestion()


def test_batch_size_finder_ends_at_a_size_that_works(data, tmp_path):
    tuner = Tuner(Trainer(max_epochs=1, default_root_dir=tmp_path, **QUIET, **BARE))
    assert tuner.scale_batch_size(build(), datamodule=data, max_trials=3, steps_per_trial=1) == data.batch_size == 8


@pytest.mark.parametrize("trial", ["fast_dev_run", "lr_find", "scale_batch_size"])
def test_trial_of_a_few_steps_need_not_hold_the_schedule(data, tmp_path, trial):
    module = LitRWKV(RWKV4(RWKV4Config(256, 1, 8)), Optim(lr=1e-3), Schedule("cosine", warmup_steps=50))
    trainer = Trainer(max_steps=60, default_root_dir=tmp_path, fast_dev_run=trial == "fast_dev_run", **QUIET, **BARE)
    if trial == "lr_find":
        Tuner(trainer).lr_find(module, data, num_training=20)
    elif trial == "scale_batch_size":
        assert Tuner(trainer).scale_batch_size(module, datamodule=data, max_trials=2, steps_per_trial=2) == 4
    trainer.fit(module, data)
    assert trainer.global_step == (1 if trial == "fast_dev_run" else 60)
    with pytest.raises(UserError, match=r"schedule.warmup_steps=50 must be below the run's 20 steps"):
        Trainer(max_steps=20, **QUIET, **BARE).fit(module, data)


def test_predict_gives_the_nats_of_each_target(data):
    trainer, module = Trainer(**QUIET, **BARE), build()
    nats = torch.cat(trainer.predict(module, data))
    (figures,) = trainer.validate(module, data, verbose=False)
    lo, hi = data.token_file.splits.val
    assert nats.shape[1] == 32
    assert nats.sum() / (hi - lo) == pytest.approx(figures["val/loss"], rel=1e-6)
    rows = torch.randint(256, (4, 17))
    (given,) = trainer.predict(module, DataLoader(TensorDataset(rows), batch_size=4))
    inputs, targets = split_tokens(rows)
    assert torch.allclose(given, F.cross_entropy(module(inputs)[0].mT, targets, reduction="none"), atol=1e-5)


def test_command_line_of_lightning(data, monkeypatch, tmp_path):
    arguments = [f"--data.path={data.source.path}", "--data.ctx_len=32", "--data.batch_size=4", "--model.optim.lr=1e-3"]
    arguments += ["--model.model=rwkv_pl.RWKV4", "--model.model.config.vocab_size=256", "--trainer.max_steps=2"]
    arguments += ["--model.model.config.n_layer=1", "--model.model.config.n_embd=16", "--trainer.accelerator=cpu"]
    arguments += ["--trainer.enable_progress_bar=false", "--trainer.logger=false"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["script"])
    cli = LightningCLI(LitRWKV, CorpusDataModule, args=["fit", *arguments], save_config_callback=None)
    assert cli.trainer.global_step == 2
    assert cli.model.optim.lr == 1e-3


def test_fabric_trains_the_model(data):
    fabric = Fabric(accelerator="cpu", devices=1)
    model = RWKV4(RWKV4Config(256, 1, 16))
    model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    data.setup()
    losses = []
    for batch in fabric.setup_dataloaders(data.train_dataloader()):
        inputs, targets = split_tokens(batch)
        logits, _ = model(inputs)
        losses.append(F.cross_entropy(logits.mT, targets))
        fabric.backward(losses[-1])
        optimizer.step()
        optimizer.zero_grad()
    assert len(losses) == PASS
    assert losses[-1] < losses[0] - 1


def fit_with_checkpoints(data, folder, accumulate=1, workers=0, resume_from=None):
    """Two and a half epochs of 6 steps, and the metrics that a CSVLogger got."""
    data.num_workers = workers
    every = callbacks.ModelCheckpoint(folder / "all", "{step}", every_n_train_steps=1, save_top_k=-1)
    logger = CSVLogger(folder)
    trainer = Trainer(
        max_steps=15,
        limit_train_batches=6 * accumulate,
        accumulate_grad_batches=accumulate,
        val_check_interval=3 * accumulate,
        log_every_n_steps=1,
        callbacks=[every],
        logger=logger,
        **QUIET,
    )
    module = build(dropout=0.2)
    trainer.fit(module, data, ckpt_path=resume_from, weights_only=True)
    with (Path(logger.log_dir) / "metrics.csv").open(newline="") as file:
        return module, [(row["step"], row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]


@pytest.mark.parametrize(("accumulate", "workers"), [(1, 0), (2, 0), (1, 2)])
@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_resumed_fit_gives_the_same_bits(data, tmp_path, accumulate, workers):
    whole, rows = fit_with_checkpoints(data, tmp_path, accumulate, workers)
    assert len(rows) == 15
    for step in (2, 3, 6, 7) if not workers else (7,):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*resumable.*")
            checkpoint = tmp_path / "all" / f"step={step}.ckpt"
            resumed, later = fit_with_checkpoints(data, tmp_path / str(step), accumulate, workers, checkpoint)
        assert all(map(torch.equal, whole.parameters(), resumed.parameters()))
        assert later == rows[step:]


@pytest.mark.parametrize(
    "arguments",
    [
        {"limit_train_batches": 4},
        {"limit_train_batches": 3, "accumulate_grad_batches": 2},  # two steps, of 2 and of 1 micro-batches
        {"overfit_batches": 3},
        {"overfit_batches": 3, "accumulate_grad_batches": 2},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_resumed_fit_without_validation_gives_the_same_bits(data, tmp_path, arguments):
    def fit(resume_from=None):
        every = callbacks.ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
        quiet = QUIET | {"logger": False, "max_epochs": 3, "limit_val_batches": 0}
        trainer = Trainer(**quiet, **arguments, callbacks=[every])
        module = build(dropout=0.2)
        trainer.fit(module, data, ckpt_path=resume_from, weights_only=True)
        return module, trainer.global_step

    whole, n_steps = fit()
    checkpoints = [tmp_path / f"step={step}.ckpt" for step in range(1, n_steps + 1)]
    for checkpoint in [path.rename(tmp_path / f"whole-{path.name}") for path in checkpoints]:
        resumed, end = fit(checkpoint)
        assert end == n_steps
        assert all(map(torch.equal, whole.parameters(), resumed.parameters())), checkpoint


def test_resumed_fit_may_accumulate_differently(data, tmp_path):
    fit_with_checkpoints(data, tmp_path, accumulate=2)
    batches = Batches()
    trainer = Trainer(max_steps=9, limit_train_batches=6, callbacks=[batches], **QUIET, **BARE)
    trainer.fit(build(), data, ckpt_path=tmp_path / "all" / "step=7.ckpt", weights_only=True)
    assert trainer.fit_loop.epoch_loop.batch_progress.current.ready == 3
    assert torch.equal(torch.cat(batches.seen), torch.cat([read_batch(data, 7), read_batch(data, 8)]))


def test_module_is_restored_from_its_checkpoint_alone(data, tmp_path):
    torch.manual_seed(0)
    module = LitRWKV(RWKV4(RWKV4Config(256, 1, 16, dropout=0.5)), Optim(lr=3e-3), Schedule("cosine", warmup_steps=1))
    trainer = Trainer(max_steps=3, **QUIET, **BARE)
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "mine.ckpt")
    loaded = LitRWKV.load_from_checkpoint(tmp_path / "mine.ckpt")
    assert all(map(torch.equal, module.parameters(), loaded.parameters()))
    assert asdict(loaded.optim) == asdict(module.optim)
    assert (loaded.schedule, loaded.vocabulary) == (module.schedule, module.vocabulary)
    assert torch.equal(loaded.bytes_per_token, module.bytes_per_token)
    assert not loaded.model.training
    assert LitRWKV.load_from_checkpoint(tmp_path / "mine.ckpt", optim=Optim(lr=1.0), strict=True).optim.lr == 1.0
    with pytest.raises(UserError, match="weights_only=False are not supported"):
        LitRWKV.load_from_checkpoint(tmp_path / "mine.ckpt", weights_only=False)


class Recurrent(torch.nn.Module):
    """The attributes that LitRWKV needs, around a GRU."""

    def __init__(self):
        super().__init__()
        self.config = RWKV4Config(256, 1, 16)
        self.emb = torch.nn.Embedding(256, 16)
        self.gru = torch.nn.GRU(16, 16, batch_first=True)
        self.head = torch.nn.Linear(16, 256)
        self.lr_scale = {}

    def hidden(self, tokens, state=None):
        return self.gru(self.emb(tokens), state)


def test_optimizer_of_a_subclass_keeps_its_rates(data):
    class Mine(LitRWKV):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD([*self.parameters()], lr=0.1)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]

    trainer = Trainer(max_epochs=3, limit_train_batches=1, callbacks=[rates := Rates()], **QUIET, **BARE)
    trainer.fit(Mine(RWKV4(RWKV4Config(256, 1, 16))), data)
    assert rates.rates == [0.1, 0.05, 0.025]
    module = Mine(RWKV4(RWKV4Config(256, 1, 16)), schedule=Schedule("cosine", warmup_steps=1))
    with pytest.raises(UserError, match="schedule= is only for the optimizer that LitRWKV builds: leave it out"):
        Trainer(max_epochs=3, **QUIET, **BARE).fit(module, data)


def test_checkpoint_of_numpy_numbers_is_restored(data, tmp_path):
    sizes = RWKV4Config(np.arange(300).max() - 43, n_layer=np.int32(1), n_embd=torch.tensor(16))
    module = LitRWKV(RWKV4(sizes), Optim(lr=np.logspace(-3, -2, 3)[1]), Schedule(warmup_steps=np.int64(1)))
    trainer = Trainer(max_steps=1, **QUIET, **BARE)
    trainer.fit(module, data)
    trainer.save_checkpoint(path := tmp_path / "last.ckpt")
    restored = LitRWKV.load_from_checkpoint(path)
    assert restored.model.config == RWKV4Config(256, 1, 16)
    assert restored.optim.lr == pytest.approx(10**-2.5)


def test_model_of_ones_own_is_trained_and_restored(data, tmp_path):
    trainer = Trainer(max_steps=3, **QUIET, **BARE)
    trainer.fit(module := LitRWKV(Recurrent(), Optim(lr=1e-2)), data)
    trainer.save_checkpoint(tmp_path / "mine.ckpt")
    loaded = LitRWKV.load_from_checkpoint(tmp_path / "mine.ckpt", model=Recurrent())
    assert all(map(torch.equal, module.parameters(), loaded.parameters()))
    with pytest.raises(UserError, match=r"mine.ckpt holds a Recurrent: give one with model="):
        LitRWKV.load_from_checkpoint(tmp_path / "mine.ckpt")


SCRIPT = """
import subprocess
import sys
import warnings
import torch
from lightning.pytorch import Trainer
from rwkv_pl import RWKV4, CorpusDataModule, LitRWKV, RWKV4Config

if __name__ == "__main__":
    torch.manual_seed(0)
    module, data = LitRWKV(RWKV4(RWKV4Config(256, 1, 16))), CorpusDataModule(sys.argv[1], batch_size=4, ctx_len=32)
    module.lr = 1e-2
    warnings.filterwarnings("error", ".*sync_dist.*")
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(accelerator="cpu", devices=int(sys.argv[2]), max_epochs=2, limit_train_batches=3, **quiet)
    trainer.fit(module, data)
    (figures,) = trainer.validate(module, data, verbose=False)
    if trainer.is_global_zero:
        print(float(figures["val/loss"]), sum(p.double().sum().item() for p in module.parameters()))
"""


@pytest.mark.slow
def test_two_devices_train_alike(data, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    found = []
    for devices in ("1", "2"):
        command = [sys.executable, "script.py", data.source.path, devices]
        ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=300)
        found.append([float(word) for word in ran.stdout.split()[-2:]])
    # The sums of the gradients are rounded differently.
    assert found[1] == pytest.approx(found[0], rel=1e-5)
