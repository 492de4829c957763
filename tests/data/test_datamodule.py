"""Data modules: the batches that Lightning gets on any hardware and from any step; each byte is a target once."""

import dataclasses
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.connectors.data_connector import _DataConnector, _resolve_overfit_batches
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor

from rwkv_pl.config import CORPORA, MIX, Data
from rwkv_pl.data import datamodule
from rwkv_pl.data.datamodule import CorpusDataModule, Enwik8DataModule, EvalBatches, open_data
from rwkv_pl.data.order import read_windows, window_starts
from rwkv_pl.data.sources import build_source
from rwkv_pl.data.sources.enwik8 import Enwik8
from rwkv_pl.data.sources.text import Text
from rwkv_pl.data.token_file import open_tokens
from rwkv_pl.data.vocabulary import Vocabulary
from rwkv_pl.errors import UserError

RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, 4000, np.uint8).tobytes()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "noise"
    path.write_bytes(NOISE)
    return path


def attach_trainer(
    data: CorpusDataModule, *, step: int = 0, devices: int = 1, rank: int = 0, accumulate: int = 1
) -> None:
    """The attributes of a trainer that a data module reads."""
    trainer = SimpleNamespace(
        global_step=step,
        world_size=devices,
        global_rank=rank,
        accumulate_grad_batches=accumulate,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
        callbacks=[],
        overfit_batches=0,
    )
    data.trainer = trainer  # type: ignore[assignment]


def take(loader: Any, n: int) -> list[Tensor]:
    iterator = iter(loader)
    return [next(iterator) for _ in range(n)]


def make_data_module(path: Path, **settings: Any) -> CorpusDataModule:
    data = CorpusDataModule(path, **{"ctx_len": 16, "batch_size": 12, **settings})
    data.prepare_data()
    data.setup()
    return data


@pytest.mark.parametrize("together", [1, 24, 60, 1024])
def test_batch_follows_the_contract(path: Path, monkeypatch: pytest.MonkeyPatch, together: int) -> None:
    monkeypatch.setattr(datamodule, "ROWS_PER_BLOCK", together)
    data = make_data_module(path, seed=7, endless=True)
    train = np.frombuffer(NOISE, np.uint8)[: data.corpus.splits.train[1]]
    assert np.array_equal(data.train_tokens, train)
    assert data.steps_per_pass == math.ceil(len(train) // 16 / 12)
    for n, batch in enumerate(take(data.train_dataloader(), 30)):
        assert batch.dtype == torch.int64
        starts = window_starts(n, seed=7, n_tokens=len(train), ctx_len=16, batch_size=12)
        assert np.array_equal(batch.numpy(), read_windows([train] * 12, starts, 16))


@pytest.mark.parametrize(("devices", "accumulate"), [(1, 1), (1, 3), (2, 1), (2, 3), (4, 1), (3, 4), (12, 1)])
@pytest.mark.parametrize("step", [0, 5])
def test_batches_are_the_same_on_any_hardware_from_any_step(
    path: Path, devices: int, accumulate: int, step: int
) -> None:
    data = make_data_module(path)
    uninterrupted = take(data.train_dataloader(), step + 4)[step:]
    parts = []
    for rank in range(devices):
        attach_trainer(data, step=step, devices=devices, rank=rank, accumulate=accumulate)
        parts.append(take(data.train_dataloader(), 4 * accumulate))
    for n, batch in enumerate(uninterrupted):
        pieces = [parts[d][n * accumulate + a] for a in range(accumulate) for d in range(devices)]
        assert torch.equal(torch.cat(pieces), batch)


def test_workers_do_not_change_the_batches(path: Path) -> None:
    data, helped = make_data_module(path), make_data_module(path, num_workers=2)
    for ask in ("train_dataloader", "val_dataloader"):
        for ours, theirs in zip(take(getattr(data, ask)(), 2), take(getattr(helped, ask)(), 2), strict=True):
            assert torch.equal(ours, theirs)


def test_loaders_leave_the_global_generator_alone(path: Path) -> None:
    data = make_data_module(path)
    before = torch.get_rng_state()
    take(data.train_dataloader(), 2)
    list(data.val_dataloader())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize("devices", [1, 2, 3, 5])
@pytest.mark.parametrize(("ctx_len", "rows"), [(1, 1), (7, 3), (16, 8), (50, 4), (199, 2), (200, 1), (1000, 8)])
def test_each_byte_of_a_split_is_a_target_once(path: Path, split: str, devices: int, ctx_len: int, rows: int) -> None:
    data = make_data_module(path, ctx_len=ctx_len, eval_batch_size=rows)
    lo, hi = getattr(data.corpus.splits, split)
    calls, by_number = [], {}
    for rank in range(devices):
        attach_trainer(data, devices=devices, rank=rank)
        batches = list(getattr(data, f"{split}_dataloader")())
        calls.append(len(batches))
        by_number.update({i * devices + rank: batch for i, batch in enumerate(batches)})
    assert len(set(calls)) == 1
    assert calls[0] == math.ceil(math.ceil((hi - lo) / ctx_len) / (rows * devices))
    windows = torch.cat([by_number[k] for k in sorted(by_number)])
    assert windows.shape == (len(by_number) * rows, ctx_len + 1)
    at_position = lo
    for window in windows:
        real = window[window >= 0]
        assert torch.all(window[len(real) :] == -1)
        assert len(real) != 1
        if len(real):
            # Check input and target alike: the token before the first target is the first context.
            assert bytes(real.tolist()) == NOISE[at_position - 1 : at_position - 1 + len(real)]
            at_position += len(real) - 1
    assert at_position == hi


def test_first_byte_of_a_corpus_is_only_context(path: Path) -> None:
    file = open_tokens(Text(path).open(), Vocabulary())
    batches = EvalBatches(file, (0, 33), ctx_len=16, rows=1)
    assert len(batches) == 2
    assert bytes(batches[0].flatten().tolist()) == NOISE[:17]
    assert bytes(batches[1].flatten().tolist()) == NOISE[16:33]


def test_character_vocabulary_is_built_or_given(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("Größe und Maß, " * 200, encoding="utf-8")
    data = make_data_module(path, vocab="char")
    assert data.vocabulary.characters == "ßö"
    assert int(max(batch.max() for batch in take(data.train_dataloader(), 3))) > 255
    given = Vocabulary("char", "é")
    data = make_data_module(path, vocabulary=given)
    assert data.vocabulary is given
    assert data.vocabulary.decode(data.train_tokens) in path.read_bytes()
    assert "vocabulary char (257)" in data.description()


@pytest.mark.parametrize("vocab", ["byte", "char"])
def test_validation_on_a_separate_text(tmp_path: Path, vocab: str) -> None:
    """Every byte is a target once; the first one follows a document end; no test split exists."""
    (tmp_path / "train.txt").write_text("ä train " * 100)
    (tmp_path / "val.txt").write_text("ä val ö " * 20)
    data = make_data_module(tmp_path / "train.txt", val_path=tmp_path / "val.txt", vocab=vocab)
    windows = torch.cat(list(data.val_dataloader()))
    assert windows[0, 0] == 10
    targets = windows[:, 1:].flatten()
    assert data.vocabulary.decode(targets[targets >= 0]) == (tmp_path / "val.txt").read_bytes()
    assert data.vocabulary.decode(data.train_tokens) == (tmp_path / "train.txt").read_bytes() + b"\n"
    assert "ö" not in data.vocabulary.characters
    assert len(data.test_dataloader()) == 0
    with pytest.raises(UserError, match=r"no test split if data.val_path is set: use val"):
        data.setup("test")


def test_too_short_corpus_gives_one_line_error(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"x" * 100)
    with pytest.raises(UserError, match=r"training split has 90 tokens.*ctx_len=90 needs 91"):
        make_data_module(path, ctx_len=90)
    make_data_module(path, ctx_len=89)
    with pytest.raises(UserError, match=r"val split of .* has 0 tokens, nothing to predict"):
        make_data_module(path, split=(0.9, 0.0, 0.1))
    with pytest.raises(UserError, match=r"test split of .* has 0 tokens"):
        make_data_module(path, split=(0.9, 0.1, 0.0))
    # Evaluating a text needs no training split.
    data = CorpusDataModule(path, ctx_len=1024)
    data.setup("test")
    assert len(list(data.test_dataloader())) == 1


def test_batch_size_must_divide_by_the_number_of_devices(path: Path) -> None:
    data = make_data_module(path)
    attach_trainer(data, devices=5)
    with pytest.raises(UserError, match="batch_size=12 is not a multiple of 5"):
        data.train_dataloader()


@pytest.mark.parametrize("stage", ["train", "val", "test"])
def test_lightning_keeps_the_order(path: Path, stage: str) -> None:
    data = make_data_module(path)
    loader = getattr(data, f"{stage}_dataloader")()
    trainer = SimpleNamespace(_accelerator_connector=SimpleNamespace(use_distributed_sampler=True, is_distributed=True))
    kept = _DataConnector(trainer)._prepare_dataloader(loader, shuffle=stage == "train", mode=RunningStage.TRAINING)
    assert kept is loader
    _resolve_overfit_batches(combined := CombinedLoader([loader]), RunningStage.TRAINING)
    assert combined.flattened == [loader]


def test_an_epoch_is_one_pass(path: Path) -> None:
    data = make_data_module(path, batch_size=7)
    loader = data.train_dataloader()
    windows = (data.train_tokens.size // 16) // 7 * 7
    assert len(loader) == len(list(loader)) == data.steps_per_pass
    targets = torch.cat(list(loader))[:windows, 1:].flatten().tolist()
    assert Counter(targets) <= Counter(data.train_tokens.tolist())  # no token twice
    data.batch_size = 3
    assert data.steps_per_pass == len(data.train_dataloader()) == math.ceil(data.train_tokens.size // 16 / 3)


def test_setup_opens_the_corpus_once_and_is_required(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = CorpusDataModule(path, ctx_len=16)
    with pytest.raises(RuntimeError, match="setup"):
        data.train_dataloader()
    data.setup("fit")
    monkeypatch.setattr(Text, "open", None)
    data.prepare_data()
    data.setup()
    assert "noise" in data.description()
    assert "\n" not in data.description()


def test_data_name_selects_the_data_module(tmp_path: Path) -> None:
    settings = Data(name="enwik8", path="here", url="http://elsewhere")
    assert open_data(settings, 1, tmp_path, None).source == Enwik8(tmp_path / "here", "http://elsewhere")
    assert Enwik8DataModule("here", url="http://elsewhere").source == Enwik8("here", "http://elsewhere")
    settings = Data(name="text", path="here", val_path="there", field="body", split=[0.5, 0.25, 0.25])
    assert build_source(settings, tmp_path) == Text(tmp_path / "here", [0.5, 0.25, 0.25], tmp_path / "there", "body")
    data = open_data(Data(name="stdlib", ctx_len=16), 1, tmp_path, None)
    data.setup()
    assert data.corpus.name == "stdlib"
    assert data.ctx_len == 16
    assert data.steps_per_pass > 5000


@pytest.mark.parametrize("name", CORPORA)
def test_corpus_type_has_a_conf_file_with_the_settings_of_its_source(name: str, tmp_path: Path) -> None:
    keys = yaml.safe_load((Path(__file__).parents[2] / "conf" / "data" / f"{name}.yaml").read_text(encoding="utf-8"))
    assert keys["name"] == name
    assert keys["vocab"] in CORPORA[name].vocabularies
    needed = {"20b": {"vocab_path": "json"}, "unknown": {"vocab_size": 300}}.get(keys["vocab"], {})
    settings = Data(**keys | {"path": "here"} | needed)
    source = build_source(settings, tmp_path)
    fields = {field.name for field in dataclasses.fields(source)}
    assert fields & {field.name for field in dataclasses.fields(Data)} <= keys.keys()
    assert fields >= keys.keys() & {"path", "val_path", "url", "split", "field", "dtype"}


def test_every_corpus_type_is_registered() -> None:
    conf = (Path(__file__).parents[2] / "conf" / "data").glob("*.yaml")
    assert {path.stem for path in conf} == {*CORPORA, MIX}


class Recorder(LightningModule):
    """A model with one parameter that records its batches."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.read: list[Tensor] = []
        self.validated: list[Tensor] = []

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        self.read.append(batch.clone())
        return self.weight.sum() * batch.sum()

    def validation_step(self, batch: Tensor, _: int) -> None:
        self.validated.append(batch.clone())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("workers", [0, 2])
def test_trainer_resumes_with_the_next_batch(path: Path, tmp_path: Path, workers: int) -> None:
    def fit(max_steps: int, accumulate: int, resume: Path | None = None) -> tuple[Recorder, Trainer]:
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=max_steps,
            max_epochs=-1,
            accumulate_grad_batches=accumulate,
            val_check_interval=2 * accumulate,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        recorder = Recorder()
        trainer.fit(recorder, CorpusDataModule(path, ctx_len=16, batch_size=6, num_workers=workers), ckpt_path=resume)
        return recorder, trainer

    uninterrupted, _ = fit(6, 1)
    _, trainer = fit(3, 1)
    trainer.save_checkpoint(tmp_path / "stopped.ckpt")
    resumed, _ = fit(6, 3, tmp_path / "stopped.ckpt")
    assert torch.equal(torch.cat(resumed.read), torch.cat(uninterrupted.read[3:]))
    assert len(uninterrupted.validated) == 3 * math.ceil(math.ceil(200 / 16) / 8)
