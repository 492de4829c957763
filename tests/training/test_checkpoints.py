"""Checkpoints on the disk: whole or not there, the one before kept, damage found."""

import io

import pytest
import torch

from rwkv_pl.config import DamagedError
from rwkv_pl.training.checkpoints import DurableCheckpointIO
from rwkv_pl.weights import read_checkpoint


def checkpoint(step):
    return {"global_step": step, "weights": torch.full((1000,), float(step))}


def steps(folder):
    return {path.name: read_checkpoint(path)["global_step"] for path in sorted(folder.iterdir())}


def test_the_one_before_is_kept(tmp_path):
    plugin = DurableCheckpointIO()
    for step in (1, 2, 3):
        plugin.save_checkpoint(checkpoint(step), tmp_path / "checkpoints" / "last.ckpt")
    assert steps(tmp_path / "checkpoints") == {"last.ckpt": 3, "last.prev.ckpt": 2}


def test_best_and_last_of_one_step_are_one_file(tmp_path):
    plugin = DurableCheckpointIO()
    plugin.save_checkpoint(checkpoint(4), tmp_path / "best.ckpt")
    plugin.save_checkpoint(checkpoint(4), tmp_path / "last.ckpt")
    assert (tmp_path / "best.ckpt").samefile(tmp_path / "last.ckpt")
    plugin.save_checkpoint(checkpoint(5), tmp_path / "last.ckpt")
    assert steps(tmp_path) == {"best.ckpt": 4, "last.ckpt": 5, "last.prev.ckpt": 4}


def test_a_file_system_without_links(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError("no links here")

    monkeypatch.setattr("os.link", refuse)
    plugin = DurableCheckpointIO()
    for step in (1, 2):
        plugin.save_checkpoint(checkpoint(step), tmp_path / "last.ckpt")
    assert steps(tmp_path) == {"last.ckpt": 2, "last.prev.ckpt": 1}


def test_a_full_disk_leaves_the_old_ones_whole(tmp_path, monkeypatch):
    plugin = DurableCheckpointIO()
    for step in (1, 2):
        plugin.save_checkpoint(checkpoint(step), tmp_path / "last.ckpt")

    def half(content, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="No space left"):
        plugin.save_checkpoint(checkpoint(3), tmp_path / "last.ckpt")
    monkeypatch.undo()
    assert steps(tmp_path) == {"last.ckpt": 2, "last.prev.ckpt": 2}


def test_every_flipped_bit_of_the_tensors_is_found(tmp_path):
    buffer = io.BytesIO()
    torch.save(checkpoint(1), buffer)
    whole = buffer.getvalue()
    begin = whole.index(torch.full((1000,), 1.0).numpy().tobytes())
    for place in range(begin, begin + 4000, 97):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << (place % 8)
        (tmp_path / "last.ckpt").write_bytes(flipped)
        with pytest.raises(DamagedError, match="not what was written"):
            read_checkpoint(tmp_path / "last.ckpt")
