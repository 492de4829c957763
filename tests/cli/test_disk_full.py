"""A disk that is full: one line that says so and where, nothing lost, and the run goes on when there is room again."""

import errno
import functools
import subprocess
from collections.abc import Iterator
from pathlib import Path

import forks
import pytest
from forks import Strike
from test_faults import CORPUS, RUN, TRAINING_STEP, VALIDATION_STEP, assert_the_same, finished, state

# What TensorBoard and the log do on the way down must not cover the line.
NOISE = ("Traceback", "Logging error", "Exception ignored", "Exception in thread")


def no_room() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def fill(folder: Path) -> None:
    """Takes what room there is."""
    with (folder / "ballast").open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError:
                continue


def assert_told(result: forks.Result, code: int, where: str) -> None:
    assert result.code == code, result.err
    last = result.err.splitlines()[-1]
    assert last.startswith("rwkv-train: "), result.err
    assert "disk full" in last
    assert where in last
    assert not any(noise in result.err + result.out for noise in NOISE), result.err


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    (folder / "corpus.txt").write_bytes(CORPUS)
    finished(folder, *RUN)
    return folder / "run"


@pytest.mark.parametrize(
    ("place", "call", "where"),
    [
        ("torch:save", 2, "checkpoints/"),
        ("csv:DictWriter.writerow", 6, "metrics.csv"),
        ("tensorboard.summary.writer.record_writer:RecordWriter.write", 60, "run"),
        ("rwkv_pl.training.callbacks.progress:LogFile.flush", 9, "train.log"),
        ("matplotlib.backends.backend_agg:FigureCanvasAgg.print_png", 2, "loss.png"),
        ("os:link", 1, "checkpoints/"),
    ],
)
def test_a_refused_write(tmp_path, whole, place, call, where):
    (tmp_path / "corpus.txt").write_bytes(CORPUS)
    result = forks.run(tmp_path, *RUN, strikes=[Strike(place, call, no_room)])
    if place == "os:link":  # a copy serves
        assert result.code == 0
    else:
        assert_told(result, 1, where)
        assert "run goes on from it" in result.err or "run starts it again" in result.err
    finished(tmp_path, "resume=run")
    assert_the_same(tmp_path / "run", whole)


def test_tokens_and_folders_that_cannot_be_written(tmp_path):
    (tmp_path / "corpus.txt").write_bytes(CORPUS)
    cache = {"RWKV_PL_CACHE": str(tmp_path / "cache")}
    result = forks.run(
        tmp_path, *RUN, strikes=[Strike("rwkv_pl.data.vocabulary:Vocabulary.encode", 3, no_room)], **cache
    )
    assert_told(result, 2, "cache/tokens")
    assert not (tmp_path / "run").exists()
    assert not list((tmp_path / "cache").rglob("*.partial"))
    result = forks.run(tmp_path, *RUN, strikes=[Strike("rwkv_pl.runs.folder:publish", 2, no_room)])
    assert_told(result, 1, "")
    finished(tmp_path, *RUN)


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting takes root")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.parametrize(
    ("place", "call"),
    [
        ("torch:save", 3),
        (VALIDATION_STEP, 15),
        pytest.param(TRAINING_STEP, 14, marks=pytest.mark.slow),
        pytest.param("rwkv_pl.training.callbacks.metrics:_begin", 1, marks=pytest.mark.slow),
        ("rwkv_pl.runs.train:sample_tokens", 1),
    ],
)
def test_a_disk_that_fills_up(tmp_path, small_disk, whole, place, call):
    (tmp_path / "corpus.txt").write_bytes(CORPUS)
    run = (*RUN, f"hydra.run.dir={small_disk}/run")
    result = forks.run(tmp_path, *run, strikes=[Strike(place, call, functools.partial(fill, small_disk))])
    assert_told(result, 1, f"{small_disk}/run")
    for name in ("last.ckpt", "last.prev.ckpt", "best.ckpt"):
        if (small_disk / "run" / "checkpoints" / name).exists():
            state(small_disk / "run", name)
    (small_disk / "ballast").unlink()
    finished(tmp_path, f"resume={small_disk}/run")
    assert_the_same(small_disk / "run", whole)
