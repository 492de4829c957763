"""Text sources: a path as a list of files, joined into one file, document by document."""

import bz2
import gzip
import io
import itertools
import json
import lzma
import os
import sys
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rwkv_pl.data import documents
from rwkv_pl.data.documents import exists, find_files, is_plain_text, join_documents
from rwkv_pl.data.sources.text import Text
from rwkv_pl.errors import UserError


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())


def find_names(path: Path, below: Path) -> list[str]:
    return [source.path.relative_to(below).as_posix() for source in find_files(path, "data.path")]


def join_paths(*paths: Path, field: str = "text") -> tuple[bytes, list[int], documents.JoinResult]:
    """The text, its document ends and the result of ``join``, with each path as a separate part."""
    text, ends = io.BytesIO(), io.BytesIO()
    parts = {f"part {i}": find_files(path, "data.path") for i, path in enumerate(paths)}
    outcome = join_documents(parts, field, text, ends)
    return text.getvalue(), np.frombuffer(ends.getvalue(), "<i8").tolist(), outcome


def test_folder_is_all_its_files_in_order(tmp_path: Path) -> None:
    write(tmp_path, "b.txt", "a/z.txt", "a/y/1.txt", "a-1.txt", "a.txt", "B", ".hidden", ".git/config", "a/.x/1.txt")
    (tmp_path / "empty").mkdir()
    expected = ["B", "a-1.txt", "a.txt", "a/y/1.txt", "a/z.txt", "b.txt"]
    assert find_names(tmp_path, tmp_path) == expected
    # A link to a folder can form a cycle, so it is skipped; a link to a file counts as that file.
    (tmp_path / "a" / "circle").symlink_to(tmp_path)
    (tmp_path / "c.txt").symlink_to(tmp_path / "b.txt")
    os.mkfifo(tmp_path / "pipe")
    assert find_names(tmp_path, tmp_path) == [*expected, "c.txt"]
    assert join_paths(tmp_path)[0] == "\n".join([*expected, "b.txt"]).encode()


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.txt", ["a.txt", "b.txt"]),
        ("?.txt", ["a.txt", "b.txt"]),
        ("[!a].txt", ["b.txt"]),
        ("**/*.txt", ["a.txt", "b.txt", "x/1.txt", "x/y/2.txt"]),
        ("x/**", ["x/1.txt", "x/3.md", "x/y/2.txt"]),
        ("*", ["a.txt", "b.txt"]),
        ("x/*/*", ["x/circle/a.txt", "x/circle/b.txt", "x/y/2.txt"]),
        ("x/../a.t*", ["x/../a.txt"]),
    ],
)
def test_glob_is_the_files_it_matches_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, expected: list[str]
) -> None:
    # Wildcard characters in the folder's own name are literal.
    folder = tmp_path / "[1] *"
    write(folder, "b.txt", "a.txt", ".c.txt", "x/1.txt", "x/3.md", "x/y/2.txt", "x/.y/2.txt")
    (folder / "x" / "circle").symlink_to(folder)
    assert find_names(folder / pattern, folder) == expected
    assert exists(folder / pattern)
    monkeypatch.chdir(folder)
    assert find_names(Path(pattern), Path()) == expected


@pytest.mark.parametrize("pattern", ["", "**/*", "*/*", "*"])
def test_files_that_the_commands_write_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str
) -> None:
    texts = ["a.txt", "books/b.txt", "eval-notes.txt", "sweep.txt", "x/lightning/c"]
    outputs = [
        *("outputs/run/.hydra/config.yaml", "outputs/run/train.log", "outputs/run/checkpoints/x/best", "run/.hydra/c"),
        *("run/metrics.csv", "sweep/multirun.yaml", "sweep/0/result.json", "sweep/0/samples/1.txt", "hf/config.json"),
        *("hf/model.safetensors", "eval-run-val.json", "eval-test.png", "sweep.csv", "sweep.png", "books/w.pth"),
        *(
            "books/last.ckpt",
            "books/out.csv.partial",
            "hello.state",
            "lightning_logs/version_0/metrics.csv",
            "here/corpora/text-1.txt",
        ),
    ]
    write(tmp_path, *texts, *outputs)
    monkeypatch.setenv("RWKV_PL_CACHE", str(tmp_path / "here"))
    found = find_names(tmp_path / pattern, tmp_path)
    assert set(found) <= set(texts) and found
    assert found == texts or pattern.startswith("*")
    old = [file.path for file in find_files(tmp_path / pattern, "data.path", old_rule=True)]
    assert {path.relative_to(tmp_path).as_posix() for path in old} > set(found)
    # A folder that is named is read.
    assert find_names(tmp_path / "sweep" / "0" / "samples" / "*.txt", tmp_path) == ["sweep/0/samples/1.txt"]


def test_existing_name_with_a_wildcard_character_is_literal(tmp_path: Path) -> None:
    write(tmp_path, "a[1].txt", "a1.txt", "*/1", "x/1")
    assert find_names(tmp_path / "a[1].txt", tmp_path) == ["a[1].txt"]
    assert find_names(tmp_path / "*", tmp_path) == ["*/1"]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("empty", "data.path=.*empty is a folder without files"),
        ("absent.txt", "data.path=.*absent.txt: no such file; if it was moved, set data.path= to its new path"),
        ("file/absent.txt", "no such file"),
        ("*.md", r"data.path=.*\*.md: no file matches in "),
        ("absent/*.txt", "no file matches in "),
        ("**x", "is not a valid glob: .*" if sys.version_info < (3, 13) else "no file matches"),
        ("dangling", "cannot read .*dangling/link: No such file"),
        ("dangling/*", "cannot read .*dangling/link: No such file"),
        ("x" * 300, "cannot read .*: File name too long"),
    ],
)
def test_missing_source_gives_one_line_error(tmp_path: Path, name: str, says: str) -> None:
    write(tmp_path, "file", "empty/.hidden", "dangling/file")
    (tmp_path / "dangling" / "link").symlink_to("nowhere")
    with pytest.raises(UserError, match=says) as caught:
        find_files(tmp_path / name, "data.path")
    assert "\n" not in str(caught.value)


def test_missing_relative_path_names_the_folder_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"data.val_path=absent: no such file \(looked for {tmp_path}/absent\)"):
        find_files(Path("absent"), "data.val_path")
    assert not exists(Path("absent"))
    assert not exists(Path("*.txt"))


def test_unreadable_folder_gives_one_line_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=f"cannot read {tmp_path}: Permission denied"):
        find_files(tmp_path, "data.path")


# JSON holds Unicode text; half a surrogate pair is not text, but JSON can spell it.
DOCUMENTS = st.lists(
    st.text(st.characters(codec=None), max_size=20).filter(lambda text: "\ufeff" not in text), max_size=8
)


@given(st.lists(st.tuples(st.sampled_from(["txt", "TXT.gz", "jsonl", "jsonl.gz"]), DOCUMENTS), min_size=1, max_size=4))
def test_documents_are_joined_with_their_ends(files: list[tuple[str, list[str]]]) -> None:
    documents: list[bytes] = []
    with tempfile.TemporaryDirectory() as folder:
        for number, (kind, texts) in enumerate(files):
            spelled = [text.encode("utf-8", "surrogatepass") for text in texts]
            if "jsonl" in kind:
                content = "\n".join(json.dumps({"id": 1, "words": text}) for text in texts).encode()
                documents += spelled
            else:
                content = b"".join(spelled)
                documents.append(content)
            Path(folder, f"{number}.{kind}").write_bytes(gzip.compress(content) if kind.endswith("gz") else content)
        documents = [document for document in documents if document]
        if not documents:
            with pytest.raises(UserError, match=r"part 0 names \d file\(s\) without any text"):
                join_paths(Path(folder), field="words")
            return
        text, ends, outcome = join_paths(Path(folder), field="words")
    assert text == b"\n".join(documents)
    assert outcome == ([len(text)], len(documents))
    edges = [-1, *ends, len(text)]
    assert [text[lo + 1 : hi] for lo, hi in itertools.pairwise(edges)] == documents


def test_join_returns_the_end_of_each_part(tmp_path: Path) -> None:
    write(tmp_path, "a/1", "a/2", "b")
    assert join_paths(tmp_path / "a", tmp_path / "b") == (b"a/1\na/2\nb", [3, 7], ([7, 9], 3))
    (tmp_path / "b").write_bytes(b"")
    with pytest.raises(UserError, match=r"part 1 names 1 file\(s\) without any text; the first is .*b"):
        join_paths(tmp_path / "a", tmp_path / "b")


def test_large_document_is_not_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "BLOCK", 7)
    for name in ("a.txt", "b.txt.gz"):
        content = bytes(range(100)) * 3
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert join_paths(tmp_path) == (bytes(range(100)) * 3 + b"\n" + bytes(range(100)) * 3, [300], ([601], 2))


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (b"{", "line 3 is not JSON"),
        (b"text", "line 3 is not JSON"),
        (b'{"text": "\xff"}', "line 3 is not JSON"),
        (b"[" * 100_000, "line 3 is not JSON"),
        (b'["text"]', "line 3 is not a JSON object"),
        (b"3", "line 3 is not a JSON object"),
        (
            b'{"title": "", "body": ""}',
            r"line 3 has no field text \(its fields: title, body\): set data.field to the text's field",
        ),
        (b"{}", r"line 3 has no field text \(its fields: none\)"),
        (b'{"text": null}', "line 3: the field text is not a string"),
        (b'{"text": ["a"]}', "line 3: the field text is not a string"),
        (b'{"text": "%s"}' % (b"x" * 3000), "line 3 is longer than .* one document per line"),
    ],
)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_invalid_row_is_reported_with_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: bytes, says: str, suffix: str
) -> None:
    if b"xxx" in row:
        monkeypatch.setattr(documents, "MAX_ROW_BYTES", 2000)
    path = tmp_path / f"rows.jsonl{suffix}"
    content = b'{"text": "a"}\r\n\n' + row + b"\n"
    path.write_bytes(gzip.compress(content) if suffix else content)
    with pytest.raises(UserError, match=f"rows.jsonl{suffix}, {says}") as caught:
        join_paths(path)
    assert "\n" not in str(caught.value)


def test_accepted_row_formats(tmp_path: Path) -> None:
    """Blank lines, CRLF line ends, a byte order mark, no newline after the last line, any field name."""
    (tmp_path / "rows.JSONL").write_bytes(
        b'\xef\xbb\xbf{"text": "a\\nb"}\r\n\n  \n{"x": {}, "text": "\\u00e4\\ud83d\\ude00"}'
    )
    assert join_paths(tmp_path / "rows.JSONL") == ("a\nb\nä😀".encode(), [3], ([10], 2))


@pytest.mark.parametrize("damage", ["cut", "flip", "block", "text", "behind", "header"])
def test_corrupt_gzip_gives_one_line_error(tmp_path: Path, damage: str) -> None:
    content = gzip.compress(np.random.default_rng(0).bytes(10_000))
    flipped = bytearray(content)
    flipped[5000] ^= 1
    broken = {
        "cut": content[:-100],
        "flip": bytes(flipped),
        "block": content[:10] + b"\xff" + content[11:],  # of a type that does not exist
        "text": b"no gzip at all",
        "behind": content + b"more",
        "header": content[:5],
    }
    path = tmp_path / "text.gz"
    path.write_bytes(broken[damage])
    with pytest.raises(UserError, match=f"{path} is corrupt or truncated") as caught:
        join_paths(path)
    assert "\n" not in str(caught.value)
    # Concatenated gzip members are one file, as in gzip itself.
    path.write_bytes(gzip.compress(b"a") + gzip.compress(b"b"))
    assert join_paths(path)[0] == b"ab"


def compress_zstd(content: bytes) -> bytes:
    zstandard = pytest.importorskip("zstandard")
    half = len(content) // 2
    return b"".join(zstandard.ZstdCompressor().compress(part) for part in (content[:half], content[half:]))


COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": compress_zstd}


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_files_are_unpacked(tmp_path: Path, suffix: str) -> None:
    rows = b'{"text": "one"}\n{"text": "two"}'
    for name, content in {"1.txt": CONTENT, "2.jsonl": rows, "3.NDJSON": rows, "4.csv": b""}.items():
        (tmp_path / f"{name}{suffix}").write_bytes(COMPRESS[suffix](content))
    (tmp_path / "5").write_bytes(COMPRESS[suffix](b"by content"))
    assert join_paths(tmp_path)[0] == CONTENT + b"\none\ntwo\none\ntwo\nby content"
    assert not any(is_plain_text(path) for path in tmp_path.iterdir())
    # The first versions knew only .gz.
    one = {"data.path": find_files(tmp_path / f"1.txt{suffix}", "data.path")}
    text = io.BytesIO()
    join_documents(one, "text", text, io.BytesIO(), old_rule=True)
    assert text.getvalue() == (CONTENT if suffix == ".gz" else COMPRESS[suffix](CONTENT))


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("damage", ["cut", "noise", "flip"])
def test_corrupt_compressed_file_gives_one_line_error(tmp_path: Path, suffix: str, damage: str) -> None:
    packed = bytearray(COMPRESS[suffix](CONTENT))
    if damage == "flip":
        packed[len(packed) // 2] ^= 255
    damaged = {"cut": packed[:-10], "noise": NOISE, "flip": packed}[damage]
    (tmp_path / f"a.jsonl{suffix}").write_bytes(damaged)
    with pytest.raises(UserError, match=rf"a\.jsonl{suffix}") as caught:
        join_paths(tmp_path / f"a.jsonl{suffix}")
    assert "\n" not in str(caught.value)


CONTENT = "".join(f"line {i * i % 251}\n" for i in range(50_000)).encode()
NOISE = np.random.default_rng(1).bytes(40_000)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.zip", b"PK\x03\x04" + NOISE, r"is not text but a container \(zip\): extract"),
        ("a.txt", b"PAR1" + NOISE, r"is not text but a container \(parquet\)"),
        ("a.pdf", b"%PDF-1.7\n" + NOISE, r"is not text but a container \(pdf\)"),
        ("a.7z", b"7z\xbc\xaf\x27\x1c" + NOISE, r"is not text but a container \(7z\)"),
        ("a.lz4", b"\x04\x22\x4d\x18" + NOISE, r"is not text but a container \(lz4\)"),
        (
            "a.tar.gz",
            gzip.compress(b"a.txt".ljust(257, b"\0") + b"ustar\0" + bytes(250)),
            r"is not text but a container \(tar\)",
        ),
        ("a.txt", gzip.compress(gzip.compress(NOISE)), r"is not text but a container \(gz\)"),
        ("a.txt", lzma.compress(NOISE, lzma.FORMAT_ALONE), r"is not text but a container \(lzma\)"),
        ("a.txt.br", NOISE, r"is not text but a container \(br\)"),
        ("a.PARQUET", NOISE, r"is not text but a container \(parquet\)"),
        ("a.zip.gz", gzip.compress(NOISE), r"is not text but a container \(zip\)"),
        ("a.json", b'[{"text": "a"}]', "is not read: write its documents as one object a line, into a .jsonl"),
        ("a.json.bz2", bz2.compress(b'{"text": "a"}'), "is not read: write its documents"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_other_containers_are_refused(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=says):
        join_paths(tmp_path)
    with pytest.raises(UserError, match=says):
        Text(tmp_path / name).open()


def test_zstd_file_without_the_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (tmp_path / "a.txt.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    with pytest.raises(UserError, match=r"a\.txt\.zst needs .*: pip install 'rwkv_pl\[zstd\]', or unpack it"):
        join_paths(tmp_path)


@pytest.mark.parametrize("change", ["grown", "touched", "gone"])
def test_file_that_changes_while_read_is_reported(tmp_path: Path, change: str) -> None:
    write(tmp_path, "a", "b")
    found = find_files(tmp_path, "data.path")
    if change == "grown":
        (tmp_path / "a").write_bytes(b"more")
    elif change == "touched":
        os.utime(tmp_path / "a", ns=(0, 0))
    else:
        (tmp_path / "b").unlink()
    with pytest.raises(UserError, match="cannot read .*b: No such" if change == "gone" else "a changed while"):
        join_documents({"data.path": found}, "text", io.BytesIO(), io.BytesIO())


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_joining_half_a_gigabyte_uses_little_memory(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"zeros{suffix}"
    path.write_bytes(COMPRESS[suffix](bytes(1 << 20)) * 512)
    with Path(os.devnull).open("wb") as nowhere:
        tracemalloc.start()
        outcome = join_documents({"data.path": find_files(path, "data.path")}, "text", nowhere, nowhere)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert outcome == ([512 << 20], 1)
    # A few blocks of 1 MiB, and rich's imports.
    assert peak < 32 << 20


@pytest.mark.parametrize("terminal", [False, True])
def test_join_shows_a_progress_bar_in_a_terminal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", str(int(terminal)))
    content = np.random.default_rng(0).bytes(3_000_000)
    (tmp_path / "a").write_bytes(content)
    (tmp_path / "b.gz").write_bytes(gzip.compress(content))
    join_paths(tmp_path)
    said = capfd.readouterr()
    assert said.out == ""
    assert ("reading the corpus" in said.err) == terminal
    assert ("6.0/6.0 MB" in said.err) == terminal
