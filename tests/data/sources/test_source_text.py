"""Text corpora: one or many files, compressed or as rows, with splits or a separate validation text."""

import concurrent.futures
import errno
import gzip
import hashlib
import os
from pathlib import Path

import pytest

from rwkv_pl.data.corpus import Splits
from rwkv_pl.data.documents import join_documents
from rwkv_pl.data.sources import text as text_source
from rwkv_pl.data.sources.text import Text
from rwkv_pl.errors import UserError

CONTENT = bytes(i * i % 251 for i in range(100_000))


def test_unusable_text_gives_one_line_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        Text(tmp_path / "absent").open()
    path = tmp_path / "text"
    path.write_bytes(b"")
    with pytest.raises(UserError, match="is empty"):
        Text(path).open()
    path.write_bytes(b"words")
    for split in [(0.9, 0.2, 0.1), (1.1, -0.1, 0.0), (0.5, 0.5), (float("nan"), 0.5, 0.5)]:
        with pytest.raises(UserError, match=r"data.split must be three fractions"):
            Text(path, split).open()  # type: ignore[arg-type]


def test_text_is_split_between_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"x" * 89 + "漢".encode() + b"y" * 8)
    corpus = Text(path).open()
    assert corpus.splits == Splits((0, 89), (89, 95), (95, 100))
    assert corpus.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert Text(path, (0.2, 0.3, 0.5)).open().splits == Splits((0, 20), (20, 50), (50, 100))
    # A relative name refers to the folder in which the run started, even if the process changes its folder later.
    monkeypatch.chdir(tmp_path)
    assert Text("text").open().path == path


def test_compressed_text_equals_the_plain_text(tmp_path: Path, cache: Path) -> None:
    plain, packed = tmp_path / "a.txt", tmp_path / "b.txt.gz"
    plain.write_bytes(CONTENT)
    packed.write_bytes(gzip.compress(CONTENT))
    a, b = Text(plain).open(), Text(packed).open()
    assert b.path.parent == cache / "corpora"
    assert b.path.read_bytes() == CONTENT
    assert (a.splits, a.digest) == (b.splits, b.digest)
    assert (a.ends_path, b.ends_path) == (None, None)
    assert a.document_ends.shape == b.document_ends.shape == (0,)
    assert str(b).startswith(f"b.txt.gz ({packed}, digest ")


def test_joined_text_is_cached_until_a_source_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    folder = tmp_path / "books"
    folder.mkdir()
    for name in "cab":
        (folder / name).write_text(f"book {name}")
    calls = []
    monkeypatch.setattr(text_source, "join_documents", lambda *arguments: calls.append(1) or join_documents(*arguments))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        one, *others = pool.map(lambda _: Text(folder).open(), range(4))
    assert others == [one] * 3
    assert len(calls) == 1
    assert one.path.read_bytes() == b"book a\nbook b\nbook c"
    assert one.document_ends.tolist() == [6, 13]
    assert one.description == f"{folder}, 3 files, 3 documents"
    # Corrupt cache files are rebuilt.
    for path in (one.path, one.ends_path, one.path.with_suffix(".json")):
        assert path is not None
        path.write_bytes(b"?" * 16)
        assert Text(folder).open() == one
        assert one.path.read_bytes() == b"book a\nbook b\nbook c"
        assert one.document_ends.tolist() == [6, 13]
    assert len(calls) == 4
    # A change that keeps size and time is detected, and the old file stays, since a run may still read it.
    before = (folder / "a").stat()
    (folder / "a").write_text("BOOK A")
    os.utime(folder / "a", ns=(before.st_atime_ns, before.st_mtime_ns))
    other = Text(folder).open()
    assert other.path.read_bytes() == b"BOOK A\nbook b\nbook c"
    assert one.path.read_bytes() == b"book a\nbook b\nbook c"
    assert other.digest != one.digest
    # The moved folder is another source of the same text.
    moved = Text(folder.rename(tmp_path / "moved")).open()
    assert moved.path != other.path
    assert moved.digest == other.digest
    (tmp_path / "moved" / "d").write_text("")
    assert Text(tmp_path / "moved").open().document_ends.tolist() == [6, 13]
    assert {path.suffix for path in (cache / "corpora").iterdir()} - {".lock"} == {".txt", ".ends", ".json"}


def test_corpus_of_a_glob_is_named_text(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name)
    corpus = Text(tmp_path / "*.txt").open()
    assert (corpus.name, corpus.description) == ("text", f"{tmp_path / '*.txt'}, 2 files, 2 documents")
    assert corpus.path.read_bytes() == b"a\nb"


def test_validation_on_a_separate_text(tmp_path: Path) -> None:
    books = tmp_path / "books"
    books.mkdir()
    for name in "abc":
        (books / name).write_text(f"book {name}")
    (tmp_path / "rows.jsonl").write_text('{"body": "one"}\n{"body": "two"}')
    corpus = Text(books, val_path=tmp_path / "rows.jsonl", field="body").open()
    assert corpus.path.read_bytes() == b"book a\nbook b\nbook c\none\ntwo"
    assert corpus.splits == Splits((0, 21), (21, 28), (28, 28))
    assert corpus.document_ends.tolist() == [6, 13, 20, 24]
    assert corpus.description == f"{books}, validated on {tmp_path / 'rows.jsonl'}, 4 files, 5 documents"
    # A file in both is only validated on.
    corpus = Text(books, val_path=books / "b").open()
    assert corpus.path.read_bytes() == b"book a\nbook c\nbook b"
    assert corpus.splits == Splits((0, 14), (14, 20), (20, 20))
    # Two plain files.
    assert Text(books / "a", val_path=books / "b").open().path.read_bytes() == b"book a\nbook b"
    with pytest.raises(UserError, match=r"data.val_path=.* includes all files of data.path=.*: none is left"):
        Text(books / "a", val_path=books).open()
    with pytest.raises(UserError, match=r"data.val_path=.*: no such file"):
        Text(books, val_path=tmp_path / "absent").open()
    (tmp_path / "empty").touch()
    with pytest.raises(UserError, match=r"data.val_path names 1 file\(s\) without any text"):
        Text(books, val_path=tmp_path / "empty").open()


def test_unwritable_cache_gives_one_line_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    (tmp_path / "text.gz").write_bytes(gzip.compress(CONTENT))

    def full(self: object, data: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("rwkv_pl.files._ErrorRecorder.write", full)
        with pytest.raises(UserError, match=r"cannot write in .*corpora: disk full: .*text-.*\.txt was not written"):
            Text(tmp_path / "text.gz").open()
    assert {path.suffix for path in (cache / "corpora").iterdir()} <= {".lock"}  # Windows removes it
    monkeypatch.setenv("RWKV_PL_CACHE", str(tmp_path / "text.gz" / "cache"))
    with pytest.raises(UserError, match=r"cannot write in .*Not a directory"):
        Text(tmp_path / "text.gz").open()
