"""Where bytes come from: downloads that go wrong, files that are not what they should be, splits."""

import concurrent.futures
import errno
import functools
import gzip
import hashlib
import http.server
import io
import multiprocessing
import os
import signal
import sys
import sysconfig
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rwkv_pl.config import UserError
from rwkv_pl.data import corpus as corpora
from rwkv_pl.data.corpus import Corpus, Splits, enwik8, file_digest, stdlib, text
from rwkv_pl.data.sources import join
from rwkv_pl.files import publish

CONTENT = bytes(i * i % 251 for i in range(100_000))
SHA1 = hashlib.sha1(CONTENT).hexdigest()


def zipped(content: bytes, name: str = "enwik8") -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return file.getvalue()


class Server(http.server.ThreadingHTTPServer):
    """Serves a zip in its several conditions, and counts."""

    requests = 0

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.ranges: list[str | None] = []

    def handle_error(self, *_: object) -> None:
        """A client broke the download off, maybe a minute ago: nothing that may stand in another test's output."""

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{name}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.requests += 1
        self.server.ranges.append(self.headers.get("Range"))
        body = zipped(CONTENT)
        flipped = bytearray(body)
        flipped[len(body) // 2] ^= 1
        bodies = {
            "/good": body,
            "/truncated": body,
            "/slow": body,
            "/short-zip": body[: len(body) // 2],
            "/flipped": bytes(flipped),
            "/page": b"<html>please log in</html>",
            "/other": zipped(CONTENT[::-1]),
            "/longer": zipped(CONTENT * 50),
            "/shorter": zipped(CONTENT[:-1]),
            "/stranger": zipped(CONTENT, "readme.txt"),
        }
        if self.path not in bodies:
            self.send_error(404)
            return
        body = bodies[self.path]
        begin = self.first_byte(self.headers.get("Range"))
        if begin and self.path == "/good":
            self.send_response(206 if begin < len(body) else 416)
            body = body[begin:]
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.path == "/truncated":
            body = body[: len(body) // 3]
        if self.path == "/slow":
            self.wfile.write(body[:100])
            self.wfile.flush()
            time.sleep(60)
        self.wfile.write(body)

    @staticmethod
    def first_byte(header: str | None) -> int:
        return int(header.removeprefix("bytes=").removesuffix("-")) if header else 0

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as running:
        running.daemon_threads = True
        running.block_on_close = False
        threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
        yield running
        running.shutdown()


small = functools.partial(enwik8, n_bytes=len(CONTENT), sha1=SHA1)


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


@pytest.mark.parametrize("terminal", [False, True])
def test_a_good_download(
    tmp_path: Path,
    server: Server,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    terminal: bool,
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", str(int(terminal)))
    folder = tmp_path / "new" / "enwik8"
    corpus = small(folder, url=server.url("good"))
    assert corpus.path.read_bytes() == CONTENT
    assert corpus.splits == Splits((0, 90_000), (90_000, 95_000), (95_000, 100_000))
    assert corpus.digest == hashlib.sha256(CONTENT).hexdigest()
    assert left(folder) == {"enwik8"}
    said = capfd.readouterr()
    assert said.out == ""
    assert ("downloading" in said.err) == terminal
    assert small(folder, url=server.url("good")) == corpus
    assert server.requests == 1


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("flipped", "not the archive of enwik8.*nothing was kept"),
        ("short-zip", "not the archive of enwik8.*not a zip file.*nothing was kept"),
        ("page", r"not the archive of enwik8 \(26 bytes\).*nothing was kept"),
        ("other", f"has SHA-1 {hashlib.sha1(CONTENT[::-1]).hexdigest()}, expected {SHA1}"),
        ("longer", "holds more than 100,000 bytes, expected 100,000"),
        ("shorter", "holds 99,999 bytes, expected 100,000"),
        ("stranger", "not the archive of enwik8.*no item named 'enwik8'"),
        ("absent", "cannot download .*404.*place enwik8.zip from http://mattmahoney.*data=stdlib"),
    ],
)
def test_a_bad_download_is_one_line_and_leaves_nothing(tmp_path: Path, server: Server, name: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        small(tmp_path / "data" / "enwik8", url=server.url(name))
    assert "\n" not in str(caught.value)
    assert server.url(name) in str(caught.value)
    assert left(tmp_path) == set()
    small(tmp_path / "data" / "enwik8", url=server.url("good"))


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("http://127.0.0.1:1/enwik8.zip", "Connection refused"),
        ("http://no-such-host.invalid/enwik8.zip", "cannot download"),
        ("nonsense", "unknown url type"),
    ],
)
def test_no_network_says_how_to_go_on(tmp_path: Path, url: str, says: str) -> None:
    with pytest.raises(UserError, match=f"{says}.*place enwik8.zip .* in {tmp_path} by hand, or use data=stdlib"):
        small(tmp_path, url=url)
    assert left(tmp_path) == set()


def test_a_download_that_broke_off_goes_on(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "TIMEOUT_SECONDS", 0.3)
    with pytest.raises(UserError, match=r"broke off after [\d,]+ of [\d,]+ bytes: start again, and it goes on.*stdlib"):
        small(tmp_path, url=server.url("truncated"))
    third = len(zipped(CONTENT)) // 3
    assert (tmp_path / "enwik8.zip.partial").stat().st_size == third
    small(tmp_path, url=server.url("good"))
    assert server.ranges == [None, f"bytes={third}-"]
    assert left(tmp_path) == {"enwik8"}


@pytest.mark.parametrize("there", [len(zipped(CONTENT)), len(zipped(CONTENT)) + 5])
def test_a_download_that_is_all_there(tmp_path: Path, server: Server, there: int) -> None:
    """As left by a kill before it was unpacked; with bytes of another file behind it is none."""
    (tmp_path / "enwik8.zip.partial").write_bytes(zipped(CONTENT).ljust(there, b"x"))
    small(tmp_path, url=server.url("good"))
    assert left(tmp_path) == {"enwik8"}


def test_what_broke_off_before_is_of_another_file(tmp_path: Path, server: Server) -> None:
    (tmp_path / "enwik8.zip.partial").write_bytes(b"of another file")
    with pytest.raises(UserError, match="not the archive of enwik8"):
        small(tmp_path, url=server.url("good"))
    assert left(tmp_path) == set()
    small(tmp_path, url=server.url("good"))


def test_a_silent_server_does_not_hang(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "TIMEOUT_SECONDS", 0.3)
    with pytest.raises(UserError, match="broke off: timed out"):
        small(tmp_path, url=server.url("slow"))
    # What came is kept; this server sends the whole again all the same.
    assert left(tmp_path) == {"enwik8.zip.partial"}
    (tmp_path / "enwik8.zip.partial").write_bytes(b"100")
    with pytest.raises(UserError, match="not the archive of enwik8"):
        small(tmp_path, url=server.url("short-zip"))


def _download(folder: Path, url: str) -> None:
    small(folder, url=url)


def test_a_killed_download_is_cleaned_up_and_made_again(tmp_path: Path, server: Server) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_download, args=(tmp_path, server.url("slow")))
    process.start()
    deadline = time.monotonic() + 600
    while not (tmp_path / "enwik8.zip.partial").exists():
        assert time.monotonic() < deadline
        assert process.is_alive()
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert left(tmp_path) == {"enwik8.zip.partial"}
    (tmp_path / "enwik8.partial").write_bytes(b"of a kill while unpacking")
    small(tmp_path, url=server.url("good"))
    assert left(tmp_path) == {"enwik8"}


def test_many_at_once_download_once(tmp_path: Path, server: Server) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_download, args=(tmp_path, server.url("good"))) for _ in range(2)]
    results: list[Corpus] = []
    threads = [
        threading.Thread(target=lambda: results.append(small(tmp_path, url=server.url("good")))) for _ in range(2)
    ]
    for one in [*processes, *threads]:
        one.start()
    for one in [*processes, *threads]:
        one.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(results) == 2
    assert server.requests == 1
    assert left(tmp_path) == {"enwik8"}


def test_placed_by_hand(tmp_path: Path) -> None:
    (tmp_path / "enwik8.zip").write_bytes(zipped(CONTENT))
    small(tmp_path, url="http://127.0.0.1:1/")
    assert left(tmp_path) == {"enwik8", "enwik8.zip"}
    (tmp_path / "enwik8").unlink()
    (tmp_path / "enwik8.zip").write_bytes(b"PK but no more")
    with pytest.raises(UserError, match=r"enwik8.zip is not the archive.*\(14 bytes\).*delete or replace it"):
        small(tmp_path, url="http://127.0.0.1:1/")
    assert left(tmp_path) == {"enwik8.zip"}


def test_a_wrong_file_is_named_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "enwik8"
    path.write_bytes(CONTENT[:-5])
    with pytest.raises(UserError, match=f"{path} has 99,995 bytes, enwik8 has 100,000: delete it"):
        small(tmp_path)
    path.write_bytes(CONTENT[::-1])
    with pytest.raises(UserError, match=f"{path} has SHA-1 .* enwik8 has {SHA1}: delete it"):
        small(tmp_path)
    assert path.read_bytes() == CONTENT[::-1]
    with pytest.raises(UserError, match="is a file: for a text of yours add data=text"):
        small(path)


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path, server: Server) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=r"cannot write in .*Not a directory"):
        small(tmp_path / "file" / "enwik8", url=server.url("good"))


def test_text_that_cannot_be_used_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        text(tmp_path / "absent")
    path = tmp_path / "text"
    path.write_bytes(b"")
    with pytest.raises(UserError, match="is empty"):
        text(path)
    path.write_bytes(b"words")
    for split in [(0.9, 0.2, 0.1), (1.1, -0.1, 0.0), (0.5, 0.5), (float("nan"), 0.5, 0.5)]:
        with pytest.raises(UserError, match=r"data.split=.* is not three fractions"):
            text(path, split)  # type: ignore[arg-type]


def test_text_is_split_between_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"x" * 89 + "漢".encode() + b"y" * 8)
    corpus = text(path)
    assert corpus.splits == Splits((0, 89), (89, 95), (95, 100))
    assert corpus.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert text(path, (0.2, 0.3, 0.5)).splits == Splits((0, 20), (20, 50), (50, 100))
    # A name counts from where the run started, whatever folder it goes to later.
    monkeypatch.chdir(tmp_path)
    assert text("text").path == path


def test_a_compressed_text_is_the_text(tmp_path: Path, cache: Path) -> None:
    plain, packed = tmp_path / "a.txt", tmp_path / "b.txt.gz"
    plain.write_bytes(CONTENT)
    packed.write_bytes(gzip.compress(CONTENT))
    a, b = text(plain), text(packed)
    assert b.path.parent == cache / "corpora"
    assert b.path.read_bytes() == CONTENT
    assert (a.splits, a.digest) == (b.splits, b.digest)
    assert (a.ends_path, b.ends_path) == (None, None)
    assert a.document_ends.shape == b.document_ends.shape == (0,)
    assert str(b).startswith(f"b.txt.gz ({packed}, digest ")


def test_a_text_is_joined_once_and_anew_when_a_source_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    folder = tmp_path / "books"
    folder.mkdir()
    for name in "cab":
        (folder / name).write_text(f"book {name}")
    calls = []
    monkeypatch.setattr(corpora, "join", lambda *arguments: calls.append(1) or join(*arguments))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        one, *others = pool.map(text, [folder] * 4)
    assert others == [one] * 3
    assert len(calls) == 1
    assert one.path.read_bytes() == b"book a\nbook b\nbook c"
    assert one.document_ends.tolist() == [6, 13]
    assert one.description == f"{folder}, 3 documents"
    # What is damaged in the cache is made again.
    for path in (one.path, one.ends_path, one.path.with_suffix(".json")):
        assert path is not None
        path.write_bytes(b"?" * 16)
        assert text(folder) == one
        assert one.path.read_bytes() == b"book a\nbook b\nbook c"
        assert one.document_ends.tolist() == [6, 13]
    assert len(calls) == 4
    # A change that keeps size and time too is seen, and what a run may still read is left alone.
    before = (folder / "a").stat()
    (folder / "a").write_text("BOOK A")
    os.utime(folder / "a", ns=(before.st_atime_ns, before.st_mtime_ns))
    other = text(folder)
    assert other.path.read_bytes() == b"BOOK A\nbook b\nbook c"
    assert one.path.read_bytes() == b"book a\nbook b\nbook c"
    assert other.digest != one.digest
    # The folder elsewhere is another source of the same text.
    moved = text(folder.rename(tmp_path / "moved"))
    assert moved.path != other.path
    assert moved.digest == other.digest
    (tmp_path / "moved" / "d").write_text("")
    assert text(tmp_path / "moved").document_ends.tolist() == [6, 13]
    assert {path.suffix for path in (cache / "corpora").iterdir()} == {".txt", ".ends", ".json", ".lock"}


def test_a_glob_has_a_name_for_files(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name)
    corpus = text(tmp_path / "*.txt")
    assert (corpus.name, corpus.description) == ("text", f"{tmp_path}/*.txt, 2 documents")
    assert corpus.path.read_bytes() == b"a\nb"


def test_validation_on_a_text_of_its_own(tmp_path: Path) -> None:
    books = tmp_path / "books"
    books.mkdir()
    for name in "abc":
        (books / name).write_text(f"book {name}")
    (tmp_path / "rows.jsonl").write_text('{"body": "one"}\n{"body": "two"}')
    corpus = text(books, val_path=tmp_path / "rows.jsonl", field="body")
    assert corpus.path.read_bytes() == b"book a\nbook b\nbook c\none\ntwo"
    assert corpus.splits == Splits((0, 21), (21, 28), (28, 28))
    assert corpus.document_ends.tolist() == [6, 13, 20, 24]
    assert corpus.description == f"{books}, validated on {tmp_path}/rows.jsonl, 5 documents"
    # A file of both is not trained on.
    corpus = text(books, val_path=books / "b")
    assert corpus.path.read_bytes() == b"book a\nbook c\nbook b"
    assert corpus.splits == Splits((0, 14), (14, 20), (20, 20))
    # Two plain files.
    assert text(books / "a", val_path=books / "b").path.read_bytes() == b"book a\nbook b"
    with pytest.raises(UserError, match=r"data.val_path=.* has all files of data.path=.*: none is left to train on"):
        text(books / "a", val_path=books)
    with pytest.raises(UserError, match=r"data.val_path=.*: no such file"):
        text(books, val_path=tmp_path / "absent")
    (tmp_path / "empty").touch()
    with pytest.raises(UserError, match=r"data.val_path names 1 file\(s\) without any text"):
        text(books, val_path=tmp_path / "empty")


@given(
    st.lists(st.integers(1, 200), min_size=1, max_size=40),
    st.tuples(st.floats(0.01, 1), st.floats(0.01, 1), st.floats(0.01, 1)),
)
def test_an_edge_moves_to_a_document_near_by(lengths: list[int], shares: tuple[float, float, float]) -> None:
    train, val, test = (share / sum(shares) for share in shares)
    with tempfile.TemporaryDirectory() as folder:
        path, ends_path = Path(folder, "text"), Path(folder, "ends")
        path.write_bytes(b"\n".join(b"x" * length for length in lengths))
        n = path.stat().st_size
        starts = np.cumsum(np.array(lengths[:-1], "<i8") + 1)
        ends_path.write_bytes((starts - 1).tobytes())
        splits = corpora.split_by_fractions(path, (train, val, test), ends_path if len(lengths) > 1 else None)
    edges = [0, splits.train[1], splits.val[1], n]
    assert splits == Splits((0, edges[1]), (edges[1], edges[2]), (edges[2], n))
    assert edges == sorted(edges)
    for edge, at in zip(edges[1:3], (round(n * train), round(n * (train + val))), strict=True):
        nearest = min((abs(start - at) for start in starts), default=n)
        if nearest <= min(train, val, test) * n / 10:
            assert edge in starts
            assert abs(edge - at) == nearest
        else:
            assert edge == at


def test_a_cache_that_takes_no_corpus_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    (tmp_path / "text.gz").write_bytes(gzip.compress(CONTENT))

    def full(self: object, data: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("rwkv_pl.files._Remembering.write", full)
        with pytest.raises(UserError, match=r"cannot write in .*corpora: disk full: .*text-.*\.txt was not written"):
            text(tmp_path / "text.gz")
    assert {path.suffix for path in (cache / "corpora").iterdir()} == {".lock"}
    monkeypatch.setenv("RWKV_PL_CACHE", str(tmp_path / "text.gz" / "cache"))
    with pytest.raises(UserError, match=r"cannot write in .*Not a directory"):
        text(tmp_path / "text.gz")


def test_a_digest_says_which_content_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "WHOLE_DIGEST_BELOW", 1 << 18)
    digests = set()
    for size in (0, (1 << 18) - 1, 1 << 18, (1 << 18) + 1, 1 << 20):
        for change in (0, size // 2, size - 1):
            path = tmp_path / f"{size}-{change}"
            content = bytearray(size)
            if size:
                content[change] = 1
            path.write_bytes(content)
            digests.add(file_digest(path))
    assert len(digests) == 13


def test_what_is_published_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), publish(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert left(tmp_path) == {"file"}
    assert path.read_bytes() == b"old"
    with publish(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"


def test_stdlib_by_its_definition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    root = tmp_path / "lib"
    kept = {"a/b.py": "1\n", "a-b.py": "2\n", "a.py": "3\n", "B.py": "4\n", "testing/x.py": "5\n"}
    left_out = ["site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib", "lib2to3", "turtledemo"]
    others = ["a/x.pyc", "a/x.txt", "LICENSE", *(f"{name}/x.py" for name in left_out), "a/b/tests/c/x.py"]
    for name, content in [*kept.items(), *((name, "no") for name in others)]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: {"stdlib": str(root)}[name])
    corpus = stdlib()
    assert corpus.path.read_bytes() == b"4\n2\n3\n1\n5\n"
    # A cached text that was damaged is made again, a changed library is another text.
    corpus.path.write_bytes(b"?")
    assert stdlib() == corpus
    assert corpus.path.read_bytes() == b"4\n2\n3\n1\n5\n"
    (root / "a.py").write_text("6\n")
    assert stdlib().path != corpus.path
    assert all(path.parent == cache / "corpora" for path in (corpus.path, stdlib().path))
    for path in root.rglob("*.py"):
        path.unlink()
    with pytest.raises(UserError, match="no library source"):
        stdlib()


def test_stdlib_of_this_python() -> None:
    corpus = stdlib()
    written = corpus.path.stat()
    assert stdlib() == corpus
    again = corpus.path.stat()
    assert (again.st_ino, again.st_mtime_ns) == (written.st_ino, written.st_mtime_ns), "it was made again"
    size = written.st_size
    assert 5e6 < size < 20e6
    assert corpus.splits.test[1] == size
    assert abs(corpus.splits.train[1] - 0.9 * size) < 4
    assert abs(corpus.splits.val[1] - 0.95 * size) < 4
    version = ".".join(map(str, sys.version_info[:3]))
    assert version in corpus.description
    assert corpus.digest[:12] in str(corpus)
