"""Vocabulary and token files: every byte string comes back, in pieces or whole, and its size costs no memory."""

import json
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rwkv_pl.data import corpus as corpora
from rwkv_pl.data import tokens
from rwkv_pl.data.tokens import Vocabulary, build_vocabulary, open_tokens
from rwkv_pl.errors import UserError

CHARACTERS = "".join(sorted("éßЖ漢字😀\u0080\u07ff\u0800\uffff\U00010000\U0010ffff"))
CHAR = Vocabulary("char", CHARACTERS)

# Text, noise, and text with noise inside: what UTF-8 decoders get wrong lies between the two.
PIECES = st.one_of(
    st.binary(max_size=6),
    st.text(max_size=6).map(str.encode),
    st.text(alphabet=CHARACTERS + "añ", max_size=6).map(str.encode),
    st.text(alphabet=CHARACTERS, min_size=1, max_size=2).map(lambda text: text.encode()[:-1]),
    st.sampled_from([b"\xc0\xaf", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe0\x80\x80", b"\xf8\x88\x80\x80\x80"]),
)
TEXTS = st.lists(PIECES, max_size=8).map(b"".join)


def plain_encode(text: bytes, characters: str) -> list[int]:
    """From left to right, as one would say it: a character that is in the vocabulary, else one byte."""
    ids, at = [], 0
    while at < len(text):
        for length in (2, 3, 4):
            try:
                character = text[at : at + length].decode()
            except UnicodeDecodeError:
                continue
            if len(character) == 1 and character in characters:
                ids.append(256 + characters.index(character))
                at += length
                break
        else:
            ids.append(text[at])
            at += 1
    return ids


@given(TEXTS)
@example("naïve café 漢字 😀".encode())
@example(b"\xe6\xbc")
@example(b"\xf8\x90\x80\x80 spells U+10000 if one looks away")
@example(b"\xe0\x82\x80 is too long for U+0080")
@example(b"")
def test_char_encoding_is_the_plain_one_and_comes_back(text: bytes) -> None:
    ids = CHAR.encode(text)
    assert ids.tolist() == plain_encode(text, CHARACTERS)
    assert CHAR.decode(ids) == text
    assert CHAR.bytes_per_token[ids].sum() == len(text)


@given(st.binary())
def test_byte_tokens_are_the_bytes(text: bytes) -> None:
    vocabulary = Vocabulary()
    ids = vocabulary.encode(text)
    assert ids.dtype == np.uint8
    assert ids.tolist() == list(text)
    assert vocabulary.decode(ids) == text


@given(st.lists(st.integers(0, CHAR.size - 1)))
def test_any_ids_are_text(ids: list[int]) -> None:
    spelled = b"".join(bytes([i]) if i < 256 else CHARACTERS[i - 256].encode() for i in ids)
    assert CHAR.decode(ids) == spelled
    assert CHAR.bytes_per_token[np.array(ids, int)].sum() == len(spelled)


@given(TEXTS, st.integers(0, 60))
def test_a_cut_moves_to_the_start_of_the_character_it_breaks(text: bytes, at: int) -> None:
    at = min(at, len(text))
    data = np.frombuffer(text, np.uint8)
    start = corpora.character_start(data, at)
    assert at - 3 <= start <= at
    everything = Vocabulary("char", "".join(sorted({c for c in text.decode(errors="ignore") if c > "\x7f"})))
    whole = everything.encode(text).tolist()
    assert everything.encode(text[:start]).tolist() + everything.encode(text[start:]).tolist() == whole
    if start != at:
        assert everything.encode(text[:at]).tolist() + everything.encode(text[at:]).tolist() != whole


def test_ids_are_the_smallest_unsigned_integers() -> None:
    assert Vocabulary("char", "é").dtype == np.uint16
    many = "".join(map(chr, range(0x10000, 0x10000 + 65536)))
    assert Vocabulary("char", many).dtype == np.uint32
    assert Vocabulary("char", many[: 65536 - 256]).dtype == np.uint16


def test_a_vocabulary_survives_json() -> None:
    for vocabulary in (Vocabulary(), CHAR):
        stored = json.loads(json.dumps(vocabulary.to_dict()))
        again = Vocabulary.from_dict(stored)
        assert again == vocabulary
        assert again.digest == vocabulary.digest
        assert again.encode("é漢".encode()).tolist() == vocabulary.encode("é漢".encode()).tolist()
    assert Vocabulary().digest != CHAR.digest
    assert Vocabulary() != CHAR


@pytest.mark.parametrize(
    "stored", [{}, [], None, {"kind": "char", "characters": "ba"}, {"kind": "char", "characters": "\ud800"}]
)
def test_a_damaged_vocabulary_is_one_line(stored: object) -> None:
    with pytest.raises(UserError, match="stored vocabulary is damaged") as caught:
        Vocabulary.from_dict(stored)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_an_unknown_kind_names_the_known() -> None:
    with pytest.raises(UserError, match=r"vocab=word is not available.*byte, char, 20b"):
        Vocabulary("word")


TEXT = ("Zwölf Boxkämpfer jagen Viktor 😀 " * 20 + "über den großen Sylter Deich: 漢字").encode() + b"\xff\xe6\xbc\n"


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 7, 64, 1 << 20])
def test_a_token_file_does_not_depend_on_the_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    path = tmp_path / "text"
    path.write_bytes(TEXT)
    corpus = corpora.text(path)
    monkeypatch.setattr(tokens, "CHUNK", chunk)
    vocabulary = build_vocabulary("char", corpus)
    lo, hi = corpus.splits.train
    assert vocabulary.characters == "".join(sorted({c for c in TEXT[lo:hi].decode() if c > "\x7f"}))
    file = open_tokens(corpus, vocabulary)
    assert file.tokens.dtype == vocabulary.dtype
    for name in ("train", "val", "test"):
        lo, hi = getattr(corpus.splits, name)
        assert file.split(name).tolist() == vocabulary.encode(TEXT[lo:hi]).tolist()
        assert vocabulary.decode(file.split(name)) == TEXT[lo:hi]


def test_splits_that_cut_a_character_move(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes("é".encode() * 10)
    corpus = corpora.Corpus("x", path, corpora.Splits((0, 15), (15, 17), (17, 20)), corpora.file_digest(path), "")
    file = open_tokens(corpus, build_vocabulary("char", corpus))
    assert file.splits == corpora.Splits((0, 7), (7, 8), (8, 10))
    assert set(file.tokens.tolist()) == {256}
    assert open_tokens(corpus, Vocabulary()).splits == corpus.splits


def test_what_is_no_text_adds_no_character(tmp_path: Path) -> None:
    path = tmp_path / "text"
    noise = b"\xed\xa0\x80 \xf4\x90\x80\x80 \xe0\x82\x80 \xf8\x90\x80\x80 \xc1\x81 \xf0\x80\x82\x80 \x80 \xff"
    path.write_bytes((noise + "é".encode()) * 50)
    vocabulary = build_vocabulary("char", corpora.text(path))
    assert vocabulary.characters == "é"


def test_a_change_that_the_digest_does_not_see_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(TEXT)
    corpus = corpora.text(path)
    vocabulary = build_vocabulary("char", corpus)
    open_tokens(corpus, vocabulary)
    path.write_bytes(TEXT[::-1])
    os.utime(path, ns=(0, 0))
    assert vocabulary.decode(open_tokens(corpus, vocabulary).tokens) == TEXT[::-1]


def test_tokens_are_made_once_and_a_changed_text_anew(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(TEXT)
    corpus = corpora.text(path)

    def snapshot() -> dict[str, int]:
        return {file.name: file.stat().st_mtime_ns for file in (cache / "tokens").iterdir() if file.suffix != ".lock"}

    results: list[tokens.TokenFile] = []
    threads = [
        threading.Thread(target=lambda: results.append(open_tokens(corpus, build_vocabulary("char", corpus))))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({(file.path, file.splits, file.digest) for file in results}) == 1
    first = snapshot()
    assert len(first) == 3
    open_tokens(corpus, build_vocabulary("char", corpus))
    assert snapshot() == first
    path.write_bytes(TEXT.replace(b"Z", b"z"))
    changed = corpora.text(path)
    assert open_tokens(changed, build_vocabulary("char", changed)).path != results[0].path


def test_an_encoding_that_was_interrupted_leaves_nothing(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "text"
    path.write_bytes(TEXT)
    corpus = corpora.text(path)
    vocabulary = build_vocabulary("char", corpus)
    with monkeypatch.context() as patched:
        patched.setattr(Vocabulary, "encode", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            open_tokens(corpus, vocabulary)
    assert [file for file in (cache / "tokens").iterdir() if "char-" not in file.name and file.suffix != ".lock"] == []
    assert vocabulary.decode(open_tokens(corpus, vocabulary).tokens) == TEXT


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "text"
    path.write_bytes(TEXT)
    monkeypatch.setenv("RWKV_PL_CACHE", str(path))
    with pytest.raises(UserError, match=r"cannot write in .*tokens"):
        build_vocabulary("char", corpora.text(path))


def test_a_worker_gets_the_name_of_a_token_file(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(TEXT * 100)
    file = open_tokens(corpora.text(path), Vocabulary())
    assert len(file.tokens) == len(TEXT) * 100
    sent = pickle.dumps(file)
    assert len(sent) < 2000
    assert np.array_equal(pickle.loads(sent).tokens, file.tokens)


BIG = """
import resource, sys
from rwkv_pl.data.datamodule import CorpusDataModule
import torch
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
data = CorpusDataModule(sys.argv[1], batch_size=64)
data.prepare_data()
data.setup()
batches = iter(data.train_dataloader())
for _ in range(3):
    batch = next(batches)
    assert batch.shape == (64, 1025)
next(iter(data.val_dataloader()))
print(len(data.train_tokens), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="sparse files and ru_maxrss in KiB")
def test_a_hundred_gigabytes_cost_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "big"
    try:
        with path.open("wb") as file:
            file.truncate(100 * 10**9)
    except OSError:
        pytest.skip("this file system has no sparse files of 100 GB")
    if path.stat().st_blocks > 2048:
        pytest.skip("this file system has no sparse files")
    done = subprocess.run([sys.executable, "-c", BIG, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    n_tokens, kib = map(int, done.stdout.split())
    assert n_tokens == 90 * 10**9
    assert kib < 64 * 1024
