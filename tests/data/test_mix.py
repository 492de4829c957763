"""Mixes: which corpus each sample is read from, and the batches and scores of several corpora."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import Trainer

from rwkv_pl import RWKV4, CorpusDataModule, LitRWKV, MixDataModule, RWKV4Config, use_kernel
from rwkv_pl.data.datamodule import TrainBatches
from rwkv_pl.data.order import micro_batch_rows, place_samples, read_windows, window_starts
from rwkv_pl.errors import UserError

SHARES = st.lists(st.integers(1, 2**26) | st.integers(1, 9), min_size=1, max_size=8)


@pytest.fixture(autouse=True)
def kernel() -> Iterator[None]:
    """Build no kernel: the cache of this folder's tests is empty."""
    with use_kernel("scan"):
        yield


def place_exactly(sample: int, shares: list[int]) -> tuple[int, int]:
    """Place one sample, in Python's integers of any size: written from the equation, without numpy."""
    for c, share in enumerate(shares[:-1]):
        total = sum(shares[c:])
        before = sample * share // total
        if (sample + 1) * share // total > before:
            return c, before
        sample -= before
    return len(shares) - 1, sample


def make_texts(folder: Path) -> dict[str, dict[str, object]]:
    letters = np.frombuffer(b"abcdefgh", np.uint8)
    random = np.random.default_rng(0)
    for name, size in {"lower": 3000, "upper": 5000}.items():
        text = random.choice(letters, size).tobytes()
        (folder / name).write_bytes(text.upper() if name == "upper" else text)
    return {"lower": {"path": str(folder / "lower"), "share": 1}, "upper": {"path": str(folder / "upper"), "share": 3}}


@given(shares=SHARES, first=st.integers(0, 2**62) | st.integers(0, 1000))
def test_samples_are_placed_as_in_exact_arithmetic(shares: list[int], first: int) -> None:
    corpus, index = place_samples(first + np.arange(20, dtype=np.int64), shares)
    placed = list(zip(corpus.tolist(), index.tolist(), strict=True))
    assert placed == [place_exactly(first + i, shares) for i in range(20)]


@given(shares=SHARES)
def test_each_sample_of_each_corpus_occurs_once_and_in_order(shares: list[int]) -> None:
    corpus, index = place_samples(np.arange(2000, dtype=np.int64), shares)
    for c in range(len(shares)):
        mine = index[corpus == c]
        assert np.array_equal(mine, np.arange(len(mine)))


@given(shares=SHARES.filter(lambda shares: len(shares) > 1), first=st.integers(0, 2**61), size=st.integers(1, 300))
def test_batch_holds_each_share_within_the_bound(shares: list[int], first: int, size: int) -> None:
    corpus, _ = place_samples(first + np.arange(size, dtype=np.int64), shares)
    for c, share in enumerate(shares):
        # In whole numbers, since the bound is strict.
        excess = int((corpus == c).sum()) * sum(shares) - size * share
        assert abs(excess) < (len(shares) - 1) * sum(shares)


def test_largest_shares_do_not_overflow() -> None:
    shares = [2**30, 2**30 - 1]
    samples = 2**62 + np.arange(9, dtype=np.int64)
    corpus, index = place_samples(samples, shares)
    assert list(zip(corpus.tolist(), index.tolist(), strict=True)) == [place_exactly(int(i), shares) for i in samples]


@pytest.mark.parametrize(("accumulate", "world_size"), [(1, 1), (2, 1), (1, 3), (2, 3)])
def test_each_corpus_is_read_in_its_own_order(tmp_path: Path, accumulate: int, world_size: int) -> None:
    """Corpus c reads its samples like a run on it alone with seed + c, however the batch is divided."""
    size, ctx_len = 12, 16
    data = MixDataModule(make_texts(tmp_path), batch_size=size, ctx_len=ctx_len, seed=7)
    data.setup()
    tokens = [file.split("train") for file in data.token_files.values()]
    for n in (0, 5, 400):
        corpus, index = place_samples(n * size + np.arange(size), [1, 3])
        expected = np.empty((size, ctx_len + 1), np.int64)
        for row, (c, i) in enumerate(zip(corpus, index, strict=True)):
            start = window_starts(int(i), seed=7 + int(c), n_tokens=len(tokens[c]), ctx_len=ctx_len, batch_size=1)
            expected[row] = read_windows([tokens[c]], start, ctx_len)[0]
        for rank in range(world_size):
            batches = TrainBatches(
                list(data.token_files.values()), [1, 3], seed=7, ctx_len=ctx_len, batch_size=size,
                world_size=world_size, rank=rank, accumulate=accumulate,
            )  # fmt: skip
            for a in range(accumulate):
                rows = micro_batch_rows(size, world_size=world_size, rank=rank, accumulate=accumulate, micro_batch=a)
                assert np.array_equal(batches[n * accumulate + a].numpy(), expected[rows])


def test_mix_of_one_corpus_reads_the_batches_of_that_corpus(tmp_path: Path) -> None:
    alone = CorpusDataModule(make_texts(tmp_path)["lower"]["path"], batch_size=4, ctx_len=16, endless=True)
    mix = MixDataModule(
        {"lower": {"path": tmp_path / "lower", "share": 5, "split": (0.9, 0.05, 0.05)}}, batch_size=4, ctx_len=16
    )
    for data in (alone, mix):
        data.setup()
    for m in (0, 3, 999):
        assert torch.equal(alone.train_dataloader().dataset[m], mix.train_dataloader().dataset[m])


def test_char_vocabulary_has_the_characters_of_every_corpus(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("é" * 500, encoding="utf-8")
    (tmp_path / "b").write_text("ß" * 500, encoding="utf-8")
    corpora = {name: {"path": tmp_path / name, "share": 1} for name in "ab"}
    data = MixDataModule(corpora, ctx_len=16, vocab="char")
    data.setup()
    assert data.vocabulary.characters == "ßé"
    assert data.description().count("\n") == 2


def test_validation_scores_each_corpus_and_all_bytes_together(tmp_path: Path) -> None:
    data = MixDataModule(make_texts(tmp_path), batch_size=4, ctx_len=16)
    module = LitRWKV(RWKV4(RWKV4Config(vocab_size=256, n_layer=1, n_embd=8)))
    trainer = Trainer(accelerator="cpu", max_steps=2, logger=False, enable_checkpointing=False)
    trainer.fit(module, data)
    for split, run in {"val": trainer.validate, "test": trainer.test}.items():
        run(module, data, verbose=False)
        scores = {name: float(score) for name, score in trainer.callback_metrics.items()}
        sizes = [file.split_bytes(split) for file in data.token_files.values()]
        each = [scores[f"{split}/bits_per_byte/{name}"] for name in ("lower", "upper")]
        assert scores[f"{split}/bits_per_byte"] == pytest.approx(np.average(each, weights=sizes), rel=1e-6)
        assert each[0] != each[1]
    assert [len(batches) for batches in trainer.predict(module, data)] == [2, 2]


def test_mix_needs_max_steps(tmp_path: Path) -> None:
    data = MixDataModule(make_texts(tmp_path), ctx_len=16)
    module = LitRWKV(RWKV4(RWKV4Config(vocab_size=256, n_layer=1, n_embd=8)))
    with pytest.raises(UserError, match="give the Trainer max_steps"):
        Trainer(accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False).fit(module, data)


def test_error_names_the_corpus(tmp_path: Path) -> None:
    corpora = make_texts(tmp_path)
    (tmp_path / "upper").write_bytes(b"A" * 40)
    with pytest.raises(UserError, match=r"data\.corpora\.upper: the training split has 36 tokens"):
        MixDataModule(corpora, ctx_len=64).setup()
    data = MixDataModule(make_texts(tmp_path), batch_size=4, ctx_len=16)
    data.setup()
    (tmp_path / "upper").write_bytes(b"A" * 3001)
    with pytest.raises(UserError, match="upper changed during the run"):
        data.train_dataloader().dataset[0]


def test_passes_are_the_samples_of_each_corpus(tmp_path: Path) -> None:
    data = MixDataModule(make_texts(tmp_path), batch_size=4, ctx_len=16)
    data.setup()
    windows = {"lower": 2700 // 16, "upper": 4500 // 16}
    assert data.passes(50) == pytest.approx({"lower": 50 / windows["lower"], "upper": 150 / windows["upper"]})
    assert data.steps_per_pass == windows["lower"]
