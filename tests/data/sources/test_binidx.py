"""Megatron's binidx: read like Megatron reads it, split between documents; corrupt files give a one-line error."""

import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron_tokenizer_lite.indexed_dataset import MMapIndexedDataset
from small_20b import small_20b

from rwkv_pl.data.corpus import Splits
from rwkv_pl.data.datamodule import TokensDataModule
from rwkv_pl.data.sources import binidx
from rwkv_pl.data.sources.binidx import Binidx
from rwkv_pl.data.token_file import TokenFile
from rwkv_pl.data.tokenizer_20b import Vocabulary20B
from rwkv_pl.data.vocabulary import Vocabulary
from rwkv_pl.errors import UserError

SHARES = (0.5, 0.25, 0.25)
SMALL = Vocabulary20B(small_20b())
CODES = {"<u1": 1, "<i1": 2, "<i2": 3, "<i4": 4, "<i8": 5, "<u2": 8, "<u4": 9, "<u8": 10}


def write(prefix: Path, sequences: list[list[int]], documents: list[int] | None = None, dtype: str = "<u2") -> Path:
    """Write PREFIX.bin and PREFIX.idx by the format. Without `documents`, each sequence is one, and S comes last."""
    lengths = np.array([len(sequence) for sequence in sequences], "<i4")
    starts = (np.cumsum(lengths) - lengths).astype("<i8") * np.dtype(dtype).itemsize
    places = np.array(range(len(sequences) + 1) if documents is None else documents, "<i8")
    header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, CODES[dtype], len(lengths), len(places))
    Path(f"{prefix}.idx").write_bytes(header + lengths.tobytes() + starts.tobytes() + places.tobytes())
    Path(f"{prefix}.bin").write_bytes(np.array([i for ids in sequences for i in ids], dtype).tobytes())
    return prefix


def open_binidx(prefix: Path, vocabulary: Vocabulary, split: tuple[float, float, float] = SHARES) -> TokenFile:
    source = Binidx(prefix, split)
    return source.open_tokens(source.open(), vocabulary)


SENTENCES = [[*SMALL.encode(f"{i} is a number, and so is\n  {i * i}.".encode()).tolist(), 0] for i in range(40)]


@given(
    st.lists(st.lists(st.integers(0, 120), max_size=9), min_size=1, max_size=12).filter(any),
    st.sampled_from(sorted(CODES)),
)
def test_binidx_is_read_like_megatron(
    tmp_path_factory: pytest.TempPathFactory, sequences: list[list[int]], dtype: str
) -> None:
    prefix = write(tmp_path_factory.mktemp("corpus") / "some.v2", sequences, dtype=dtype)
    file = open_binidx(prefix, Vocabulary())
    flat = [i for ids in sequences for i in ids]
    assert file.tokens.tolist() == flat
    assert file.tokens.dtype.kind == "u"
    if CODES[dtype] <= 8:  # newer writers use 9 and 10
        theirs = MMapIndexedDataset(str(prefix))
        assert [i for k in range(len(theirs)) for i in theirs[k].tolist()] == flat
        index = Binidx(prefix, SHARES).index
        assert np.array_equal(index.documents, theirs.doc_idx)
        starts = np.cumsum([0, *theirs.sizes])[theirs.doc_idx].tolist()
        for at in range(len(flat)):
            assert index.document_start(at) == max(start for start in starts if start <= at)


def test_splits_are_cut_between_documents(tmp_path: Path) -> None:
    prefix = write(tmp_path / "corpus", SENTENCES)
    file = open_binidx(prefix, SMALL)
    starts = np.cumsum([0, *map(len, SENTENCES)]).tolist()
    n = starts[-1]
    (_, train), (_, val), (_, test) = file.splits
    assert train == max(start for start in starts if start <= round(n * 0.5))
    assert val == max(start for start in starts if start <= round(n * 0.75))
    assert test == n
    for name in Splits._fields:
        assert file.split(name)[-1] == 0  # each split ends with a document end
        text = SMALL.decode(file.split(name))
        assert file.split_bytes(name) == len(text)
    assert text.endswith(b"39 is a number, and so is\n  1521.")


@pytest.mark.parametrize(
    "documents",
    [[0, 40], [0], [], [0, 1, 40], [40, 40]],
    ids=["one", "no end", "none", "a small one", "empty ones"],
)
def test_split_left_empty_by_documents_is_cut_at_its_share(tmp_path: Path, documents: list[int]) -> None:
    file = open_binidx(write(tmp_path / "corpus", SENTENCES, documents), SMALL)
    n = len(file.tokens)
    half, three = round(n * 0.5), round(n * 0.75)
    assert file.splits == Splits((0, half), (half, three), (three, n))


def test_documents_of_several_sequences_without_the_last_end(tmp_path: Path) -> None:
    documents = [0, 4, 17, 18, 19, 30]  # some writers leave out the last end, 40
    file = open_binidx(write(tmp_path / "corpus", SENTENCES, documents), SMALL)
    starts = np.cumsum([0, *map(len, SENTENCES)])
    assert file.splits.val[0] in {starts[place] for place in documents}
    assert file.splits.test[0] in {starts[place] for place in documents}


@pytest.mark.parametrize("ending", ["", ".bin", ".idx"])
def test_either_file_name_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    write(tmp_path / "corpus.of.mine", SENTENCES)
    monkeypatch.chdir(tmp_path)
    corpus = Binidx(Path(f"corpus.of.mine{ending}"), SHARES).open()
    assert corpus.path == tmp_path / "corpus.of.mine.bin"
    assert corpus.name == "corpus.of.mine"


def test_file_is_mapped_in_place_and_pickled_by_name(tmp_path: Path, cache: Path) -> None:
    file = open_binidx(write(tmp_path / "corpus", SENTENCES * 50, dtype="<i4"), SMALL)
    assert file.path == tmp_path / "corpus.bin"
    assert isinstance(file.tokens.base, np.memmap)
    sent = pickle.dumps(file)
    assert len(sent) < 2000
    assert np.array_equal(pickle.loads(sent).tokens, file.tokens)
    assert pickle.loads(sent).split_bytes("val") == file.split_bytes("val")
    assert all(made.stat().st_size < 1000 for made in (cache / "tokens").iterdir())


def test_ids_are_checked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binidx, "BLOCK", 7)
    prefix = write(tmp_path / "corpus", SENTENCES)
    before = open_binidx(prefix, SMALL).n_bytes
    with monkeypatch.context() as patched:
        patched.setattr(binidx, "count_bytes", lambda *_: pytest.fail("counted again"))
        assert open_binidx(prefix, SMALL).n_bytes == before
    write(tmp_path / "corpus", SENTENCES[::-1])
    assert open_binidx(prefix, SMALL).n_bytes != before


@pytest.mark.parametrize(("dtype", "wrong"), [("<u2", 1281), ("<i4", -1), ("<i2", -2), ("<i8", 1 << 40), ("<i1", -1)])
@pytest.mark.parametrize("at", [0, 11, 39])
def test_invalid_id_is_reported_with_its_position(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path, dtype: str, wrong: int, at: int
) -> None:
    monkeypatch.setattr(binidx, "BLOCK", 7)
    ids = [[i] for i in range(40)]
    ids[at] = [wrong]
    with pytest.raises(UserError, match=rf"corpus.bin: token {at} is {wrong}, vocabulary 20b has 1,281") as caught:
        open_binidx(write(tmp_path / "corpus", ids, dtype=dtype), SMALL)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"token"):  # nothing of it is cached
        open_binidx(tmp_path / "corpus", SMALL)


def header(**parts: Any) -> bytes:
    header = {"magic": b"MMIDIDX\0\0", "version": 1, "code": 8, "sequences": 3, "documents": 2} | parts
    return header["magic"] + struct.pack("<QBQQ", *list(header.values())[1:])


LENGTHS, PLACES, DOCUMENTS = np.array([2, 0, 3], "<i4"), np.array([0, 4, 4], "<i8"), np.array([0, 3], "<i8")


def index(first: bytes = b"", lengths: Any = LENGTHS, places: Any = PLACES, documents: Any = DOCUMENTS) -> bytes:
    kinds = (lengths, "<i4"), (places, "<i8"), (documents, "<i8")
    return (first or header()) + b"".join(np.array(values, kind).tobytes() for values, kind in kinds)


DAMAGED = {
    "whole": (index(), 10, None),
    "empty index": (b"", 10, "not a binidx index"),
    "another format": (b"TNTIDX\0\0" + index()[8:], 10, "not a binidx index"),
    "a web page": (b"<!DOCTYPE html>" * 9, 10, "not a binidx index"),
    "a cut header": (index()[:30], 10, "not a binidx index"),
    "another version": (index(header(version=2)), 10, "has version 2 of the binidx format; only version 1"),
    "float32": (index(header(code=6)), 10, "declares floating-point numbers in corpus.bin"),
    "float64": (index(header(code=7)), 10, "declares floating-point numbers in corpus.bin"),
    "an unknown dtype": (index(header(code=77)), 10, "an unknown dtype .code 77."),
    "cut short": (index()[:-1], 10, "has 85 bytes, an index of 3 sequences and 2 documents has 86"),
    "too long": (index() + b"\0", 10, "has 87 bytes, an index of 3 sequences and 2 documents has 86"),
    "huge counts": (index(header(sequences=2**63)), 10, "it is truncated, or its header is wrong"),
    "a short corpus": (index(), 8, "corpus.bin has 8 bytes, its index corpus.idx needs 10"),
    "a cut corpus": (index(), 9, "corpus.bin has 9 bytes, its index corpus.idx needs 10"),
    "a long corpus": (index(), 12, "corpus.bin has 12 bytes, its index corpus.idx needs 10"),
    "an empty corpus": (index(), 0, "is empty"),
    "no sequences": (index(header(sequences=0), [], []), 10, "is empty"),
    "gaps": (index(places=[0, 4, 6]), 12, "sequence 2 does not follow the one before it"),
    "another order": (index(places=[6, 4, 0]), 10, "sequence 0 does not follow the one before it"),
    "a negative length": (index(lengths=[2, -1, 4]), 10, "sequence 1 does not follow the one before it"),
    "documents outside": (index(documents=[0, 4]), 10, "its documents are not in order within its 3 sequences"),
    "documents before": (index(documents=[-1, 3]), 10, "its documents are not in order within its 3 sequences"),
    "documents that fall": (index(documents=[2, 1]), 10, "its documents are not in order within its 3 sequences"),
}


@pytest.mark.parametrize("block", [1, 2, 1 << 22])
@pytest.mark.parametrize("name", DAMAGED)
def test_corrupt_index_gives_one_line_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, block: int
) -> None:
    monkeypatch.setattr(binidx, "BLOCK", block)
    content, n_bytes, said = DAMAGED[name]
    (tmp_path / "corpus.idx").write_bytes(content)
    (tmp_path / "corpus.bin").write_bytes(bytes(n_bytes))
    if said is None:
        assert len(open_binidx(tmp_path / "corpus", Vocabulary()).tokens) == 5
        return
    with pytest.raises(UserError, match=said) as caught:
        open_binidx(tmp_path / "corpus", Vocabulary())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", [".bin", ".idx"])
def test_missing_file_gives_one_line_error(tmp_path: Path, missing: str) -> None:
    write(tmp_path / "corpus", SENTENCES)
    (tmp_path / f"corpus{missing}").unlink()
    with pytest.raises(UserError, match=rf"data.path=.*corpus: there is no .*corpus{missing}; a binidx corpus is"):
        open_binidx(tmp_path / "corpus", SMALL)


def test_data_module_of_binidx(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(small_20b(), encoding="utf-8")
    prefix = write(tmp_path / "corpus", SENTENCES)
    data = TokensDataModule(
        prefix, vocab="20b", vocab_path=tmp_path / "tokenizer.json", split=SHARES, ctx_len=16, eval_batch_size=4
    )
    data.prepare_data()
    data.setup()
    ids = np.concatenate(SENTENCES)
    assert np.array_equal(data.train_tokens, ids[: len(data.train_tokens)])
    assert next(iter(data.train_dataloader())).shape == (1, 17)
    lo, hi = data.corpus.splits.val
    read = np.concatenate([batch[:, 1:].flatten() for batch in data.val_dataloader()])
    assert read[read >= 0].tolist() == ids[lo:hi].tolist()
    description = data.description()
    assert f"{len(SMALL.decode(ids)):,} bytes" in description
    assert f"vocabulary 20b ({SMALL.size})" in description
