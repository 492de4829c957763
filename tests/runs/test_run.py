"""rwkv_pl.Run: an opened run folder, its displays, its model and its text."""

import io
import json
import os
import shutil
import xml.etree.ElementTree
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from command import call, copy_run, make_run

from rwkv_pl import Run, load_weights
from rwkv_pl.cli.generate import main as generate_command
from rwkv_pl.errors import RunError, UserError
from rwkv_pl.inference.sampling import Sampling
from rwkv_pl.runs.folder import locked
from rwkv_pl.training.curve import COLUMNS

LOGGED = ("trainer.log_every_n_steps=1", "trainer.max_steps=12", "trainer.val_check_interval=6")


@pytest.fixture(scope="module")
def run_of_twelve_steps(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"), *LOGGED)


@pytest.fixture
def run(run_of_twelve_steps, tmp_path) -> Run:
    return Run(copy_run(run_of_twelve_steps, tmp_path))


def test_metrics_are_columns_with_nan_for_missing_values(run):
    metrics = run.metrics
    assert list(metrics) == list(COLUMNS)
    assert all(column.dtype == np.float64 and column.shape == (14,) for column in metrics.values())
    assert metrics["step"].tolist() == [1, 2, 3, 4, 5, 6, 6, 7, 8, 9, 10, 11, 12, 12]
    assert np.isnan(metrics["val/loss"]).tolist() == [step not in (6, 13) for step in range(14)]
    assert 7 < metrics["val/bits_per_byte"][13] < 8.5


def test_table_has_the_first_and_last_rows(run):
    table = repr(run.metrics)
    lines = table.splitlines()
    assert str(run.metrics) == table
    assert lines[0].split() == ["step", "tokens", "seconds", "train/loss", *lines[0].split()[4:]]
    assert [line.split()[0] for line in lines[1:-1]] == ["1", "2", "3", "4", "5", "...", "9", "10", "11", "12", "12"]
    assert lines[-1].startswith("(14 rows; more columns: train/l2wrap")
    assert max(map(len, lines[:-1])) <= 100 and "nan" not in table


def test_table_in_a_notebook_is_valid_html(run):
    root = xml.etree.ElementTree.fromstring(run.metrics._repr_html_())
    head, body = root.find("table/thead/tr"), root.find("table/tbody")
    assert [cell.text for cell in head] == list(COLUMNS)
    assert len(body) == 11 and all(len(row) == len(COLUMNS) for row in body)
    assert "14 rows" in root.find("p").text


def test_curve_in_a_notebook_is_a_png_with_the_lines_of_the_picture_file(run):
    curve = run.curve()
    png = curve._repr_png_()
    picture = matplotlib.image.imread(io.BytesIO(png), format="png")
    assert picture.shape[:2] == (720, 960) and picture.std() > 0
    legend = [text.get_text() for text in curve.figure.axes[0].get_legend().get_texts()]
    assert [text.split()[0] for text in legend] == ["train", "validation", "gzip", "xz"]
    curve.save(run.folder / "mine.png")
    assert (run.folder / "mine.png").read_bytes().startswith(b"\x89PNG")
    assert str(run.folder) in repr(curve)


def test_run_that_trains_has_its_metrics_so_far(run):
    (run.folder / "result.json").unlink()
    path = run.folder / "metrics.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:4]) + "4,38")  # a row that is being written
    assert run.metrics["step"].tolist() == [1, 2, 3]
    assert run.curve()._repr_png_().startswith(b"\x89PNG")
    assert f"Run({str(run.folder)!r}): interrupted, step 3" == repr(run)
    with locked(run.folder):
        assert "running, step 3" in repr(run)


def test_run_without_metrics_says_so(run):
    for name in ("metrics.csv", "baselines.json"):
        (run.folder / name).unlink()
    assert repr(run.metrics) == "(no metrics yet)" and len(run.metrics["step"]) == 0
    assert xml.etree.ElementTree.fromstring(run.metrics._repr_html_()).find("p").text == "no metrics yet"
    assert repr(run).endswith("finished, no metrics yet")
    with pytest.raises(UserError, match="no metrics yet: its first step is not done"):
        run.curve()


def test_older_run_without_baselines_has_a_curve(run):
    (run.folder / "baselines.json").write_text("{")
    assert len(run.curve().figure.axes[0].get_legend().get_texts()) == 2


def test_repr_has_status_step_and_score(run):
    bits = run.metrics["val/bits_per_byte"][-1]
    assert repr(run) == f"Run({str(run.folder)!r}): finished, step 12, validation {bits:.4f} bits per byte"


def change_embedding(path: Path) -> None:
    content = torch.load(path, weights_only=True)
    content["state_dict"]["model.emb.weight"].fill_(0.25)
    path.unlink()  # last.ckpt and best.ckpt may be one file
    torch.save(content, path)


def test_model_is_of_the_best_checkpoint_else_of_the_last(run):
    change_embedding(run.folder / "checkpoints" / "best.ckpt")
    best = run.model()
    assert not best.training and bool((best.emb.weight == 0.25).all())
    assert best is not run.model()
    (run.folder / "checkpoints" / "best.ckpt").unlink()
    assert torch.equal(run.model().emb.weight, load_weights(run.folder / "checkpoints" / "last.ckpt")[0].emb.weight)


OPTIONS = {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "repetition": 1.1, "window": 7, "seed": 5}


def test_text_is_that_of_the_command(run, monkeypatch, capfd):
    flags = [word for name, value in OPTIONS.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    argv = ["rwkv-generate", str(run.folder), "def ", "--max-tokens", "30", *flags]
    result = call(generate_command, argv, monkeypatch, capfd)
    assert run.generate("def ", 30, **OPTIONS) == "def " + result.out.removesuffix("\n")
    before = torch.get_rng_state()
    texts = {run.generate("def ", 30, seed=seed) for seed in (1, 1, 2, None, None)}
    assert len(texts) == 4 and torch.equal(before, torch.get_rng_state())


def test_text_ends_before_a_stop_or_after_no_token(run):
    text = run.generate("a", 40, seed=3)
    assert run.generate("a", 40, seed=3, stop=text[5]) == text[: 1 + text[1:].index(text[5])]
    assert run.generate("a", 0) == "a"
    assert isinstance(run.generate(max_tokens=1), str)


def test_new_checkpoint_is_used(run):
    text = run.generate("a", 40, seed=3)
    assert run.generate("a", 40, seed=3) == text
    change_embedding(run.folder / "checkpoints" / "best.ckpt")
    assert run.generate("a", 40, seed=3) != text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": -1}, "max_tokens must be at least 0"),
        ({"temperature": -1.0}, "temperature must be at least 0"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"top_k": -1}, "top_k must be at least 0"),
        ({"prompt": 3}, "prompt of type str, got int"),
        ({"stop": ""}, "a stop must have at least one byte"),
        ({"prompt": "\ud800"}, "surrogates not allowed"),
        ({"temperature": "hot"}, "generate: "),
        ({"stop": 3}, "generate takes texts to stop at, of type str, got stop=3"),
        ({"stop": [b"x"]}, "of type str, got stop="),
    ],
)
def test_wrong_option_raises_user_error_in_one_line(run, options, message):
    with pytest.raises(UserError, match=message) as caught:
        run.generate(**options)
    assert "\n" not in str(caught.value)


def test_diverged_model_raises_run_error(run, monkeypatch):
    def fail(*_):
        raise FloatingPointError("not finite")

    monkeypatch.setattr(Sampling, "choose", fail)
    with pytest.raises(RunError, match="not finite"):
        run.generate("a")


def test_latest_is_the_run_that_started_last(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"there is no run below .*outputs"):
        Run("latest")
    for name, age in (("new", 0), ("old", 1000)):
        shutil.copytree(run.folder, tmp_path / "outputs" / name)
        path = tmp_path / "outputs" / name / ".hydra" / "overrides.yaml"
        os.utime(path, (path.stat().st_mtime - age,) * 2)
    assert Run("latest").folder == tmp_path / "outputs" / "new"


def test_folder_that_is_no_run_raises_user_error_in_one_line(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "multirun.yaml").touch()
    for folder, message in (
        ("missing", "missing does not exist"),
        ("empty", "empty is not a run folder: it has no .hydra/config.yaml"),
        ("sweep", "sweep is a sweep: give the folder of one of its runs"),
        ("run/train.log", "train.log is a file: give the run's folder"),
        (3, "Run takes the path of a run folder, got 3"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            Run(folder)
        assert "\n" not in str(caught.value)
    assert Run("run").folder == Run(Path("run")).folder == run.folder


def test_baselines_are_those_of_the_result(run):
    baselines = json.loads((run.folder / "baselines.json").read_text())
    printed = (run.folder / "train.log").read_text()
    assert all(f"{name} {bits:.4f}" in printed for name, bits in baselines.items()) and len(baselines) == 2
