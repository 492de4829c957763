"""The standard library as a corpus."""

import sys
import sysconfig
from pathlib import Path

import pytest

from rwkv_pl.data.sources.stdlib import Stdlib
from rwkv_pl.errors import UserError


def test_stdlib_corpus_matches_its_definition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    root = tmp_path / "lib"
    kept = {"a/b.py": "1\n", "a-b.py": "2\n", "a.py": "3\n", "B.py": "4\n", "testing/x.py": "5\n"}
    left_out = ["site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib", "lib2to3", "turtledemo"]
    others = ["a/x.pyc", "a/x.txt", "LICENSE", *(f"{name}/x.py" for name in left_out), "a/b/tests/c/x.py"]
    for name, content in [*kept.items(), *((name, "no") for name in others)]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content, newline="\n")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: {"stdlib": str(root)}[name])
    corpus = Stdlib().open()
    assert corpus.path.read_bytes() == b"4\n2\n3\n1\n5\n"
    # A corrupt cached text is rebuilt; a changed library is another text.
    corpus.path.write_bytes(b"?")
    assert Stdlib().open() == corpus
    assert corpus.path.read_bytes() == b"4\n2\n3\n1\n5\n"
    (root / "a.py").write_text("6\n", newline="\n")
    assert Stdlib().open().path != corpus.path
    assert all(path.parent == cache / "corpora" for path in (corpus.path, Stdlib().open().path))
    for path in root.rglob("*.py"):
        path.unlink()
    with pytest.raises(UserError, match="no library source"):
        Stdlib().open()


def test_stdlib_corpus_of_this_python() -> None:
    corpus = Stdlib().open()
    written = corpus.path.stat()
    assert Stdlib().open() == corpus
    again = corpus.path.stat()
    assert (again.st_ino, again.st_mtime_ns) == (written.st_ino, written.st_mtime_ns), "it was rebuilt"
    size = written.st_size
    assert 5e6 < size < 20e6
    assert corpus.splits.test[1] == size
    assert abs(corpus.splits.train[1] - 0.9 * size) < 4
    assert abs(corpus.splits.val[1] - 0.95 * size) < 4
    version = ".".join(map(str, sys.version_info[:3]))
    assert version in corpus.description
    assert corpus.digest[:12] in str(corpus)
