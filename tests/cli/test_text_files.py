"""Runs on a user's files: which are read, which are refused, and what the run says of them."""

import shutil

import numpy as np
import pytest
from command import SMALL, TEXT

from rwkv_pl.cli import report

NOISE = np.random.default_rng(1).bytes(40_000)

SETTINGS = tuple(setting for setting in SMALL if "data.path" not in setting)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl.zst", NOISE, "a.jsonl.zst"),
        ("a.txt.bz2", NOISE, "a.txt.bz2"),
        ("a.parquet", b"PAR1" + NOISE, "a.parquet is not text but a container (parquet)"),
        ("a.json", b'[{"text": "a"}]', "a.json is not read"),
    ],
)
def test_unknown_container_gives_one_line_exit_2_and_no_folder(train, tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    before = sorted(tmp_path.rglob("*"))
    result = train(*SETTINGS, f"data.path={name}")
    assert (result.code, result.err.count("\n")) == (2, 1), result.err
    assert says in result.err
    assert sorted(tmp_path.rglob("*")) == before


def test_text_that_is_not_text_is_a_warning(train, evaluate, tmp_path):
    (tmp_path / "a.txt").write_bytes(TEXT.decode().encode("utf-16-le"))
    result = train(*SETTINGS, "data.path=a.txt", "hydra.run.dir=run")
    assert result.code == 0, result.err
    warning = f"warning: 50% of {tmp_path / 'a.txt'} are NUL bytes"
    assert warning in result.out
    assert warning in (tmp_path / "run" / "train.log").read_text()
    assert warning in evaluate("weights=run").err


@pytest.mark.parametrize("name", ["corpus.json", "corpus.bz2"])
def test_run_on_a_file_that_is_now_refused_resumes(train, evaluate, run, name):
    """The first versions read it as text."""
    config = run / ".hydra" / "config.yaml"
    config.write_text(config.read_text().replace("corpus.txt", name))
    (run.parent / "corpus.txt").rename(run.parent / name)
    result = train("resume=run", "trainer.max_steps=5")
    assert result.code == 0, result.err
    assert not evaluate("weights=run").err
    assert train(*SETTINGS, f"data.path={name}").code == 2


def read_data_line(out: str) -> str:
    return next(line for line in out.splitlines() if line.startswith("data"))


@pytest.mark.parametrize("path", [".", "'**/*'", "'./*/*.*'"])
def test_outputs_of_runs_do_not_become_text(train, evaluate, command, tmp_path, path):
    (tmp_path / "books").mkdir()
    (tmp_path / "corpus.txt").rename(tmp_path / "books" / "corpus.txt")
    first = train(*SETTINGS, f"data.path={path}", "hydra.run.dir=one")
    assert ", 1 file, digest" in read_data_line(first.out), first.err
    assert evaluate("weights=one/checkpoints/best.ckpt", "data=text", "data.path=books").code == 0
    command(report.main, "rwkv-report", "one", "--out", ".")
    second = train(*SETTINGS, f"data.path={path}")
    assert read_data_line(second.out) == read_data_line(first.out)
    assert train("resume=one", "trainer.max_steps=5").code == 0


def test_run_that_has_read_the_files_of_another_resumes(train, run, tmp_path):
    """The first versions read them."""
    at = TEXT.index(b"\n", len(TEXT) // 2)  # the same text as the run's, in two files
    (tmp_path / "corpus.txt").unlink()
    (tmp_path / "texts" / "run" / ".hydra").mkdir(parents=True)
    (tmp_path / "texts" / "corpus.txt").write_bytes(TEXT[:at])
    (tmp_path / "texts" / "run" / "sample.txt").write_bytes(TEXT[at + 1 :])
    config = run / ".hydra" / "config.yaml"
    config.write_text(config.read_text().replace("corpus.txt", "texts"))
    result = train("resume=run", "trainer.max_steps=5")
    assert result.code == 0, result.err
    assert ", 2 files, 2 documents" in result.out
    shutil.rmtree(tmp_path / "texts" / "run")
    assert "is not the text that" in train("resume=run", "trainer.max_steps=6").err
