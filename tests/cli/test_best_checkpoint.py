"""best.ckpt is the best of all validations, with any settings of its callback."""

import csv
import json
from pathlib import Path

import pytest
from command import SMALL, copy_run, load_checkpoint, make_run

from rwkv_pl import load_weights
from rwkv_pl.errors import UserError
from rwkv_pl.training.module import LitRWKV
from rwkv_pl.weights.read import weights_path

WORSENING = (*SMALL, "trainer.max_steps=8", "trainer.val_check_interval=2")


@pytest.fixture(scope="module", autouse=True)
def second_validation_is_the_best():
    """Multiply the scores of the other validations."""
    factors, report = {2: 2, 4: 1, 6: 6, 8: 3}, LitRWKV._report

    def worsen(self, split):
        self._sums[0, 0] *= factors.get(self.trainer.global_step, 4)
        report(self, split)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LitRWKV, "_report", worsen)
        yield


def read_scores(run: Path) -> dict[int, float]:
    with (run / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["val/bits_per_byte"]]
    return {int(row["step"]): float(row["val/bits_per_byte"]) for row in rows}


def assert_best_is_the_best(run: Path) -> None:
    scores = read_scores(run)
    best = min(scores, key=lambda step: scores[step])
    assert best != max(scores)
    assert load_checkpoint(run, "best.ckpt")["global_step"] == best
    assert json.loads((run / "result.json").read_text())["objective"] == pytest.approx(scores[best])


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir() if not path.name.startswith("last."))


@pytest.fixture(scope="module")
def run_with_three(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("three"), *WORSENING[len(SMALL) :], "callbacks.best.save_top_k=3")


@pytest.fixture
def run(run_with_three, tmp_path) -> Path:
    return copy_run(run_with_three, tmp_path)


def test_three_checkpoints_are_kept_next_to_the_best(run):
    assert_best_is_the_best(run)
    assert len(names(run)) == 4
    assert weights_path(run).name == "best.ckpt"


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        (("callbacks.best.save_top_k=-1",), 4),
        (("callbacks.best.filename='step{step}'", "callbacks.best.enable_version_counter=true"), 1),
        (("callbacks.best.save_top_k=2", "callbacks.best.monitor=val/loss"), 2),
    ],
)
def test_best_checkpoint_and_objective_are_those_of_the_best_validation(train, tmp_path, settings, kept):
    assert train(*WORSENING, *settings, "hydra.run.dir=run").code == 0
    assert_best_is_the_best(tmp_path / "run")
    assert len(names(tmp_path / "run")) == 1 + kept
    assert weights_path(tmp_path / "run").name == "best.ckpt"


def test_moved_and_resumed_run_keeps_the_same_checkpoints(train, tmp_path):
    two = ("callbacks.best.save_top_k=2", "callbacks.best.filename='{step}-{val/bits_per_byte:.2f}'")
    assert train(*WORSENING, *two, "hydra.run.dir=whole").code == 0
    assert train(*WORSENING, *two, "hydra.run.dir=run", "trainer.max_steps=4").code == 0
    (tmp_path / "run").rename(tmp_path / "moved")
    assert train("resume=moved", "trainer.max_steps=8").code == 0
    assert names(tmp_path / "moved") == names(tmp_path / "whole")
    assert_best_is_the_best(tmp_path / "moved")


def test_objective_needs_no_best_checkpoint(train, tmp_path):
    assert train(*WORSENING, "callbacks=[last]", "hydra.run.dir=run").code == 0
    objective = json.loads((tmp_path / "run" / "result.json").read_text())["objective"]
    assert objective == pytest.approx(min(read_scores(tmp_path / "run").values()))


def test_best_of_an_old_run_is_found_by_its_score(train, run):
    folder = run / "checkpoints"
    step = load_checkpoint(run, "best.ckpt")["global_step"]
    (folder / "best.ckpt").unlink()  # earlier versions did not write it
    assert weights_path(run) == folder / f"best-step={step}.ckpt"
    (folder / "copy.ckpt").write_bytes((folder / "last.ckpt").read_bytes())  # last.ckpt can have the score of the best
    assert weights_path(run) == folder / f"best-step={step}.ckpt"
    worse = next(path for path in folder.glob("best-*.ckpt") if f"step={step}." not in path.name)
    (folder / "best.ckpt").write_bytes(worse.read_bytes())  # or overwrote it with one of the best three
    assert weights_path(run) == folder / f"best-step={step}.ckpt"
    assert train("resume=run", "trainer.max_steps=9").code == 0
    assert_best_is_the_best(run)


def test_old_run_with_another_name_of_the_best_resumes(train, run):
    config = run / ".hydra" / "config.yaml"
    config.write_text(config.read_text().replace("filename: best", "filename: lowest"))
    (run / "checkpoints" / "best.ckpt").rename(run / "checkpoints" / "lowest.ckpt")
    for path in (run / "checkpoints").glob("best-*.ckpt"):
        path.unlink()
    assert weights_path(run).name == "lowest.ckpt"
    assert train("resume=run", "trainer.max_steps=9").code == 0
    assert_best_is_the_best(run)


def test_corrupt_best_checkpoint_is_reported_not_replaced_by_the_second_best(run):
    (run / "checkpoints" / "best.ckpt").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"best\.ckpt is not a checkpoint"):
        load_weights(run)
