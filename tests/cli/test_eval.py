"""rwkv-eval on runs and on other weights, and its errors on bad input."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from command import TEXT, make_run
from versions import RUN_SETTINGS, VERSIONS

from rwkv_pl import RWKV4, RWKV4Config, load_weights
from rwkv_pl.data.sources.text import Text
from rwkv_pl.inference import evaluate as protocols
from rwkv_pl.training.curve import read_rows
from rwkv_pl.weights.read import read_weights

WHOLE_VALIDATION = ("trainer.limit_val_batches=1.0", "data.eval_batch_size=64")
CHARACTERS = "naïve café, 5 €: 𝄞 ".encode() * 900


@pytest.fixture(scope="module")
def run(request, tmp_path_factory):
    """An indirect parameter is the version of its model."""
    version = getattr(request, "param", "rwkv4")
    return make_run(tmp_path_factory.mktemp("bytes"), *WHOLE_VALIDATION, *RUN_SETTINGS[version])


@pytest.fixture(scope="module")
def run_on_characters(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("characters"), *WHOLE_VALIDATION, "data.vocab=char", text=CHARACTERS)


@pytest.fixture(autouse=True)
def leave_no_files(run, run_on_characters):
    yield
    for folder in (run, run_on_characters):
        for path in folder.glob("eval-*"):
            path.unlink()


def read_reported_score(folder: Path) -> float:
    """The bits per byte of the last validation during training."""
    rows = read_rows(folder / "metrics.csv", up_to=4)
    return next(row["val/bits_per_byte"] for row in reversed(rows) if "val/bits_per_byte" in row)


@pytest.mark.parametrize("run", VERSIONS, indirect=True)
def test_run_is_evaluated_on_its_own_text_from_another_folder(request, evaluate, run, tmp_path):
    (tmp_path / "corpus.txt").unlink()
    result = evaluate(f"weights={run}")
    assert result.code == 0, result.err
    assert result.err == ""
    report = json.loads((run / "eval-val.json").read_text())
    lo, hi = 0.9 * len(TEXT), 0.95 * len(TEXT)
    n = round(hi) - round(lo)
    assert (report["text"]["bytes"], report["text"]["tokens"], report["text"]["split"]) == (n, n, "val")
    assert report["weights"]["model"] == request.node.callspec.params["run"]
    assert report["weights"]["step"] == 4 and report["weights"]["file"].endswith("best.ckpt")
    found = report["protocols"]
    assert list(found) == ["carried", "windows"]
    for name, settings in (
        ("carried", {"streams": 1, "warmup": 1024, "chunk_len": 1024}),
        ("windows", {"ctx_len": 16, "stride": 16}),
    ):
        figures = found[name]
        assert settings.items() <= figures.items()
        assert (figures["tokens"], figures["bytes"]) == (n, n)
        assert figures["bits_per_byte"] == pytest.approx(figures["nats"] / math.log(2) / n)
        assert figures["perplexity_per_token"] == pytest.approx(math.exp(figures["nats"] / n))
        assert f"{figures['bits_per_byte']:.4f}" in result.out
    # Training adds the nats of one call in float32, which rounds to 6e-8, and reports a float32.
    assert found["windows"]["bits_per_byte"] == pytest.approx(read_reported_score(run), rel=1e-6)
    by_position = found["windows"]["loss_by_position"]
    assert len(by_position) == 16
    assert sum(by_position) / 16 == pytest.approx(found["windows"]["nats_per_token"], rel=0.01)
    assert (run / "eval-val.png").read_bytes().startswith(b"\x89PNG")
    assert str(run / "eval-val.json") in result.out and str(run / "eval-val.png") in result.out
    assert list(tmp_path.iterdir()) == []


def test_bits_per_byte_of_characters_count_the_bytes_of_the_file(evaluate, run_on_characters):
    assert evaluate(f"weights={run_on_characters}").code == 0
    report = json.loads((run_on_characters / "eval-val.json").read_text())
    corpus = (run_on_characters.parent / "corpus.txt").read_bytes()
    text = report["text"]
    assert text["vocabulary"]["kind"] == "char"
    assert abs(text["bytes"] - 0.05 * len(corpus)) < 4 and text["tokens"] < text["bytes"]
    for figures in report["protocols"].values():
        assert figures["bits_per_byte"] == pytest.approx(figures["nats"] / math.log(2) / text["bytes"])
    windows = report["protocols"]["windows"]
    assert windows["bits_per_byte"] == pytest.approx(read_reported_score(run_on_characters), rel=1e-6)

    assert evaluate(f"weights={run_on_characters}", "split=train", "protocol=carried").code == 0
    text = json.loads((run_on_characters / "eval-train.json").read_text())["text"]
    # Byte 0 of the corpus is only the first context, not a target.
    assert text["bytes"] == Text(run_on_characters.parent / "corpus.txt").open().splits.train[1] - 1


def test_given_settings_override_the_settings_of_the_run(evaluate, run, tmp_path):
    (tmp_path / "other.txt").write_bytes(TEXT[:4000])
    result = evaluate(
        f"weights={run}/checkpoints/last.ckpt", "data.path=other.txt", "split=test", "stride=3", "data.ctx_len=9",
        "streams=4", "warmup=5", "chunk_len=7", "out=results/new",
    )  # fmt: skip
    assert result.code == 0, result.err
    assert "other.txt is not the text that the run was trained on" in result.err
    assert not list(run.glob("eval-*"))
    report = json.loads((tmp_path / "results" / "new" / "eval-last-other-test.json").read_text())
    assert (report["text"]["corpus"], report["text"]["bytes"]) == ("other.txt", 200)
    carried, windows = report["protocols"]["carried"], report["protocols"]["windows"]
    assert (carried["streams"], carried["warmup"], carried["chunk_len"]) == (4, 5, 7)
    assert (windows["ctx_len"], windows["stride"], len(windows["loss_by_position"])) == (9, 3, 9)
    # The first window counts in full, the others only with their last three positions; 200 - 9 = 63 * 3 + 2.
    assert windows["tokens_by_position"] == [1] * 6 + [65, 65, 64]
    assert "carried, 4 streams, warmup 5" in result.out
    shown = evaluate("--cfg", "job", f"weights={run}", "stride=3").out
    assert f"path: {run.parent / 'corpus.txt'}" in shown and "stride: 3" in shown and "ctx_len: 16" in shown


def test_evaluation_on_another_text_by_one_protocol(evaluate, run, tmp_path):
    result = evaluate(f"weights={run}", "data=text", "data.path=corpus.txt", "data.ctx_len=1000", "protocol=windows")
    assert (result.code, result.err) == (0, "")
    report = json.loads((run / "eval-corpus-val.json").read_text())
    assert list(report["protocols"]) == ["windows"]
    assert report["protocols"]["windows"]["ctx_len"] == 1000
    assert "5% of the text" in result.out and "precision=32-true" in result.out and "protocol=" in result.out
    assert "to score all of it: data.split=[0,1,0]" in result.out
    result = evaluate(f"weights={run}", "data=text", "data.path=corpus.txt", "data.split=[0,1,0]", "protocol=carried")
    assert (result.code, result.err, "data.split" in result.out) == (0, "", False)
    text = json.loads((run / "eval-corpus-val.json").read_text())["text"]
    assert (text["share"], text["tokens"]) == (1, len(TEXT) - 1)  # token 0 is never a target
    assert evaluate(f"weights={run}", "protocol=carried", "split=test").code == 0
    assert (run / "eval-test.json").exists() and not (run / "eval-test.png").exists()


def test_official_weights_are_evaluated(evaluate, run, tmp_path):
    torch.save(load_weights(run)[0].state_dict(), tmp_path / "mine.pth")
    shutil.copy(run.parent / "corpus.txt", tmp_path)
    settings = ("data=text", "data.path=corpus.txt", "data.ctx_len=16")
    assert evaluate("weights=mine.pth", *settings).code == 0
    report = json.loads((tmp_path / "eval-mine-val.json").read_text())
    assert report["weights"]["step"] is None
    assert report["protocols"]["windows"]["bits_per_byte"] == pytest.approx(read_reported_score(run), rel=1e-6)

    torch.save(RWKV4(RWKV4Config(300, 1, 8)).state_dict(), tmp_path / "other.pth")
    result = evaluate("weights=other.pth", *settings)
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "weights=other.pth has 300 tokens, data.vocab=byte has 256" in result.err


@pytest.mark.parametrize("run", ["rwkv7"], indirect=True)
def test_dropped_parameters_are_reported(evaluate, run, tmp_path):
    weights = read_weights(run)
    torch.save(weights.tensors | weights.unread, tmp_path / "all.pth")
    result = evaluate("weights=all.pth", "data=text", "data.path=corpus.txt", "data.ctx_len=16", "protocol=windows")
    assert result.code == 0, result.err
    dropped = ", ".join(weights.unread)
    assert f"        official .pth, without {dropped}, which nothing reads, rwkv7 2 x 64, " in result.out


@pytest.mark.parametrize("precision, tolerance", [("bf16-mixed", 0.02), ("16-mixed", 0.01)])
def test_half_precision_is_close_to_float32(evaluate, run, precision, tolerance):
    """The tolerances: bfloat16 rounds each matrix product to 4e-3, float16 to 5e-4."""
    assert evaluate(f"weights={run}", f"precision={precision}", "kernel=scan").code == 0
    report = json.loads((run / "eval-val.json").read_text())
    assert report["protocols"]["windows"]["bits_per_byte"] == pytest.approx(read_reported_score(run), rel=tolerance)
    assert report["protocols"]["windows"]["bits_per_byte"] != pytest.approx(read_reported_score(run), rel=1e-7)
    assert (report["precision"], report["kernel"]) == (precision, "scan")


def test_precision_64_true_evaluates_in_float64(evaluate, run):
    assert evaluate(f"weights={run}", "precision=64-true", "protocol=carried").code == 0
    carried = json.loads((run / "eval-val.json").read_text())["protocols"]["carried"]
    text = np.frombuffer(TEXT, np.uint8)
    lo, hi = Text(run.parent / "corpus.txt").open().splits.val
    nats, _ = protocols.evaluate_stream(load_weights(run)[0].double(), text, lo, hi, chunk_len=99)
    # float64 sums in another order; float32 would differ by 1e-7.
    assert carried["nats"] == pytest.approx(nats, rel=1e-12)


def test_diverged_weights_give_one_line_error(evaluate, tmp_path):
    model = RWKV4(RWKV4Config(256, 1, 8))
    with torch.no_grad():
        model.head.weight.fill_(3e38)
    torch.save(model.state_dict(), tmp_path / "large.pth")
    before = sorted(tmp_path.rglob("*"))
    result = evaluate("weights=large.pth", "data=text", "data.path=corpus.txt", "out=new")
    assert (result.code, result.err.count("\n")) == (1, 1)
    assert "rwkv-eval: weights=large.pth: the model's outputs are not finite" in result.err
    assert sorted(tmp_path.rglob("*")) == before


def test_ctrl_c_exits_with_130_and_writes_nothing(evaluate, run, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("rwkv_pl.inference.evaluate.evaluate_stream", interrupted)
    result = evaluate(f"weights={run}")
    assert (result.code, result.err) == (130, "")
    assert not list(run.glob("eval-*"))


def test_text_changed_during_evaluation_is_reported(evaluate, run, tmp_path, monkeypatch):
    carried = protocols.evaluate_stream

    def changed(*args, **kwargs):
        result = carried(*args, **kwargs)
        with (tmp_path / "corpus.txt").open("r+b") as file:  # Windows does not empty or replace a mapped file
            file.write(TEXT[::-1])
        return result

    monkeypatch.setattr(protocols, "evaluate_stream", changed)
    result = evaluate(f"weights={run}", "data.path=corpus.txt")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "corpus.txt changed during the run" in result.err


def test_terminal_shows_a_progress_bar_on_stderr(evaluate, run, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    result = evaluate(f"weights={run}", "chunk_len=100")
    assert "bits/byte" in result.err and "tokens/s" in result.err
    assert "bits/byte" not in result.out


CASES = {
    "RUN": "to evaluate it, write weights=",
    "weights=RUN/../corpus.txt": "is not a run, so the text must be chosen",
    "": "weights is missing",
    "weights=null": "weights is missing",
    "wieghts=x": "did you mean weights?",
    "weights=RUN foo=1": "foo is not a setting",
    "weights=RUN ctx_len=3": "did you mean data.ctx_len?",
    "weights=RUN data.batchsize=3": "did you mean batch_size?",
    "weights=RUN data.url=x": "data.url is not a setting",
    "weights=RUN optim.lr=3": "optim",
    "weights=RUN model=rwkv4": "only data= is a choice",
    "weights=RUN experiment=quickstart": "only data= is a choice",
    "weights=RUN data=nosuch": "data=nosuch does not exist; available: binidx, enwik8, mix, stdlib, text, tokens",
    "weights=RUN split=dev": "split must be one of train, val, test, got 'dev'",
    "weights=RUN protocol=all": "protocol must be one of both, carried, windows",
    "weights=RUN streams=0": "streams must be at least 1",
    "weights=RUN streams=two": "streams must be a whole number, got 'two'",
    "weights=RUN warmup=-1": "warmup must be at least 0",
    "weights=RUN chunk_len=0": "chunk_len must be at least 1",
    "weights=RUN stride=17": "stride must be from 1 to 16, got 17",
    "weights=RUN stride=0": "stride must be from 1 to 16, got 0",
    "weights=RUN data.eval_batch_size=0": "data.eval_batch_size must be at least 1",
    "weights=RUN accelerator=abacus": "accelerator must be one of auto, cpu",
    "weights=RUN precision=8": "precision must be one of",
    "weights=RUN kernel=magic": "kernel must be one of auto, compiled, scan, recurrence",
    "weights=RUN split=val,test": "has several values: give one, or for a list write 'split=[val,test]'",
    "-m weights=RUN split=val,test": "leave out -m",
    "weights=RUN hydra.run.dir=x": "out=FOLDER sets the folder",
    "weights=RUN +foo=1": "cannot add a key",
    "weights=RUN ~data": "cannot remove a key",
    "weights=RUN data.vocab=char": "was trained with data.vocab=byte",
    "weights=RUN data.path=nosuch.txt": "nosuch.txt",
    "weights=RUN data.path=short.txt": "the val split of",
    "weights=RUN out=corpus.txt": "corpus.txt: give another folder with out=FOLDER",
    "weights=nosuch": "there are no weights at nosuch",
    "weights=corpus.txt data=text data.path=corpus.txt": "is not a checkpoint that can be read safely",
    "weights=. data=text data.path=corpus.txt": "is not a run folder",
    "weights=damaged": "damaged",
}


@pytest.mark.parametrize("arguments", CASES)
def test_bad_input_gives_one_line_exit_2_and_no_files(evaluate, run, tmp_path, arguments):
    (tmp_path / "short.txt").write_bytes(b"x")
    shutil.copytree(run, tmp_path / "damaged")
    (tmp_path / "damaged" / ".hydra" / "config.yaml").write_text("[1")
    before = sorted([*tmp_path.rglob("*"), *run.rglob("*")])
    result = evaluate(*arguments.replace("RUN", str(run)).split())
    assert (result.code, result.err.count("\n")) == (2, 1), result.err
    assert result.err.startswith("rwkv-eval: ")
    assert CASES[arguments] in result.err
    assert "Traceback" not in result.err + result.out
    assert sorted([*tmp_path.rglob("*"), *run.rglob("*")]) == before


@pytest.mark.skipif(torch.accelerator.is_available(), reason="needs a machine without a GPU")
def test_missing_gpu_gives_one_line_error(evaluate, run):
    result = evaluate(f"weights={run}", "accelerator=gpu")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert result.err.startswith("rwkv-eval: accelerator=gpu is not available, ")
    assert result.err.endswith(", or use accelerator=cpu\n")


def test_mistakes_and_help_need_no_torch():
    code = (
        "import sys; from rwkv_pl.cli.eval import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'lightning' not in sys.modules"
    )
    for arguments in (["--help"], ["--cfg", "job"], ["weights=x", "streams=0"]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert "streams must be at least 1" in done.stderr
