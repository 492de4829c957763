"""A full disk gives a one-line error with the path and loses nothing; the run resumes when there is space again."""

import errno
import functools
import subprocess
from collections.abc import Iterator
from pathlib import Path

import forks
import pytest
from forks import Strike
from scheduler import free_port, run_ranks, start_rank
from systems import WINDOWS, needs_gloo
from test_faults import (
    CORPUS,
    RUN,
    TRAINING_STEP,
    VALIDATION_STEP,
    assert_same_run,
    finish_run,
    load_state,
    nth_validation_step,
)

# Errors of TensorBoard and the log during shutdown must not hide this line.
NOISE = ("Traceback", "Logging error", "Exception ignored", "Exception in thread")


def raise_disk_full() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def fill_disk(folder: Path) -> None:
    """Fill the free space."""
    with (folder / "ballast").open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError:
                continue


def assert_reported(result: forks.Result, code: int, where: str) -> None:
    assert result.code == code, result.err
    last = result.err.splitlines()[-1]
    assert last.startswith("rwkv-train: "), result.err
    assert "disk full" in last
    assert where in last
    assert not any(noise in result.err + result.out for noise in NOISE), result.err


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    (folder / "corpus.txt").write_bytes(CORPUS)
    finish_run(folder, *RUN)
    return folder / "run"


@pytest.mark.parametrize(
    ("place", "call", "where"),
    [
        ("torch:save", 2, "checkpoints"),
        ("csv:DictWriter.writerow", 6, "metrics.csv"),
        ("tensorboard.summary.writer.record_writer:RecordWriter.write", 60, "run"),
        ("rwkv_pl.training.callbacks.progress:LogFile.flush", 9, "train.log"),
        ("rwkv_pl.training.curve:render_png", 2, "loss.png"),
        ("os:link", 1, "checkpoints"),
    ],
)
def test_refused_write_is_reported(tmp_path, finished_run, place, call, where):
    (tmp_path / "corpus.txt").write_bytes(CORPUS)
    result = forks.run(tmp_path, *RUN, strikes=[Strike(place, call, raise_disk_full)])
    if place == "os:link":  # a copy is used instead
        assert result.code == 0
    else:
        assert_reported(result, 1, where)
        assert "; to resume: " in result.err or "; to start again: " in result.err
    finish_run(tmp_path, "resume=run")
    assert_same_run(tmp_path / "run", finished_run)


def test_unwritable_tokens_or_run_folder_is_reported(tmp_path):
    (tmp_path / "corpus.txt").write_bytes(CORPUS)
    cache = {"RWKV_PL_CACHE": str(tmp_path / "cache")}
    strike = Strike("rwkv_pl.data.vocabulary:Vocabulary.encode_documents", 3, raise_disk_full)
    result = forks.run(tmp_path, *RUN, strikes=[strike], **cache)
    assert_reported(result, 2, str(Path("cache", "tokens")))
    assert not (tmp_path / "run").exists()
    assert not list((tmp_path / "cache").rglob("*.partial"))
    result = forks.run(tmp_path, *RUN, strikes=[Strike("rwkv_pl.runs.folder:atomic_write", 2, raise_disk_full)])
    assert_reported(result, 1, "")
    finish_run(tmp_path, *RUN)


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        WINDOWS
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk], capture_output=True).returncode
    ):
        pytest.skip("mounting needs root")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.parametrize(
    ("place", "call"),
    [
        ("torch:save", 3),
        (VALIDATION_STEP, nth_validation_step(2, 2)),
        pytest.param(TRAINING_STEP, 14, marks=pytest.mark.slow),
        pytest.param("rwkv_pl.training.callbacks.metrics:_rewrite_csv", 1, marks=pytest.mark.slow),
        ("rwkv_pl.runs.train:sample_tokens", 1),
    ],
)
def test_full_disk_is_reported(tmp_path, small_disk, finished_run, place, call):
    (tmp_path / "corpus.txt").write_bytes(CORPUS)
    run = (*RUN, f"hydra.run.dir={small_disk}/run")
    result = forks.run(tmp_path, *run, strikes=[Strike(place, call, functools.partial(fill_disk, small_disk))])
    assert_reported(result, 1, f"{small_disk}/run")
    for name in ("last.ckpt", "last.prev.ckpt", "best.ckpt"):
        if (small_disk / "run" / "checkpoints" / name).exists():
            load_state(small_disk / "run", name)
    (small_disk / "ballast").unlink()
    finish_run(tmp_path, f"resume={small_disk}/run")
    assert_same_run(small_disk / "run", finished_run)


@needs_gloo
@pytest.mark.slow
def test_full_disk_of_rank_0_ends_both_processes(tmp_path, small_disk):
    (tmp_path / "corpus.txt").write_bytes(CORPUS)
    port, run = free_port(), (*RUN, "trainer.devices=2", f"hydra.run.dir={small_disk}/run")
    strike = Strike("torch:save", 3, functools.partial(fill_disk, small_disk))
    ends = [
        start_rank(tmp_path, "torchrun", rank, port, *run, strikes=[strike] if rank == 0 else []) for rank in (0, 1)
    ]
    first, second = (end() for end in ends)
    assert_reported(first, 1, f"{small_disk}/run")
    assert first.err.count("\n") == 1
    assert (second.code, second.err) == (1, "")
    (small_disk / "ballast").unlink()
    for result in run_ranks(tmp_path, "torchrun", f"resume={small_disk}/run"):
        assert result.code == 0, result.err
