"""Failed downloads and wrong files."""

import hashlib
import http.server
import io
import multiprocessing
import re
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rwkv_pl.data.corpus import Corpus, Splits
from rwkv_pl.data.sources import enwik8 as enwik8_source
from rwkv_pl.data.sources.enwik8 import ENWIK8_URL, Enwik8
from rwkv_pl.errors import UserError

CONTENT = bytes(i * i % 251 for i in range(100_000))

SHA1 = hashlib.sha1(CONTENT).hexdigest()


def zipped(content: bytes, name: str = "enwik8") -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return file.getvalue()


class Server(http.server.ThreadingHTTPServer):
    """Serves a zip in several ways, one per path, and counts requests."""

    requests = 0

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.ranges: list[str | None] = []

    def handle_error(self, *_: object) -> None:
        """Ignore it: a client that broke off, perhaps a minute ago, must not print into another test's output."""

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


def open_small(folder: Path, url: str = ENWIK8_URL) -> Corpus:
    return Enwik8(folder, url, len(CONTENT), SHA1).open()


def list_names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


@pytest.mark.parametrize("terminal", [False, True])
def test_download_is_verified_and_unpacked(
    tmp_path: Path,
    server: Server,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    terminal: bool,
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", str(int(terminal)))
    folder = tmp_path / "new" / "enwik8"
    corpus = open_small(folder, url=server.url("good"))
    assert corpus.path.read_bytes() == CONTENT
    assert corpus.splits == Splits((0, 90_000), (90_000, 95_000), (95_000, 100_000))
    assert corpus.digest == hashlib.sha256(CONTENT).hexdigest()
    assert list_names(folder) == {"enwik8"}
    said = capfd.readouterr()
    assert said.out == ""
    assert ("downloading" in said.err) == terminal
    assert open_small(folder, url=server.url("good")) == corpus
    assert server.requests == 1


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("flipped", "not the archive of enwik8.*nothing was kept"),
        ("short-zip", "not the archive of enwik8.*not a zip file.*nothing was kept"),
        ("page", r"not the archive of enwik8 \(26 bytes\).*nothing was kept"),
        ("other", f"has SHA-1 {hashlib.sha1(CONTENT[::-1]).hexdigest()}, expected {SHA1}"),
        ("longer", "has more than 100,000 bytes, expected 100,000"),
        ("shorter", "has 99,999 bytes, expected 100,000"),
        ("stranger", "not the archive of enwik8.*no item named 'enwik8'"),
        ("absent", "cannot download .*404.*put enwik8.zip from http://mattmahoney.*data=stdlib"),
    ],
)
def test_bad_download_gives_one_line_error_and_leaves_no_files(
    tmp_path: Path, server: Server, name: str, says: str
) -> None:
    with pytest.raises(UserError, match=says) as caught:
        open_small(tmp_path / "data" / "enwik8", url=server.url(name))
    assert "\n" not in str(caught.value)
    assert server.url(name) in str(caught.value)
    assert list_names(tmp_path) == set()
    open_small(tmp_path / "data" / "enwik8", url=server.url("good"))


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("http://127.0.0.1:1/enwik8.zip", "Connection refused|WinError 10061"),
        ("http://no-such-host.invalid/enwik8.zip", "cannot download"),
        ("nonsense", "unknown url type"),
    ],
)
def test_no_network_error_explains_manual_download(tmp_path: Path, url: str, says: str) -> None:
    by_hand = re.escape(f"in {tmp_path} by hand, or use data=stdlib")
    with pytest.raises(UserError, match=f"({says}).*put enwik8.zip .* {by_hand}"):
        open_small(tmp_path, url=url)
    assert list_names(tmp_path) == set()


def test_partial_download_is_resumed(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(enwik8_source, "TIMEOUT_SECONDS", 0.3)
    with pytest.raises(UserError, match=r"interrupted after [\d,]+ of [\d,]+ bytes: start again to resume it.*stdlib"):
        open_small(tmp_path, url=server.url("truncated"))
    third = len(zipped(CONTENT)) // 3
    assert (tmp_path / "enwik8.zip.partial").stat().st_size == third
    open_small(tmp_path, url=server.url("good"))
    assert server.ranges == [None, f"bytes={third}-"]
    assert list_names(tmp_path) == {"enwik8"}


@pytest.mark.parametrize("there", [len(zipped(CONTENT)), len(zipped(CONTENT)) + 5])
def test_complete_leftover_download_is_used(tmp_path: Path, server: Server, there: int) -> None:
    """Left by a process killed before unpacking. With extra bytes of another file it is invalid."""
    (tmp_path / "enwik8.zip.partial").write_bytes(zipped(CONTENT).ljust(there, b"x"))
    open_small(tmp_path, url=server.url("good"))
    assert list_names(tmp_path) == {"enwik8"}


def test_partial_download_of_another_file_is_discarded(tmp_path: Path, server: Server) -> None:
    (tmp_path / "enwik8.zip.partial").write_bytes(b"of another file")
    with pytest.raises(UserError, match="not the archive of enwik8"):
        open_small(tmp_path, url=server.url("good"))
    assert list_names(tmp_path) == set()
    open_small(tmp_path, url=server.url("good"))


def test_silent_server_times_out(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(enwik8_source, "TIMEOUT_SECONDS", 0.3)
    with pytest.raises(UserError, match="interrupted: timed out"):
        open_small(tmp_path, url=server.url("slow"))
    # The partial file is kept, although this server would send the whole file again.
    assert list_names(tmp_path) == {"enwik8.zip.partial"}
    (tmp_path / "enwik8.zip.partial").write_bytes(b"100")
    with pytest.raises(UserError, match="not the archive of enwik8"):
        open_small(tmp_path, url=server.url("short-zip"))


def _download(folder: Path, url: str) -> None:
    open_small(folder, url=url)


def test_killed_download_is_cleaned_up_and_repeated(tmp_path: Path, server: Server) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_download, args=(tmp_path, server.url("slow")))
    process.start()
    deadline = time.monotonic() + 600
    while not (tmp_path / "enwik8.zip.partial").exists():
        assert time.monotonic() < deadline
        assert process.is_alive()
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode
    assert list_names(tmp_path) == {"enwik8.zip.partial"}
    (tmp_path / "enwik8.partial").write_bytes(b"of a kill while unpacking")
    open_small(tmp_path, url=server.url("good"))
    assert list_names(tmp_path) == {"enwik8"}


def test_concurrent_processes_download_once(tmp_path: Path, server: Server) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_download, args=(tmp_path, server.url("good"))) for _ in range(2)]
    results: list[Corpus] = []
    threads = [
        threading.Thread(target=lambda: results.append(open_small(tmp_path, url=server.url("good")))) for _ in range(2)
    ]
    for one in [*processes, *threads]:
        one.start()
    for one in [*processes, *threads]:
        one.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(results) == 2
    assert server.requests == 1
    assert list_names(tmp_path) == {"enwik8"}


def test_file_placed_by_hand_is_used(tmp_path: Path) -> None:
    (tmp_path / "enwik8.zip").write_bytes(zipped(CONTENT))
    open_small(tmp_path, url="http://127.0.0.1:1/")
    assert list_names(tmp_path) == {"enwik8", "enwik8.zip"}
    (tmp_path / "enwik8").unlink()
    (tmp_path / "enwik8.zip").write_bytes(b"PK but no more")
    with pytest.raises(UserError, match=r"enwik8.zip is not the archive.*\(14 bytes\).*delete or replace it"):
        open_small(tmp_path, url="http://127.0.0.1:1/")
    assert list_names(tmp_path) == {"enwik8.zip"}


def test_wrong_file_is_reported_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "enwik8"
    path.write_bytes(CONTENT[:-5])
    with pytest.raises(UserError, match=f"{re.escape(str(path))} has 99,995 bytes, enwik8 has 100,000: delete it"):
        open_small(tmp_path)
    path.write_bytes(CONTENT[::-1])
    with pytest.raises(UserError, match=f"{re.escape(str(path))} has SHA-1 .* enwik8 has {SHA1}: delete it"):
        open_small(tmp_path)
    assert path.read_bytes() == CONTENT[::-1]
    with pytest.raises(UserError, match=r"is a file, .*: for your own text, add data=text"):
        open_small(path)


def test_unwritable_folder_gives_one_line_error(tmp_path: Path, server: Server) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=r"cannot write in .*Not a directory"):
        open_small(tmp_path / "file" / "enwik8", url=server.url("good"))
