"""Checkpoint files: complete or missing, the previous one kept, corruption detected."""

import io
import threading
from pathlib import Path

import pytest
import torch

from rwkv_pl import files
from rwkv_pl.errors import CorruptFileError
from rwkv_pl.training import checkpoint_io as checkpoints
from rwkv_pl.training.checkpoint_io import DurableCheckpointIO
from rwkv_pl.weights.checkpoint import read_checkpoint


def make_checkpoint(step):
    return {"global_step": step, "weights": torch.full((1000,), float(step))}


def read_steps(folder):
    return {path.name: read_checkpoint(path)["global_step"] for path in sorted(folder.iterdir())}


def test_previous_checkpoint_is_kept(tmp_path):
    plugin = DurableCheckpointIO()
    for step in (1, 2, 3):
        plugin.save_checkpoint(make_checkpoint(step), tmp_path / "checkpoints" / "last.ckpt")
    assert read_steps(tmp_path / "checkpoints") == {"last.ckpt": 3, "last.prev.ckpt": 2}


def test_best_and_last_of_the_same_step_share_one_file(tmp_path):
    plugin = DurableCheckpointIO()
    plugin.save_checkpoint(make_checkpoint(4), tmp_path / "best.ckpt")
    plugin.save_checkpoint(make_checkpoint(4), tmp_path / "last.ckpt")
    assert (tmp_path / "best.ckpt").samefile(tmp_path / "last.ckpt")
    plugin.save_checkpoint(make_checkpoint(5), tmp_path / "last.ckpt")
    assert read_steps(tmp_path) == {"best.ckpt": 4, "last.ckpt": 5, "last.prev.ckpt": 4}


def test_last_is_no_link_to_a_file_of_only_the_weights(tmp_path):
    plugin = DurableCheckpointIO()
    plugin.save_checkpoint(make_checkpoint(4), tmp_path / "best.ckpt")
    plugin.save_checkpoint(make_checkpoint(4) | {"optimizer_states": []}, tmp_path / "last.ckpt")
    assert "optimizer_states" in read_checkpoint(tmp_path / "last.ckpt")


def test_checkpoints_work_on_a_file_system_without_links(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError("no links here")

    monkeypatch.setattr("os.link", refuse)
    plugin = DurableCheckpointIO()
    for step in (1, 2):
        plugin.save_checkpoint(make_checkpoint(step), tmp_path / "last.ckpt")
    assert read_steps(tmp_path) == {"last.ckpt": 2, "last.prev.ckpt": 1}


def test_checkpoint_that_is_open_elsewhere_does_not_end_the_run(tmp_path, monkeypatch):
    """As on Windows while rwkv-generate or a virus scanner has last.ckpt open. Its reader then keeps its content."""
    path, held, replace = tmp_path / "last.ckpt", [], Path.replace

    def refuse(source, target):
        if any(name in held for name in (Path(target), source)) or (held and source.samefile(held[0])):
            raise PermissionError(13, "Sharing violation")
        return replace(source, target)

    monkeypatch.setattr(Path, "replace", refuse)
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    plugin = DurableCheckpointIO()
    plugin.save_checkpoint(make_checkpoint(1), path)
    held.append(path)
    for step in (2, 3):
        plugin.save_checkpoint(make_checkpoint(step), path)
        assert {file.name for file in tmp_path.iterdir()} == {"last.ckpt", "last.ckpt.new"}
        assert torch.load(path)["global_step"] == 1
        assert read_checkpoint(path)["global_step"] == plugin.load_checkpoint(path)["global_step"] == step
    held.clear()
    plugin.save_checkpoint(make_checkpoint(4), path)
    assert read_steps(tmp_path) == {"last.ckpt": 4, "last.prev.ckpt": 3}


def test_full_disk_leaves_old_checkpoints_intact(tmp_path, monkeypatch):
    plugin = DurableCheckpointIO()
    for step in (1, 2):
        plugin.save_checkpoint(make_checkpoint(step), tmp_path / "last.ckpt")

    def half(content, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="No space left"):
        plugin.save_checkpoint(make_checkpoint(3), tmp_path / "last.ckpt")
    monkeypatch.undo()
    assert read_steps(tmp_path) == {"last.ckpt": 2, "last.prev.ckpt": 1}


@pytest.fixture
def gpu(monkeypatch):
    """Write as for a model on a GPU; the writer thread waits for gpu.set()."""
    go, write = threading.Event(), checkpoints._write

    def later(*args):
        assert threading.current_thread() is not threading.main_thread()
        assert go.wait(10)
        write(*args)

    monkeypatch.setattr(checkpoints, "writes_in_background", lambda checkpoint: True)
    monkeypatch.setattr(checkpoints, "_write", later)
    return go


def test_gpu_training_continues_while_a_thread_writes(tmp_path, gpu):
    plugin, content = DurableCheckpointIO(), make_checkpoint(1)
    plugin.save_checkpoint(content, tmp_path / "best.ckpt")
    plugin.poll()
    assert not list(tmp_path.iterdir())
    content["weights"].fill_(7)  # the next optimizer step
    gpu.set()
    plugin.wait()
    assert float(read_checkpoint(tmp_path / "best.ckpt")["weights"].max()) == 1


def test_writer_error_is_raised_at_the_next_step_and_at_the_end(tmp_path, gpu, monkeypatch):
    def refuse(content, file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", refuse)
    gpu.set()
    for ask in ("poll", "wait", "teardown"):
        plugin = DurableCheckpointIO()
        plugin.save_checkpoint(make_checkpoint(1), tmp_path / "last.ckpt")
        plugin._thread.submit(lambda: None).result()  # after the write
        with pytest.raises(OSError, match="No space left"):
            getattr(plugin, ask)()
        plugin.teardown()
    assert not list(tmp_path.iterdir())


def test_every_flipped_bit_of_the_tensors_is_detected(tmp_path):
    buffer = io.BytesIO()
    torch.save(make_checkpoint(1), buffer)
    whole = buffer.getvalue()
    begin = whole.index(torch.full((1000,), 1.0).numpy().tobytes())
    for place in range(begin, begin + 4000, 97):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << (place % 8)
        (tmp_path / "last.ckpt").write_bytes(flipped)
        with pytest.raises(CorruptFileError, match="does not match its checksum"):
            read_checkpoint(tmp_path / "last.ckpt")
