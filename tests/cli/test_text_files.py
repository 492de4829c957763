"""Runs on a user's files: which are read, which are refused, and what the run says of them."""

import numpy as np
import pytest
from command import SMALL, TEXT

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
