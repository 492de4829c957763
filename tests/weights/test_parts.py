"""Checkpoints in parts: any division of the rows gives the whole tensors; damage and hostile content are refused."""

import contextlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from parts import divide, write_folder
from safetensors.torch import load, save_file
from systems import needs_pipes

from rwkv_pl.errors import CorruptFileError, UserError
from rwkv_pl.training.checkpoint_io import DurableCheckpointIO
from rwkv_pl.weights.checkpoint import is_checkpoint, read_checkpoint
from rwkv_pl.weights.parts import REST, load_outlines, load_whole

WHOLE = {
    "global_step": 7,
    "state_dict": {"model.a": torch.arange(15.0).reshape(5, 3), "model.b": torch.arange(4.0).bfloat16()},
    "optimizer_states": [{"state": {0: {"step": torch.tensor(7.0), "exp_avg": torch.randn(1, 1, 4)}}, "lr": 0.1}],
}


def rewrite(folder: Path, change) -> None:
    """Change the content of rest.ckpt; `change` gets it and returns it."""
    torch.save(change(torch.load(folder / REST)), folder / REST)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_any_number_of_parts_holds_the_whole_tensors(tmp_path, count):
    folder = write_folder(tmp_path / "last.ckpt", WHOLE, count)
    content = read_checkpoint(folder)
    torch.testing.assert_close(load_whole(content), WHOLE, rtol=0, atol=0)
    stored = content["state_dict"]["model.a"]
    for first in range(6):
        for last in range(first, 6):
            assert torch.equal(stored.rows(first, last), WHOLE["state_dict"]["model.a"][first:last])
    outline = load_outlines(content)["state_dict"]["model.b"]
    assert (outline.is_meta, outline.shape, outline.dtype) == (True, (4,), torch.bfloat16)


def test_each_flipped_bit_is_detected_and_its_file_named(tmp_path):
    folder = write_folder(tmp_path / "last.ckpt", WHOLE)
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        for place in range(5, len(content), 61):
            flipped = bytearray(content)
            flipped[place] ^= 1 << (place % 8)
            path.write_bytes(flipped)
            if path.name == REST:  # a flipped bit between the entries of a zip file has no effect
                try:
                    torch.testing.assert_close(load_whole(read_checkpoint(folder)), WHOLE, rtol=0, atol=0)
                    continue
                except UserError as error:
                    message = str(error)
            else:
                with pytest.raises(CorruptFileError, match="does not match its checksum") as caught:
                    read_checkpoint(folder)
                message = str(caught.value)
                del caught  # its frames hold the map of rest.ckpt, which Windows can't write then
            assert str(path) in message and "\n" not in message
        path.write_bytes(content[: len(content) // 2])
        with pytest.raises(CorruptFileError, match=path.name):
            read_checkpoint(folder)
        path.unlink()
        with pytest.raises(CorruptFileError, match=f"{path.name} is missing"):
            read_checkpoint(folder)
        path.write_bytes(content)


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_pickles_in_a_folder_are_not_executed(tmp_path):
    payload = Payload(tmp_path / "executed")
    for place in (REST, "part-00000-of-00002.safetensors"):
        folder = write_folder(tmp_path / f"{place}.folder", WHOLE)
        torch.save({"state_dict": payload}, folder / place)
        with pytest.raises(CorruptFileError):
            load_whole(read_checkpoint(folder))
        with pytest.raises(CorruptFileError):
            load_whole(read_checkpoint(folder, checked=False))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "part-0-of-1.safetensors/../../x", "x.safetensors", "", 3, None]
)
def test_rest_names_only_parts_in_its_folder(tmp_path, name):
    folder = write_folder(tmp_path / "last.ckpt", WHOLE)
    rewrite(folder, lambda content: content | {"parts": {name: 0}})
    with pytest.raises(CorruptFileError, match="which is not a part in its folder"):
        read_checkpoint(folder)


def set_rows(part: Path, first_rows) -> None:
    save_file(load(part.read_bytes()), part, metadata={"first_rows": json.dumps(first_rows)})


def claim(shape, name="model.a", dtype=torch.float32):
    """Change the shape and dtype that rest.ckpt gives for a tensor."""

    def change(content):
        content["state_dict"][name] = torch.empty(shape, dtype=dtype, device="meta")
        return content

    return change


@pytest.mark.parametrize("shape", [(10**12, 3), (5, 10**12), (4, 3), (5,), (), (0, 3), (5, 3, 1)])
def test_claimed_shapes_must_be_those_of_the_parts(tmp_path, shape):
    """A tensor of the claimed size is never allocated."""
    folder = write_folder(tmp_path / "last.ckpt", WHOLE)
    rewrite(folder, claim(shape))
    with pytest.raises(CorruptFileError, match=r"its parts do not hold state_dict/model\.a of"):
        read_checkpoint(folder)


def test_claimed_dtype_must_be_that_of_the_parts(tmp_path):
    folder = write_folder(tmp_path / "last.ckpt", WHOLE)
    rewrite(folder, claim((5, 3), dtype=torch.float64))
    with pytest.raises(CorruptFileError, match=r"model\.a is torch\.float32 in a part, not torch\.float64"):
        load_whole(read_checkpoint(folder))


@pytest.mark.parametrize("first", [0, 2, 4, -1, 10**20, "3", True, None, [3]])
def test_rows_must_be_complete_and_not_overlap(tmp_path, first):
    folder = write_folder(tmp_path / "last.ckpt", WHOLE)
    part = folder / "part-00001-of-00002.safetensors"
    set_rows(part, {"state_dict/model.a": first, "state_dict/model.b": 2})
    with pytest.raises(CorruptFileError):
        read_checkpoint(folder, checked=False)


@pytest.mark.parametrize("metadata", ["[]", "{", "[" * 100_000, '{"no such tensor": 0}'])
def test_invalid_places_are_refused(tmp_path, metadata):
    folder = write_folder(tmp_path / "last.ckpt", WHOLE)
    part = folder / "part-00000-of-00002.safetensors"
    save_file(load(part.read_bytes()), part, metadata={"first_rows": metadata})
    with pytest.raises(CorruptFileError, match="corrupt or not a part"):
        read_checkpoint(folder, checked=False)


def test_content_that_contains_itself_is_refused(tmp_path):
    folder = write_folder(tmp_path / "last.ckpt", WHOLE)

    loop = {}
    loop["loop"] = loop
    rewrite(folder, lambda content: content | loop)
    with pytest.raises(CorruptFileError, match="recursion"):
        read_checkpoint(folder)


@needs_pipes
def test_pipe_in_place_of_a_part_does_not_hang(tmp_path):
    folder = write_folder(tmp_path / "last.ckpt", WHOLE)
    (folder / "part-00000-of-00002.safetensors").unlink()
    os.mkfifo(folder / "part-00000-of-00002.safetensors")
    with pytest.raises(CorruptFileError, match="is missing"):
        read_checkpoint(folder)


def test_file_of_the_folder_is_no_checkpoint_itself(tmp_path):
    folder = write_folder(tmp_path / "last.ckpt", WHOLE)
    with pytest.raises(UserError, match=r"last\.ckpt: give that folder"):
        read_checkpoint(folder / REST)
    (folder / REST).unlink()
    assert not is_checkpoint(folder)


# Writing, here by one process


def save(plugin: DurableCheckpointIO, path: Path, step: int, parts: bool) -> None:
    content = WHOLE | {"global_step": step}
    if parts:
        plugin.save_parts(*divide(content, 0, 1), path)
    else:
        plugin.save_checkpoint(content, path)


def read_steps(folder: Path):
    return {path.name: read_checkpoint(path)["global_step"] for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("kinds", [(1, 1, 1), (0, 1, 1), (1, 0, 0), (0, 1, 0), (1, 0, 1)])
def test_previous_checkpoint_of_either_kind_is_kept(tmp_path, kinds):
    for step, parts in enumerate(kinds):
        plugin = DurableCheckpointIO()
        save(plugin, tmp_path / "best.ckpt", step, bool(parts))
        save(plugin, tmp_path / "last.ckpt", step, bool(parts))
        assert (tmp_path / "last.ckpt").is_dir() == parts
        torch.testing.assert_close(
            plugin.load_checkpoint(tmp_path / "last.ckpt"), WHOLE | {"global_step": step}, rtol=0, atol=0
        )
    assert read_steps(tmp_path) == {"best.ckpt": 2, "last.ckpt": 2, "last.prev.ckpt": 1}
    plugin.remove_checkpoint(tmp_path / "best.ckpt")
    assert read_steps(tmp_path) == {"last.ckpt": 2, "last.prev.ckpt": 1}


def test_parts_of_the_same_step_are_the_same_files(tmp_path):
    plugin = DurableCheckpointIO()
    for name in ("best.ckpt", "last.ckpt"):
        save(plugin, tmp_path / name, 4, parts=True)
    for file in (tmp_path / "best.ckpt").iterdir():
        assert file.samefile(tmp_path / "last.ckpt" / file.name)
    save(plugin, tmp_path / "last.ckpt", 5, parts=True)
    assert read_steps(tmp_path) == {"best.ckpt": 4, "last.ckpt": 5, "last.prev.ckpt": 4}


@pytest.mark.parametrize("place", ["write_part", "write_rest"])
def test_full_disk_leaves_nothing_of_the_new_folder(tmp_path, monkeypatch, place):
    plugin = DurableCheckpointIO()
    for step in (1, 2):
        save(plugin, tmp_path / "last.ckpt", step, parts=True)

    def refuse(folder, *arguments):
        (folder / "half").write_bytes(b"half of it")
        raise OSError(28, "No space left on device", str(folder / "half"))

    monkeypatch.setattr(f"rwkv_pl.training.checkpoint_io.{place}", refuse)
    with pytest.raises(OSError, match="No space left") as caught:
        save(plugin, tmp_path / "last.ckpt", 3, parts=True)
    assert caught.value.filename == str(tmp_path / "last.ckpt")
    assert read_steps(tmp_path) == {"last.ckpt": 2, "last.prev.ckpt": 1}


class KilledError(BaseException):
    pass


@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize("name", ["last.ckpt", "best.ckpt"])
@pytest.mark.parametrize("call", [1, 2, 3, 4, 5, 6])
def test_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path, monkeypatch, call, name, parts):
    """A new folder, or a file after a folder, replaces a folder: before each rename or deletion."""
    from rwkv_pl.runs.folder import locked

    path = tmp_path / "checkpoints" / name
    for step in (1, 2):
        save(DurableCheckpointIO(), path, step, parts=True)
    calls = []

    def strike(original):
        def struck(*arguments, **options):
            calls.append(arguments)
            if len(calls) >= call:
                raise KilledError
            return original(*arguments, **options)

        return struck

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", strike(Path.replace))
        patch.setattr("shutil.rmtree", strike(shutil.rmtree))
        with pytest.raises(KilledError) if call < 4 else contextlib.suppress(KilledError):
            save(DurableCheckpointIO(), path, 3, parts)
    assert is_checkpoint(path) and read_checkpoint(path)["global_step"] in (2, 3)
    with locked(tmp_path):
        steps = read_steps(path.parent)
    assert steps[name] in (2, 3)
    assert steps.keys() <= {name, "last.prev.ckpt"}
