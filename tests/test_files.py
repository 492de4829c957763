"""Atomic writes: a file is complete or missing."""

import errno
import io
import os
from pathlib import Path

import pytest
import torch

from rwkv_pl import files
from rwkv_pl.files import atomic_write, describe_os_error, replace_with_retry


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
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
        if len(refusals) < 2:
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
