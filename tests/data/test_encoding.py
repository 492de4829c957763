"""Encoding a large text: it continues after a kill and ends in the same bytes."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from small_20b import small_20b
from systems import WINDOWS

from rwkv_pl.data import byte_vocabulary, encoding, progress
from rwkv_pl.data.corpus import Corpus
from rwkv_pl.data.sources.text import Text
from rwkv_pl.data.token_file import open_tokens
from rwkv_pl.data.tokenizer_20b import Vocabulary20B
from rwkv_pl.data.vocabulary import Vocabulary
from rwkv_pl.errors import UserError

TEXT = "".join(f"{i} is a number, größer als {i - 1}.\n" for i in range(1500)).encode()
CHAR = Vocabulary("char", "ßö")


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(byte_vocabulary, "CHUNK", 2000)
    monkeypatch.setattr(encoding, "JOURNAL_BYTES", 9000)


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    (tmp_path / "text").write_bytes(TEXT)
    return Text(tmp_path / "text").open()


def names(cache: Path) -> list[str]:
    return sorted(path.suffix for path in (cache / "tokens").iterdir() if path.suffix != ".lock")


def expected(corpus: Corpus, vocabulary: Vocabulary) -> list[int]:
    return [i for lo, hi in corpus.character_splits() for i in vocabulary.encode(TEXT[lo:hi]).tolist()]


KILLED = """
import os, signal, sys
from pathlib import Path
from rwkv_pl.data import byte_vocabulary, encoding, token_file
from rwkv_pl.data.sources.text import Text
from rwkv_pl.data.vocabulary import Vocabulary
byte_vocabulary.CHUNK, encoding.JOURNAL_BYTES = 2000, 9000
path, module, name, call = sys.argv[1:]
module = {"encoding": encoding, "token_file": token_file, "os": os}[module]
original, calls = getattr(module, name), 0
def strike(*arguments):
    global calls
    calls += 1
    if calls == int(call):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments)
setattr(module, name, strike)
token_file.open_tokens(Text(path).open(), Vocabulary("char", "ßö"))
"""

# Before the record of a piece that is on the disk, after it, before the file has its name, and before its own record.
PLACES = [("encoding", "write_record", 3), ("os", "fsync", 4), ("encoding", "replace_with_retry", 1)]
PLACES.append(("token_file", "write_record", 1))


@pytest.mark.skipif(WINDOWS, reason="SIGKILL")
@pytest.mark.parametrize(("module", "name", "call"), PLACES)
def test_killed_encoding_continues_to_the_same_bytes(
    corpus: Corpus, cache: Path, monkeypatch: pytest.MonkeyPatch, module: str, name: str, call: int
) -> None:
    command = [sys.executable, "-c", KILLED, str(corpus.path), module, name, str(call)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    if name != "write_record" or module != "token_file":
        assert names(cache) == [".journal", ".unfinished"]
        (unfinished,) = (cache / "tokens").glob("*.unfinished")
        with unfinished.open("ab") as file:
            file.write(b"written after the last record")
    encoded: list[int] = []
    encode = Vocabulary.encode_documents

    def counted(self: Vocabulary, text: Any, ends: Any) -> Any:
        encoded.append(len(text))
        return encode(self, text, ends)

    monkeypatch.setattr(Vocabulary, "encode_documents", counted)
    file = open_tokens(corpus, CHAR)
    n_encoded = sum(encoded)
    assert file.tokens.tolist() == expected(corpus, CHAR)
    assert CHAR.decode(file.split("test")) == TEXT[slice(*corpus.splits.test)]
    assert names(cache) == [".json", ".uint16"]
    # What was journaled is not encoded again, unless the kill came after the file had its name but no record.
    assert (n_encoded < len(TEXT) - 9000) == (module != "token_file")


@pytest.mark.parametrize("kind", ["char", "20b"])
def test_interrupted_encoding_continues_to_the_same_bytes(
    corpus: Corpus, cache: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    vocabulary = CHAR if kind == "char" else Vocabulary20B(small_20b())
    whole = open_tokens(corpus, vocabulary)
    unbroken, splits = whole.path.read_bytes(), whole.splits
    whole.path.unlink()
    encode, calls = type(vocabulary).encode_documents, [0]

    def interrupted(self: Vocabulary, text: Any, ends: Any) -> Any:
        calls[0] += 1
        if calls[0] % 9 == 0:
            raise KeyboardInterrupt
        return encode(self, text, ends)

    monkeypatch.setattr(type(vocabulary), "encode_documents", interrupted)
    for _ in range(20):
        try:
            again = open_tokens(corpus, vocabulary)
            break
        except KeyboardInterrupt:
            assert names(cache)[:2] == [".journal", ".json"]
    assert calls[0] > 30
    assert (again.path.read_bytes(), again.splits) == (unbroken, splits)


def test_changed_text_starts_anew_and_removes_the_earlier_encoding(
    corpus: Corpus, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_late(path: Path, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(encoding, "replace_with_retry", fail_late)
        open_tokens(corpus, CHAR)
    assert names(cache) == [".journal", ".unfinished"]
    # A journal of other pieces does not fit.
    with monkeypatch.context() as patched:
        patched.setattr(byte_vocabulary, "CHUNK", 1777)
        (journal,) = (cache / "tokens").glob("*.journal")
        stored = encoding.read_record(journal)
        encoding.write_record(journal, stored | {"text": 2000})
        assert open_tokens(corpus, CHAR).tokens.tolist() == expected(corpus, CHAR)
    for path in (cache / "tokens").iterdir():
        path.unlink()
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(encoding, "replace_with_retry", fail_late)
        open_tokens(corpus, CHAR)
    corpus.path.write_bytes(TEXT[::-1])
    file = open_tokens(Text(corpus.path).open(), CHAR)
    assert CHAR.decode(file.tokens) == TEXT[::-1]
    assert names(cache) == [".json", ".uint16"]


def test_full_disk_ends_in_one_line_and_keeps_the_journaled_part(
    corpus: Corpus, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync, calls = os.fsync, [0]

    def full(handle: int) -> None:
        calls[0] += 1
        if calls[0] == 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(handle)

    with (
        monkeypatch.context() as patched,
        pytest.raises(UserError, match="disk full") as raised,
    ):
        patched.setattr(os, "fsync", full)
        open_tokens(corpus, CHAR)
    assert "\n" not in str(raised.value)
    (unfinished,) = (cache / "tokens").glob("*.unfinished")
    (journal,) = (cache / "tokens").glob("*.journal")
    kept = encoding.read_record(journal)
    assert kept is not None and 9000 <= kept["text"] < len(TEXT)
    assert unfinished.stat().st_size == kept["bytes"]
    assert open_tokens(corpus, CHAR).tokens.tolist() == expected(corpus, CHAR)


def test_text_that_cannot_be_encoded_leaves_no_files(corpus: Corpus, cache: Path) -> None:
    corpus.path.write_bytes(TEXT[:40_000] + b"\xff" + TEXT[40_000:])
    with pytest.raises(UserError, match=r"byte 40,000 of .*text is not UTF-8"):
        open_tokens(Text(corpus.path).open(), Vocabulary20B(small_20b()))
    assert names(cache) == []


def test_progress_in_a_pipe_is_lines(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    open_tokens(corpus, CHAR).path.unlink()
    assert capsys.readouterr().err == ""  # nothing before ten seconds
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0)
    open_tokens(corpus, CHAR)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 10
    assert lines[0].startswith("encoding text: ") and lines[-1] == "encoding text: 100%, 0 s left"
