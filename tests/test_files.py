"""Atomic writes: a file is complete or missing."""

import errno
import io
import mmap
import os
from pathlib import Path

import pytest
import torch
from systems import WINDOWS

from rwkv_pl import files
from rwkv_pl.files import IN_USE, atomic_write, delete_with_retry, describe_os_error, newest, replace_with_retry, settle


@pytest.mark.skipif(WINDOWS or not Path("/dev/full").exists(), reason="no /dev/full")
def test_full_disk_error_of_torch_is_reported_by_its_cause(tmp_path, monkeypatch):
    """torch.save raises its own RuntimeError instead of OSError; /dev/full refuses every write."""
    monkeypatch.setattr(files._ErrorRecorder, "__init__", lambda self, *_: io.FileIO.__init__(self, "/dev/full", "wb"))
    with pytest.raises(OSError) as caught, atomic_write(tmp_path / "x") as file:
        torch.save({"weights": torch.zeros(100_000)}, file)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "x"))
    assert describe_os_error(caught.value) == f"disk full: {tmp_path / 'x'} was not written"
    assert not list(tmp_path.iterdir())


def refuse_always(*args):
    raise PermissionError(errno.EACCES, "Access is denied")


def test_replace_is_retried_while_another_process_has_the_file_open(tmp_path, monkeypatch):
    """Windows refuses such a replace."""
    refusals, original = [], Path.replace

    def refuse(self, target):
        if len(refusals) < 3:
            refusals.append(self)
            refuse_always()
        return original(self, target)

    monkeypatch.setattr(Path, "replace", refuse)
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    (tmp_path / "a").write_text("new")
    (tmp_path / "b").write_text("old")
    replace_with_retry(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "new"
    monkeypatch.setattr(Path, "replace", refuse_always)
    with pytest.raises(PermissionError):
        replace_with_retry(tmp_path / "b", tmp_path / "a")
    assert (tmp_path / "b").read_text() == "new"


@pytest.mark.parametrize("times", [2, 100])
def test_folder_is_deleted_when_its_files_are_closed(tmp_path, monkeypatch, times, caplog):
    """Windows deletes an open file when it is closed, and so its folder is not empty for a while."""
    refusals, original = [], files.shutil.rmtree

    def refuse(path):
        if len(refusals) < times:
            refusals.append(path)
            error = OSError(errno.ENOTEMPTY, "The directory is not empty", str(path))
            error.winerror = files.DIRECTORY_NOT_EMPTY
            raise error
        original(path)

    monkeypatch.setattr(files.shutil, "rmtree", refuse)
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    (tmp_path / "a").mkdir()
    delete_with_retry(tmp_path / "a")
    assert not (tmp_path / "a").exists()
    assert [path.name for path in tmp_path.iterdir()] == ([] if times == 2 else ["a.old.partial"])
    assert ("not deleted: " in caplog.text) == (times == 100)


def test_atomic_write_works_without_folder_fsync(tmp_path, monkeypatch):
    """Windows cannot open a folder."""
    original = os.open

    def refuse(path, *args, **kwargs):
        if Path(path) == tmp_path:
            raise PermissionError(errno.EACCES, "Permission denied")
        return original(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    with atomic_write(tmp_path / "x") as file:
        file.write(b"whole")
    assert (tmp_path / "x").read_bytes() == b"whole"


def test_atomic_write_leaves_a_complete_file_or_none(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"old"
    with atomic_write(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"


@pytest.fixture
def held(monkeypatch):
    """held(path) refuses to replace or delete that file, as Windows does while another process has it open."""
    there: set[Path] = set()
    replace, unlink = Path.replace, Path.unlink

    def refuse_replace(self, target):
        if {self, Path(target)} & there:
            refuse_always()
        return replace(self, target)

    def refuse_unlink(self, missing_ok=False):
        if self in there:
            refuse_always()
        unlink(self, missing_ok)

    monkeypatch.setattr(Path, "replace", refuse_replace)
    monkeypatch.setattr(Path, "unlink", refuse_unlink)
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(files, "_open_elsewhere", set())
    return there


def write(path: Path, content: bytes) -> None:
    with atomic_write(path, keep=True) as file:
        file.write(content)


def test_file_that_is_open_elsewhere_is_replaced_at_the_next_write(tmp_path, held, caplog):
    path = tmp_path / "result.json"
    write(path, b"old")
    held.add(path)
    for content in (b"second", b"third"):
        write(path, content)
        assert (path.read_bytes(), newest(path).read_bytes()) == (b"old", content)
    assert [record.message for record in caplog.records] == [
        f"{path} is open in another program: until the next save, the new file is result.json.new"
    ]
    held.clear()
    write(path, b"fourth")
    assert newest(path) == path and path.read_bytes() == b"fourth"
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.json"]


def test_waiting_file_is_settled_only_if_it_is_newer(tmp_path, held):
    path, new = tmp_path / "last.ckpt", tmp_path / "last.ckpt.new"
    write(path, b"old")
    held.add(path)
    write(path, b"new")
    settle(path)
    assert path.read_bytes() == b"old"
    held.clear()
    settle(path)
    assert path.read_bytes() == b"new" and not new.exists()
    new.write_bytes(b"left by a killed process")
    os.utime(new, ns=(1, 1))
    assert newest(path) == path
    settle(path)
    assert path.read_bytes() == b"new" and not new.exists()


def test_file_that_must_be_replaced_gives_an_error_with_its_path(tmp_path, held):
    path = tmp_path / "tokens"
    write(path, b"old")
    held.add(path)
    with pytest.raises(PermissionError) as caught, atomic_write(path) as file:
        file.write(b"new")
    assert caught.value.filename == str(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["tokens"]


def test_open_file_that_cannot_be_deleted_is_reported(tmp_path, held, caplog):
    path = tmp_path / "error.txt"
    path.touch()
    held.add(path)
    delete_with_retry(path)
    assert f"not deleted: {IN_USE if WINDOWS else 'Access is denied'}: {path}" in caplog.text
    held.clear()
    delete_with_retry(path)
    assert not path.exists()


@pytest.mark.skipif(not WINDOWS, reason="elsewhere, a mapped file can be replaced")
def test_mapped_file_is_replaced_when_it_is_closed(tmp_path):
    path = tmp_path / "last.ckpt"
    write(path, b"old")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ):
        write(path, b"new")
        assert (path.read_bytes(), newest(path).read_bytes()) == (b"old", b"new")
    settle(path)
    assert path.read_bytes() == b"new"


def test_reasons_of_windows_are_in_our_words():
    error = OSError(errno.EACCES, "Der Prozess kann nicht auf die Datei zugreifen", "C:\\run\\last.ckpt")
    error.winerror = 32
    assert (
        describe_os_error(error)
        == "another program has it open: close that program, then try again: C:\\run\\last.ckpt"
    )


def test_killed_deletion_leaves_no_half_folder_of_that_name(tmp_path, monkeypatch):
    (tmp_path / "last.ckpt").mkdir()
    (tmp_path / "last.ckpt" / "part").touch()

    def kill(path):
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", kill)
    with pytest.raises(KeyboardInterrupt):
        delete_with_retry(tmp_path / "last.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt.old.partial"]
    monkeypatch.undo()
    delete_with_retry(tmp_path / "last.ckpt.old.partial")
    assert not list(tmp_path.iterdir())
