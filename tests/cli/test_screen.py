"""Text that stdout can't show, and a stdout that can't be written."""

import io
import json
import os
import sys
from pathlib import Path

import pytest
from brief import shorten_run_end
from command import SMALL, TEXT

import rwkv_pl
from rwkv_pl.cli import eval as evaluation
from rwkv_pl.cli import generate, report
from rwkv_pl.cli import train as training


def closed_pipe() -> io.TextIOWrapper:
    read, write = os.pipe()
    os.close(read)
    return os.fdopen(write, "w")


UNWRITABLE = {"closed": lambda: None, "full": lambda: Path("/dev/full").open("w"), "no reader": closed_pipe}  # noqa: SIM115
needs_dev_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "cp437", "utf-8"])
def test_encoding_of_stdout_replaces_characters(train, tmp_path, monkeypatch, encoding):
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding))
    (tmp_path / "语料-ä.txt").write_bytes(TEXT)
    result = train(*SMALL, "data.path='语料-ä.txt'", "hydra.run.dir=run")
    assert (result.code, result.err) == (0, "")
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "finished"
    name = "语料-ä.txt".encode(encoding, "replace").decode(encoding)
    assert name in shown.getvalue().decode(encoding)
    assert "语料-ä.txt" in (tmp_path / "run" / "train.log").read_text(encoding="utf-8")


@needs_dev_full
@pytest.mark.parametrize("kind", UNWRITABLE)
@pytest.mark.parametrize("resumed", [False, True])
def test_unwritable_stdout_does_not_stop_training(train, run, tmp_path, monkeypatch, kind, resumed):
    monkeypatch.setattr(sys, "stdout", UNWRITABLE[kind]())
    arguments = ("resume=run", "trainer.max_steps=6") if resumed else (*SMALL, "hydra.run.dir=other")
    result = train(*arguments)
    assert (result.code, result.err) == (0, "")
    ended = json.loads((tmp_path / ("run" if resumed else "other") / "result.json").read_text())
    assert (ended["status"], ended["step"]) == ("finished", 6 if resumed else 4)


@needs_dev_full
@pytest.mark.parametrize("kind", UNWRITABLE)
def test_unwritable_stdout_does_not_stop_a_call_from_python(tmp_path, monkeypatch, kind):
    shorten_run_end(monkeypatch.setattr)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus.txt").write_bytes(TEXT)
    monkeypatch.setattr(sys, "stdout", stream := UNWRITABLE[kind]())
    run = rwkv_pl.train(*SMALL, "trainer.max_steps=2")
    assert (json.loads((run.folder / "result.json").read_text())["status"], sys.stdout) == ("finished", stream)


PRODUCTS = {
    "rwkv-train": (training.main, "--cfg", "job"),
    "rwkv-eval": (evaluation.main, "weights=run", "protocol=windows"),
    "rwkv-generate": (generate.main, "run", "--max-tokens", "9", "--seed", "1"),
    "rwkv-report": (report.main, "run"),
}


@pytest.mark.parametrize("flags", [("--cfg", "job"), ("--help",), ("--info",)])
def test_closed_stdout_of_settings_gives_one_line_error(train, monkeypatch, flags):
    monkeypatch.setattr(sys, "stdout", None)
    result = train(*flags)
    assert (result.code, result.err.count("\n")) == (2, 1), result.err
    assert "standard output is closed: redirect it to a file or /dev/null" in result.err


@needs_dev_full
@pytest.mark.parametrize("name", PRODUCTS)
def test_full_stdout_of_a_product_gives_one_line_error(command, run, monkeypatch, name):
    main, *arguments = PRODUCTS[name]
    monkeypatch.setattr(sys, "stdout", UNWRITABLE["full"]())
    result = command(main, name, *arguments)
    assert result.code == 1
    assert result.err.startswith(f"{name}: disk full") and result.err.count("\n") == 1, result.err
    sys.stdout.close()  # as at exit


@pytest.mark.parametrize("name", PRODUCTS)
def test_closed_pipe_of_a_product_is_quiet(command, run, monkeypatch, name):
    main, *arguments = PRODUCTS[name]
    monkeypatch.setattr(sys, "stdout", closed_pipe())
    result = command(main, name, *arguments)
    assert (result.code, result.err) == (1, "")
    sys.stdout.close()
