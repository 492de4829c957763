"""Checkpoints in parts (checkpoints.sharded=true), read by every command and written by several processes."""

import errno
import functools
import os
import shutil
from pathlib import Path

import forks
import pytest
import torch
from command import SMALL, TEXT, call, copy_run, make_run
from forks import KILLED, Strike, kill
from parts import write_folder
from scheduler import free_port, run_ranks, start_rank
from test_disk_full import fill_disk, small_disk  # noqa: F401  # a fixture

from rwkv_pl import LitRWKV, Run, load_weights
from rwkv_pl.cli import convert, generate, report
from rwkv_pl.weights.checkpoint import read_checkpoint
from rwkv_pl.weights.parts import load_whole


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> Path:
    """A finished run of 4 steps with whole checkpoints."""
    return make_run(tmp_path_factory.mktemp("whole"), "callbacks=[default,ema]")


@pytest.fixture
def run_in_parts(whole_run, tmp_path) -> Path:
    """The same run with checkpoints in three parts."""
    (tmp_path / "corpus.txt").write_bytes(TEXT)
    run = copy_run(whole_run, tmp_path)
    for name in ("last.ckpt", "best.ckpt"):
        path = run / "checkpoints" / name
        content = torch.load(path, weights_only=True)
        path.unlink()
        write_folder(path, content, 3)
    return run


def assert_same(found, expected, where: str = "") -> None:
    """Equal keys, and tensors with equal bits."""
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), where
    elif isinstance(expected, dict | list):
        assert len(found) == len(expected), where
        for key in expected if isinstance(expected, dict) else range(len(expected)):
            assert_same(found[key], expected[key], f"{where}/{key}")


def load(run: Path, name: str = "last.ckpt"):
    return load_whole(read_checkpoint(run / "checkpoints" / name))


def test_one_process_continues_from_parts_as_from_a_file(train, whole_run, run_in_parts, tmp_path):
    expected = copy_run(whole_run, tmp_path / "whole")
    (tmp_path / "whole" / "corpus.txt").write_bytes(TEXT)
    for run in (expected, run_in_parts):
        assert train(f"resume={run}", "trainer.max_steps=6").code == 0
    for part in ("state_dict", "current_model_state", "optimizer_states"):
        assert_same(load(run_in_parts)[part], load(expected)[part], part)
    assert (run_in_parts / "checkpoints" / "last.ckpt").is_file()
    assert load(run_in_parts, "last.prev.ckpt")["global_step"] == 4
    assert {path.name for path in (run_in_parts / "checkpoints").iterdir()} == {
        "best.ckpt", "last.ckpt", "last.prev.ckpt"
    }  # fmt: skip


def test_damaged_parts_are_reported_and_the_previous_checkpoint_is_used(train, run_in_parts):
    last = run_in_parts / "checkpoints" / "last.ckpt"
    shutil.copytree(last, last.with_name("last.prev.ckpt"))
    part = last / "part-00002-of-00003.safetensors"
    content = bytearray(part.read_bytes())
    content[-5] ^= 4
    part.write_bytes(content)
    result = train(f"resume={run_in_parts}", "trainer.max_steps=5")
    assert result.code == 0, result.err
    message = " ".join(result.out.split())
    assert f"{part} is corrupt: it does not match its checksum in rest.ckpt; resuming from" in message
    assert "last.prev.ckpt, step 4" in message


def test_library_reads_parts(whole_run, run_in_parts):
    model, vocabulary = load_weights(run_in_parts)
    expected, _ = load_weights(whole_run)
    assert_same(model.state_dict(), expected.state_dict())
    assert vocabulary is not None
    assert_same(Run(run_in_parts).model().state_dict(), expected.state_dict())
    for name in ("last.ckpt", "best.ckpt"):
        path = run_in_parts / "checkpoints" / name
        there = LitRWKV.load_from_checkpoint(whole_run / "checkpoints" / name)
        assert_same(LitRWKV.load_from_checkpoint(path).state_dict(), there.state_dict())
        assert_same(LitRWKV.load_from_checkpoint(path, model=model).state_dict(), there.state_dict())


@pytest.mark.slow
def test_all_commands_read_parts(train, evaluate, whole_run, run_in_parts, tmp_path, capfd, monkeypatch):
    best = str(run_in_parts / "checkpoints" / "best.ckpt")
    for main, arguments in (
        (generate.main, ["rwkv-generate", best, "a", "--max-tokens", "4"]),
        (convert.main, ["rwkv-convert", best, "official.pth"]),
        (report.main, ["rwkv-report", str(tmp_path)]),
    ):
        result = call(main, arguments, monkeypatch, capfd)
        assert result.code == 0, result.err
    expected = load_weights(whole_run)[0].state_dict()
    assert_same(load_weights(tmp_path / "official.pth")[0].state_dict(), expected)
    assert evaluate(f"weights={best}", "protocol=windows").code == 0
    assert train(*SMALL, f"weights={best}", "trainer.max_steps=1", "hydra.run.dir=next").code == 0


# Written by several processes

SHARDED = (*SMALL, "trainer.strategy=fsdp", "trainer.devices=2", "checkpoints.sharded=true", "logger=none",
           "callbacks.last.every_n_train_steps=2", "trainer.max_steps=6", "trainer.val_check_interval=2")  # fmt: skip


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "corpus.txt").write_bytes(TEXT)
    return tmp_path


def run_struck(folder: Path, run: Path, rank: int, strike: Strike) -> list[forks.Result]:
    """Run two processes, one of which is struck."""
    port = free_port()
    ends = [
        start_rank(folder, "torchrun", each, port, *SHARDED, f"hydra.run.dir={run}", strikes=[strike] * (each == rank))
        for each in (0, 1)
    ]
    return [end() for end in ends]


def finish(folder: Path, run: Path) -> None:
    for result in run_ranks(folder, "torchrun", f"resume={run}"):
        assert result.code == 0, result.err


def assert_as_unbroken(folder: Path, run: Path) -> None:
    """The bits of an unbroken run, and nothing left of what was broken."""
    for result in run_ranks(folder, "torchrun", *SHARDED, f"hydra.run.dir={folder / 'unbroken'}"):
        assert result.code == 0, result.err
    for name in ("last.ckpt", "best.ckpt"):
        for part in ("state_dict", "optimizer_states"):
            assert_same(load(run, name)[part], load(folder / "unbroken", name)[part], part)
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt", "last.prev.ckpt"}


def refuse() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


WRITE_PART = "rwkv_pl.training.checkpoint_io:write_part"
WRITE_REST = "rwkv_pl.training.checkpoint_io:write_rest"  # by rank 0


@pytest.mark.slow
@pytest.mark.parametrize(("place", "rank"), [(WRITE_PART, 0), (WRITE_PART, 1), (WRITE_REST, 0)])
def test_full_disk_in_one_process_ends_all_with_one_line(folder, place, rank):
    run = folder / "run"
    first, second = run_struck(folder, run, rank, Strike(place, 3, refuse))
    assert (first.code, second.code) == (1, 1)
    assert second.err == "" and first.err.count("\n") == 1
    assert f"disk full: {run}/checkpoints/" in first.err and f"rwkv-train resume={run}" in first.err
    assert not list(run.rglob("*.partial"))
    for path in (run / "checkpoints").iterdir():
        read_checkpoint(path)
    finish(folder, run)
    assert_as_unbroken(folder, run)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_full_disk_is_reported(folder, small_disk, rank):  # noqa: F811
    run = small_disk / "run"
    first, second = run_struck(folder, run, rank, Strike(WRITE_PART, 3, functools.partial(fill_disk, small_disk)))
    assert (first.code, second.code) == (1, 1)
    assert second.err == "" and f"disk full: {run}/checkpoints/" in first.err.splitlines()[-1]
    for path in (run / "checkpoints").iterdir():
        read_checkpoint(path)
    (small_disk / "ballast").unlink()
    finish(folder, run)
    assert_as_unbroken(folder, run)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_killed_process_leaves_the_checkpoints_before(folder, rank):
    run = folder / "run"
    results = run_struck(folder, run, rank, Strike(WRITE_PART, 3, kill, after=True))
    assert results[rank].code == KILLED and results[1 - rank].code == 1
    finish(folder, run)
    assert_as_unbroken(folder, run)


def kill_at(call: int) -> None:
    """Kill this process at its call-th rename or deletion from now on."""
    Strike("rwkv_pl.files:_retry", call, kill).install()


@pytest.mark.slow
@pytest.mark.parametrize("call", range(1, 6))
def test_kill_between_the_renames_loses_nothing(folder, call):
    run = folder / "run"
    first, _ = run_struck(folder, run, 0, Strike(WRITE_PART, 2, functools.partial(kill_at, call)))
    assert first.code == KILLED
    finish(folder, run)
    assert_as_unbroken(folder, run)
