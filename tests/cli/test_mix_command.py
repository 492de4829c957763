"""Runs on several corpora: start, scores, resume, evaluation, and what a stored run cannot do."""

import csv
import gc
import json
import shutil
from pathlib import Path

import pytest
import torch
from command import SMALL, TEXT, load_checkpoint

CORPORA = "{code:{path:corpus.txt,share:1},books:{path:books.txt,share:3}}"
MIX = ("data=mix", f"data.corpora={CORPORA}", *SMALL[2:], "trainer.val_check_interval=2")


@pytest.fixture(autouse=True)
def books(tmp_path: Path) -> Path:
    path = tmp_path / "books.txt"
    path.write_bytes(TEXT[::-1])
    return path


def test_run_reports_each_corpus_and_resumes_to_the_same_bits(train, tmp_path, books):
    result = train(*MIX, "trainer.max_steps=6", "hydra.run.dir=uninterrupted")
    assert result.code == 0, result.err
    for shown in ("code, 25.0% of the samples, corpus.txt", "books, 75.0% of the samples, books.txt"):
        assert shown in result.out
    # 6 steps of 6 samples; a pass is 43,200 tokens in windows of 16.
    passes = f"code {9 / 2700:.2g} passes, books {27 / 2700:.2g} passes"
    assert f"(code {9 / 2700:.2g} passes, books {27 / 2700:.2g} passes)" in result.out
    assert f"passes  {passes}" in result.out
    last = json.loads((tmp_path / "uninterrupted" / "result.json").read_text())
    assert last["passes"] == {"code": 9 / 2700, "books": 27 / 2700}
    with (tmp_path / "uninterrupted" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["val/loss"]]
    assert len(rows) == 3
    each = [float(rows[-1][f"val/bits_per_byte/{name}"]) for name in ("code", "books")]
    assert each == pytest.approx(list(last["corpora"].values()))
    assert [float(row["passes/books"]) for row in rows] == pytest.approx([9 / 2700, 18 / 2700, 27 / 2700])
    assert float(rows[-1]["val/bits_per_byte"]) == pytest.approx(sum(each) / 2)  # the limit gives both the same bytes
    # The run is stopped, its folder and one corpus are moved.
    assert train(*MIX, "hydra.run.dir=run").code == 0
    shutil.move(tmp_path / "run", tmp_path / "moved")
    gc.collect()  # Windows moves no file that is mapped
    shutil.move(books, tmp_path / "elsewhere.txt")
    result = train("resume=moved", "trainer.max_steps=6")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "set data.corpora.books.path= to its new path" in result.err
    result = train("resume=moved", "trainer.max_steps=6", "data.corpora.books.path=elsewhere.txt")
    assert result.code == 0, result.err
    ours, theirs = load_checkpoint(tmp_path / "moved"), load_checkpoint(tmp_path / "uninterrupted")
    assert ours["global_step"] == 6
    assert all(torch.equal(ours["state_dict"][name], theirs["state_dict"][name]) for name in theirs["state_dict"])


CONTRADICTIONS = {
    "data.corpora.code.share=2": "data.corpora.code.share=2 contradicts the past",
    "data.corpora.wiki.share=2": "data.corpora.wiki.share is not a setting; available: code, books",
    "data.corpora.books.split=[0.8,0.1,0.1]": "data.corpora.books.split=[0.8, 0.1, 0.1] contradicts the past",
    "data.corpora.books.path=corpus.txt": "data.corpora.books.path (with data.corpora.books.val_path, if set) is not",
    "data.corpora={books:{path:books.txt,share:3},code:{path:corpus.txt,share:1}}": "data.corpora=['books', 'code'] co",
    "data.corpora={code:{path:corpus.txt,share:1}}": "data.corpora=['code'] contradicts the past",
    "data.corpora=null": "data.corpora=None contradicts the past",
    "data=stdlib": "data.name=stdlib contradicts the past",
    "trainer.max_epochs=1": "data=mix needs trainer.max_steps, and no max_epochs",
}


@pytest.mark.slow
def test_resume_with_another_mix_is_refused_by_name(train, evaluate, tmp_path):
    assert train(*MIX, "hydra.run.dir=run").code == 0
    for override, message in CONTRADICTIONS.items():
        result = train("resume=run", "trainer.max_steps=8", override)
        assert (result.code, result.err.count("\n")) == (2, 1), result.err
        assert message in result.err
    # Typed as it was, the mix is the same.
    result = train("resume=run", "trainer.max_steps=5", f"data.corpora={CORPORA}")
    assert result.code == 0, result.err
    # Each corpus is evaluated, and all of them together.
    result = evaluate("weights=run", "protocol=windows")
    assert result.code == 0, result.err
    found = [json.loads((tmp_path / "run" / f"eval-{name}-val.json").read_text()) for name in ("code", "books")]
    assert [each["text"]["corpus"] for each in found] == ["corpus.txt", "books.txt"]
    nats = sum(each["protocols"]["windows"]["nats"] for each in found)
    n_bytes = sum(each["protocols"]["windows"]["bytes"] for each in found)
    assert f"all     {nats / n_bytes / 0.6931471805599453:.4f} bits per byte" in result.out
    shutil.copy(tmp_path / "corpus.txt", tmp_path / "copy.txt")
    result = evaluate("weights=run", "protocol=windows", "data.corpora.code.path=copy.txt")
    assert "copy.txt (" in result.out and "warning" not in result.err
    # A missing corpus is found before any is scored.
    result = evaluate("weights=run", "data.corpora.books.path=nosuch.txt")
    assert (result.code, result.out) == (2, "")
    assert "data.corpora.books.path=" in result.err and "nosuch.txt: no such file" in result.err
    result = evaluate("weights=run", "data.corpora.cod.path=copy.txt")
    assert "data.corpora.cod.path is not a setting; did you mean code?" in result.err


def test_text_of_a_path_is_not_rewritten_in_a_message(train, tmp_path):
    (tmp_path / "data.path").write_bytes(b"")
    mix = "data.corpora={a:{path:data.path,share:1}}"
    result = train("data=mix", mix, *SMALL[2:])
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert result.err.startswith(f"rwkv-train: data.corpora.a.path={tmp_path / 'data.path'} is empty: give a file")


BAD = {
    "data.corpora=null": "data.corpora is missing: give each corpus of the mix a name and a share",
    "data.corpora=[a,b]": "data.corpora must be a mapping, got ['a', 'b']",
    "data.corpora={a:corpus.txt}": "data.corpora.a must be a mapping, got 'corpus.txt'",
    "data.corpora={1:{path:corpus.txt,share:1}}": "data.corpora.1: the name of a corpus is a letter, then letters",
    "data.corpora={a:{path:corpus.txt}}": "data.corpora.a.share is missing",
    "data.corpora={a:{path:corpus.txt,share:0}}": "data.corpora.a.share must be at least 1, got 0",
    "data.corpora={a:{path:corpus.txt,share:1.5}}": "data.corpora.a.share must be a whole number, got 1.5",
    "data.corpora={a:{path:corpus.txt,share:2147483648}}": "the sum of the shares must be below 2^31, got 2147483648",
    "data.corpora={a:{share:1}}": "data.corpora.a.path is missing: data.corpora.a.name=text reads your own text",
    "data.corpora={a:{path:nosuch.txt,share:1}}": "nosuch.txt: no such file",
    "data.corpora={a:{pat:corpus.txt,share:1}}": "data.corpora.a.pat is not a setting; did you mean path?",
    "data.corpora={a:{path:corpus.txt,share:1,ctx_len:9}}": "data.corpora.a.ctx_len is not a setting",
    "data.corpora={a:{path:corpus.txt,share:1,split:[1,x,0]}}": "data.corpora.a.split must be a number, got 'x'",
    "data.corpora={a:{path:corpus.txt,share:1,split:[1,0,0]}}": "data.corpora.a.split must be three fractions",
    "data.corpora={a:{name:mix,share:1}}": "data.corpora.a.name must be one of enwik8, stdlib, text, binidx, tokens",
    "data.corpora={a:{name:binidx,path:corpus,share:1}} data.vocab=char": "data.corpora.a.name=binidx takes data.vocab",
    "data.corpora.a.share=2": "data.corpora.a.share is not a setting; available: code, books",
    "data.corpora.code.field=body": "data.corpora.code.field is not a setting: add it to your file, or to data.corpora",
    "data.path=corpus.txt": "data.path is not a setting",
    "trainer.max_steps=-1": "data=mix needs trainer.max_steps",
    "trainer.max_epochs=1": "data=mix needs trainer.max_steps, and no max_epochs",
    "callbacks.best.monitor=val/bits_per_byte/cod": "val/bits_per_byte/code, val/bits_per_byte/books, got",
    "data.ctx_len=50000": "data.corpora.code: the training split has 43,200 tokens",
}


@pytest.mark.parametrize("arguments", BAD)
def test_bad_mix_gives_one_line_exit_2_and_no_folder(train, tmp_path, arguments):
    before = sorted(tmp_path.rglob("*"))
    mix = MIX if not arguments.startswith("data.corpora=") else (MIX[0], *MIX[2:])
    result = train(*mix, *arguments.split())
    assert (result.code, result.err.count("\n")) == (2, 1), result.err
    assert BAD[arguments] in result.err
    assert sorted(tmp_path.rglob("*")) == before


def test_paths_of_corpora_are_taken_as_typed(train, tmp_path):
    for name in ("2025_02_03", "1e5", "bücher.txt"):
        (tmp_path / name).write_bytes(TEXT)
    (tmp_path / "mine" / "data").mkdir(parents=True)
    (tmp_path / "mine" / "data" / "mine.yaml").write_text(
        "defaults: [mix]\ncorpora: {a: {path: 2025_02_03, share: 1}, b: {path: corpus.txt, share: 1}}\n"
    )
    typed = "data.corpora={a:{path:2025_02_03,share:1},b:{path:1e5,share:1},c:{path: bücher.txt,share:1}}"
    result = train("--config-dir", "mine", "data=mine", "data.corpora={c:{path:corpus.txt,share:1}}", *SMALL[2:])
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "data.corpora.c.path is not a setting; available: a, b" in result.err
    result = train("data=mix", typed, *SMALL[2:], "hydra.run.dir=inline")
    assert result.code == 0, result.err
    chosen = ("--config-dir", "mine", "data=mine", "data.corpora.b.path=1e5", "data.corpora.b.share=3")
    result = train(*chosen, *SMALL[2:], "hydra.run.dir=own")
    assert result.code == 0, result.err
    assert "b, 75.0% of the samples, 1e5 (" in result.out


def test_stored_mix_downloads_nothing_untyped(train, tmp_path):
    assert train(*MIX, "hydra.run.dir=run").code == 0
    stored = tmp_path / "run" / ".hydra" / "config.yaml"
    stored.write_text(stored.read_text().replace("path: books.txt", "name: enwik8\n      path: /nosuch"))
    result = train("resume=run", "trainer.max_steps=6")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "no enwik8; to download it, if you trust this run, type data.corpora.books.path=/nosuch" in result.err


def test_sweep_is_refused_if_a_corpus_is_missing(train, tmp_path):
    result = train("-m", *MIX, "data.corpora.code.path=nosuch.txt", "data.corpora.code.share=1,2")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "data.corpora.code.path=nosuch.txt: no such file" in result.err
    assert not (tmp_path / "multirun").exists()
