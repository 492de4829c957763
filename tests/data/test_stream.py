"""A stream: each row reads on, every token is used, devices do not matter, and no state passes a document's end."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_20b import small_20b
from test_datamodule import attach_trainer, take

from rwkv_pl import CorpusDataModule, MixDataModule, TokensDataModule
from rwkv_pl.config import Data
from rwkv_pl.data.document_ends import DocumentEnds
from rwkv_pl.data.order import steps_per_pass, stream_restarts, stream_starts
from rwkv_pl.errors import UserError

SIZES = st.tuples(st.integers(2, 300), st.integers(1, 40), st.integers(1, 12)).filter(lambda size: size[0] > size[1])


def starts_of(n: int, size: tuple[int, int, int]) -> Any:
    n_tokens, ctx_len, batch_size = size
    return stream_starts(n, n_tokens=n_tokens, ctx_len=ctx_len, batch_size=batch_size)


@given(SIZES, st.integers(0, 10**18))
def test_each_row_reads_on_where_it_ended(size, n):
    n_tokens, ctx_len, _ = size
    assert np.array_equal((starts_of(n, size) + ctx_len) % n_tokens, starts_of(n + 1, size))


@given(SIZES)
def test_rows_start_evenly_spaced_and_read_every_token_once_before_any_twice(size):
    n_tokens, ctx_len, batch_size = size
    space = n_tokens // batch_size
    assert starts_of(0, size).tolist() == [b * space for b in range(batch_size)]
    counts = np.zeros(n_tokens, np.int64)
    for n in range(space // ctx_len):  # until the first row comes to the start of the second
        targets = (starts_of(n, size)[:, None] + 1 + np.arange(ctx_len)) % n_tokens
        np.add.at(counts, targets, 1)
    assert counts.max() <= 1
    for n in range(space // ctx_len, -(-(space + n_tokens % batch_size) // ctx_len)):
        targets = (starts_of(n, size)[:, None] + 1 + np.arange(ctx_len)) % n_tokens
        np.add.at(counts, targets, 1)
    assert counts.min() >= 1
    # A pass has as many steps as in the random order, and leaves out less than a window of a row's text.
    assert steps_per_pass(n_tokens, ctx_len, batch_size) * ctx_len > space - ctx_len


def test_starts_of_a_large_corpus_match_plain_integers():
    n_tokens, ctx_len, batch_size = 10**12 + 7, 4096, 6
    for n in (1, 10**9, 10**15):
        expected = [(b * (n_tokens // batch_size) + n * ctx_len) % n_tokens for b in range(batch_size)]
        assert stream_starts(n, n_tokens=n_tokens, ctx_len=ctx_len, batch_size=batch_size).tolist() == expected


def test_corpus_shorter_than_a_window_is_an_error():
    with pytest.raises(UserError, match=r"10 tokens.*ctx_len=10 needs 11"):
        stream_starts(0, n_tokens=10, ctx_len=10, batch_size=1)


@given(SIZES, st.sets(st.integers(0, 299)), st.integers(0, 60))
def test_rows_restart_after_a_window_with_a_documents_end(size, ends, n):
    """The end of the training split is that of a document too."""
    n_tokens, ctx_len, batch_size = size
    known = np.array(sorted(end for end in ends if end < n_tokens), np.int64)
    last = {*known.tolist(), n_tokens - 1}
    found = stream_restarts(n, starts_of(n, size), ctx_len=ctx_len, document_ends=known)
    for b, restarts in enumerate(found):
        begin = b * (n_tokens // batch_size) + (n - 1) * ctx_len
        assert restarts == (n == 0 or any((begin + t) % n_tokens in last for t in range(ctx_len)))


DOCUMENTS = ["first ÄÖ\n", "\n", "the second,\nof two lines", "third: ß\n\n", "4"] * 3


def make_text(folder: Path, **settings: Any) -> CorpusDataModule:
    (folder / "text").mkdir()
    for i, document in enumerate(DOCUMENTS):
        (folder / "text" / f"{i:02}").write_bytes(document.encode())
    return CorpusDataModule(
        folder / "text", split=(0.6, 0.2, 0.2), stream=True, endless=True, **{"ctx_len": 4, "batch_size": 6} | settings
    )


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RWKV_PL_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("vocab", ["byte", "char", "20b"])
@pytest.mark.parametrize("block", [5, 1 << 20])
def test_documents_of_a_text_end_at_their_marks(tmp_path, monkeypatch, vocab, block):
    monkeypatch.setattr("rwkv_pl.data.document_ends.BLOCK", block)
    settings = {}
    if vocab == "20b":
        settings = {"vocab_path": tmp_path / "20b.json"}
        settings["vocab_path"].write_text(small_20b(), encoding="utf-8")
    data = make_text(tmp_path, vocab=vocab, **settings)
    data.setup()
    ends = data._document_ends.positions
    tokens = data.token_file.tokens
    assert len(ends) == len(DOCUMENTS) - 1
    begin = 0
    for document, end in zip(DOCUMENTS, ends, strict=False):
        assert data.vocabulary.decode(tokens[begin:end]).decode() == document
        assert tokens[end] == data.vocabulary.document_end
        begin = int(end) + 1
    assert isinstance(pickle.loads(pickle.dumps(data._document_ends)), DocumentEnds)


def test_one_text_has_no_documents(tmp_path):
    (tmp_path / "one.txt").write_text("one\ntext\n" * 40)
    data = CorpusDataModule(tmp_path / "one.txt", ctx_len=4, stream=True)
    data.setup()
    assert len(data._document_ends.positions) == 0


def test_documents_of_token_ids_end_at_their_last_token():
    documents = [[1, 2, 3], [4], [5, 6]] * 5
    data = TokensDataModule(documents, vocab_size=9, ctx_len=2, batch_size=2, stream=True, split=(0.6, 0.2, 0.2))
    data.setup()
    assert data._document_ends.positions.tolist() == (np.cumsum([len(d) for d in documents])[:-1] - 1).tolist()


@pytest.mark.parametrize(("devices", "accumulate", "workers"), [(1, 1, 2), (1, 3, 0), (2, 3, 0), (3, 2, 0)])
def test_batches_and_restarts_are_the_same_on_any_hardware(tmp_path, devices, accumulate, workers):
    data = make_text(tmp_path)
    data.setup()
    whole = take(data.train_dataloader(), 8)
    assert any(batch.restarts.any() and not batch.restarts.all() for batch in whole[1:])
    data.num_workers = workers
    parts = []
    for rank in range(devices):
        attach_trainer(data, step=2, devices=devices, rank=rank, accumulate=accumulate)
        parts.append(take(data.train_dataloader(), 6 * accumulate))
    for n, batch in enumerate(whole[2:]):
        pieces = [parts[d][n * accumulate + a] for a in range(accumulate) for d in range(devices)]
        assert torch.equal(torch.cat([piece.tokens for piece in pieces]), batch.tokens)
        assert torch.equal(torch.cat([piece.restarts for piece in pieces]), batch.restarts)


def test_mix_has_no_streams():
    corpora = {"a": {"name": "stdlib", "share": 1}, "b": {"name": "stdlib", "share": 1}}
    with pytest.raises(UserError, match="stream=True reads one corpus: a mix draws"):
        MixDataModule(corpora, stream=True)
    with pytest.raises(UserError, match=r"data.stream=true reads one corpus, and data=mix draws"):
        Data(name="mix", corpora=corpora, stream=True)
    with pytest.raises(UserError, match=r"data.corpora.a.stream is not a setting"):
        Data(name="mix", corpora={"a": {"name": "stdlib", "share": 1, "stream": True}})
