"""rwkv-convert as a command: its files, its messages, and what it does not overwrite."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command import SMALL, Result, call
from systems import CAN_LINK, WINDOWS, needs_links
from test_disk_full import small_disk  # noqa: F401

from rwkv_pl import RWKV4, RWKV4Config, load_weights
from rwkv_pl.cli.convert import main
from rwkv_pl.data.vocabulary import Vocabulary
from rwkv_pl.weights.read import read_weights
from rwkv_pl.weights.tensors import Weights

TRAINED = (*SMALL, "model.n_embd=64", "optim.lr=3e-3", "data.ctx_len=32", "trainer.max_steps=60")


@pytest.fixture
def convert(tmp_path, monkeypatch, capfd):
    """convert(*arguments) -> Result: run the command in `tmp_path`."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Result:
        return call(main, ["rwkv-convert", *arguments], monkeypatch, capfd)

    return run


@pytest.fixture
def official(tmp_path) -> Path:
    """An official file with every parameter changed from its initial value."""
    torch.manual_seed(1)
    model = RWKV4(RWKV4Config(256, 2, 16))
    tensors = {name: value + 0.2 * torch.randn_like(value) for name, value in model.state_dict().items()}
    tensors["ln_out.bias"][0] = 0.0
    torch.save(tensors, tmp_path / "official.pth")
    return tmp_path / "official.pth"


def assert_refused(result: Result, message: str, code: int = 2) -> None:
    assert (result.code, result.err.count("\n")) == (code, 1), result.err
    assert result.err.startswith("rwkv-convert: ")
    assert message in result.err
    assert "Traceback" not in result.err + result.out


def test_trained_model_converts_to_other_formats_and_back(train, convert, tmp_path):
    assert train(*TRAINED, "hydra.run.dir=run").code == 0
    result = convert("run", "folder")
    assert result.code == 0, result.err
    assert str(Path("run", "checkpoints", "best.ckpt")) in result.out
    assert convert("folder", "official.pth").code == 0
    assert convert("official.pth", "back.ckpt").code == 0
    there = torch.load(tmp_path / "run" / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    back = torch.load(tmp_path / "back.ckpt", weights_only=True)["state_dict"]
    assert there.keys() == back.keys()
    assert all(torch.equal(value.view(torch.int32), back[name].view(torch.int32)) for name, value in there.items())

    model, vocabulary = load_weights(tmp_path / "folder")
    assert vocabulary == Vocabulary()
    tokens = torch.tensor([list(b"def test_weights_of_a_run_start_another(train, tmp_path):\n    assert")])
    with torch.no_grad():
        ours = model.eval()(tokens)[0]
        transformers = pytest.importorskip("transformers")
        peer = transformers.RwkvForCausalLM.from_pretrained(tmp_path / "folder").eval()
        theirs = {"transformers": peer(tokens).logits}
    os.environ |= {"RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0"}
    package = pytest.importorskip("rwkv.model")
    peer = package.RWKV(model=str(tmp_path / "official"), strategy="cpu fp32")
    theirs["rwkv"] = peer.forward(tokens[0].tolist(), None, full_output=True)[0][None]
    for name, logits in theirs.items():
        # Some hundred float32 operations in a row, each with a rounding error of 6e-8.
        assert (ours - logits).norm() / logits.norm() < 2e-5, name
    # The model has learned: chance is log 256 = 5.5 nats.
    assert torch.nn.functional.cross_entropy(ours[0, :-1], tokens[0, 1:]) < 4


def test_conversion_reports_rounding_and_format(convert, official, tmp_path):
    result = convert("official.pth", "half", "--dtype", "bfloat16")
    assert result.code == 0, result.err
    summary = "rwkv4 2 x 16, 42 tensors, "
    assert f"read    official.pth\n        official .pth, {summary}" in result.out
    assert "float32, 256 tokens (vocabulary not known)" in result.out
    assert f"        Hugging Face folder, {summary}" in result.out
    assert "checked by reading it back, every tensor bit for bit; digest " in result.out
    values = [value.flatten() for value in torch.load(official, weights_only=True).values()]
    changed = int((torch.cat(values).bfloat16().float() != torch.cat(values)).sum())
    assert f"rounded {changed:,} of {sum(map(len, values)):,} values, 0 of them to 0" in result.out
    # From a half to float32 and back is exact, so no rounding is reported.
    for arguments in (("half", "wide.ckpt", "--dtype", "float32"), ("wide.ckpt", "half.pth", "--dtype", "bfloat16")):
        result = convert(*arguments)
        assert result.code == 0, result.err
        assert "rounded" not in result.out
    half = read_weights(tmp_path / "half")
    assert half.dtype == torch.bfloat16
    for name, value in read_weights(tmp_path / "half.pth").tensors.items():
        assert torch.equal(value.view(torch.int16), half.tensors[name].view(torch.int16))


@pytest.mark.parametrize("run", ["rwkv7"], indirect=True)
def test_run_converts_to_every_format_and_back(convert, run, tmp_path):
    for source, target in (("run", "folder"), ("folder", "official.pth"), ("official.pth", "back.ckpt")):
        result = convert(source, target)
        assert result.code == 0, result.err
    there = read_weights(tmp_path / "run")
    assert read_weights(tmp_path / "back.ckpt").digest == read_weights(tmp_path / "folder").digest == there.digest


@pytest.mark.parametrize("run", ["rwkv7"], indirect=True)
def test_parameters_that_nothing_reads_are_added_and_dropped(convert, run, tmp_path):
    result = convert("run", "all.pth", "--with-block0-v")
    assert result.code == 0, result.err
    names = "blocks.0.att.v0, blocks.0.att.v1, blocks.0.att.v2"
    assert f"official .pth plus zeros for {names}, which nothing reads, rwkv7 " in result.out
    added = torch.load(tmp_path / "all.pth", weights_only=True)
    assert not any(added[f"blocks.0.att.v{i}"].any() for i in range(3))
    result = convert("all.pth", "back.pth")
    assert f"without {names}, which nothing reads" in result.out
    assert len(torch.load(tmp_path / "back.pth", weights_only=True)) == len(added) - 3


@pytest.mark.parametrize("run", ["rwkv7"], indirect=True)
def test_corrupt_added_zeros_are_detected(convert, run, tmp_path, monkeypatch):
    save = torch.save

    def corrupt(content, file):
        save(content | {"blocks.0.att.v2": -content["blocks.0.att.v2"]}, file)  # zeros with another sign

    monkeypatch.setattr("rwkv_pl.weights.write.torch.save", corrupt)
    assert_refused(convert("run", "x.pth", "--with-block0-v"), "blocks.0.att.v2 in ", code=1)
    assert not (tmp_path / "x.pth").exists()


def test_dropped_vocabulary_is_reported(train, convert, tmp_path):
    (tmp_path / "corpus.txt").write_text("Fünf größere Bären äßen Öl. " * 2000, encoding="utf-8")
    assert train(*SMALL, "data.vocab=char", "hydra.run.dir=run").code == 0
    assert "without the vocabulary (char)" in convert("run", "x.pth").out
    for target in ("x.ckpt", "x"):
        assert "without" not in convert("run", target).out
        assert load_weights(tmp_path / target)[1].characters == "Ößäöü"


def test_converted_weights_start_a_run_but_cannot_be_resumed(train, convert, official, tmp_path):
    assert convert("official.pth", "x.ckpt").code == 0
    assert convert("official.pth", "folder").code == 0
    result = train(*SMALL, "weights=folder", "hydra.run.dir=run", "optim.lr=1e-9", "trainer.max_steps=1")
    assert result.code == 0, result.err
    summary = "Hugging Face folder, rwkv4 2 x 16, 42 tensors, 15,264 parameters, float32, 256 tokens"
    summary += " (vocabulary not known)"
    assert summary in (tmp_path / "run" / "train.log").read_text()
    here = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    for name, value in torch.load(official, weights_only=True).items():
        torch.testing.assert_close(here[f"model.{name}"], value, rtol=0, atol=1e-6)
    result = train("resume=x.ckpt")
    assert (result.code, result.err.count("\n")) == (2, 1)
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    for path in last.parent.iterdir():
        path.unlink()
    last.write_bytes((tmp_path / "x.ckpt").read_bytes())
    result = train("resume=run", "trainer.max_steps=3")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert f"{last} has weights, but no optimizer state, so it can't resume: use it as weights=" in result.err


def test_weights_of_another_vocabulary_cannot_start_a_run(train, convert, tmp_path):
    torch.save(RWKV4(RWKV4Config(50277, 2, 16)).state_dict(), tmp_path / "x.pth")
    result = train(*SMALL, "weights=x.pth")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "weights=x.pth has 50,277 tokens, data.vocab=byte has 256" in result.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nosuch", "x"), "nosuch does not exist"),
        (("official.pth", "."), "has no name: give"),
        (("official.pth", ".."), "has no name: give"),
        (("official.pth", "official.pth"), "official.pth exists and"),
        (("official.pth", "full"), "full exists and"),
        pytest.param(("official.pth", "link"), "link exists and", marks=needs_links),
        pytest.param(("official.pth", "link.pth"), "link.pth exists and", marks=needs_links),
        (("official.pth", "empty.ckpt"), "empty.ckpt exists and"),
        (("official.pth", "nosuch/x.pth"), "nosuch is not a folder"),
        (("official.pth", "text/x.pth"), "text is not a folder"),
        (("official.pth", "model.safetensors"), "has the suffix of another format"),
        (("official.pth", "x.PT"), "has the suffix of another format"),
        (("empty", "x.pth"), "is not a run folder with weights"),
        (("text", "x.pth"), "is not a checkpoint that can be read safely"),
        (("hostile.pth", "x"), "is not a checkpoint that can be read safely"),
        (("large.pth", "x", "--dtype", "float16"), "ln_out.bias contains 1e+09, too large for float16"),
        (("nan.pth", "x"), "ln_out.bias holds NaN"),
        (("partial.pth", "x"), "it lacks ln_out.bias"),
        (("official.pth", "x", "--with-block0-v"), "--with-block0-v is for an official file: give NAME.pth, not x"),
        (("official.pth", "x.pth", "--with-block0-v"), "the official files of rwkv4 have no v0, v1 and v2"),
    ],
)
def test_refusal_is_one_line_and_leaves_no_files(convert, official, tmp_path, arguments, message):
    class Hostile:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "owned",))

    whole = torch.load(official, weights_only=True)
    torch.save({"emb.weight": Hostile()}, tmp_path / "hostile.pth")
    torch.save(whole | {"ln_out.bias": torch.full((16,), 1e9)}, tmp_path / "large.pth")
    torch.save(whole | {"ln_out.bias": torch.full((16,), torch.nan)}, tmp_path / "nan.pth")
    torch.save({name: value for name, value in whole.items() if name != "ln_out.bias"}, tmp_path / "partial.pth")
    for name in ("full", "empty", "empty.ckpt"):
        (tmp_path / name).mkdir()
    for name in ("full/file", "text"):
        (tmp_path / name).write_text("text")
    for name in ("link", "link.pth") if CAN_LINK else ():
        (tmp_path / name).symlink_to("nowhere")
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    assert_refused(convert(*arguments), message)
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


def test_file_names_with_special_characters(convert, official, tmp_path):
    for name in ("empty folder", "a,b={c}'" + '"' * (not WINDOWS), "--x", "[bold]null", "größer"):
        (tmp_path / name).mkdir()
        result = convert("--", "official.pth", name)
        assert result.code == 0, result.err
        assert name in result.out
        load_weights(tmp_path / name)
    assert not list(tmp_path.glob("*.partial"))


def test_leftover_of_a_killed_conversion_is_reported_and_kept(convert, official, tmp_path):
    (tmp_path / "x.partial").mkdir()
    (tmp_path / "x.partial" / "config.json").write_text("half")
    (tmp_path / "x.pth.partial").write_text("half")
    for target in ("x", "x.pth"):
        result = convert("official.pth", target)
        assert (result.code, result.err.count("\n")) == (2, 1)
        assert f"{target}.partial exists" in result.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["official.pth", "x.partial", "x.pth.partial"]
    assert (tmp_path / "x.partial" / "config.json").read_text() == "half"


@pytest.mark.parametrize("target", ["x.pth", "x.ckpt", "x"])
def test_corrupting_disk_is_detected(convert, official, tmp_path, monkeypatch, target):
    def flipped(path: Path) -> Weights:
        read = read_weights(path)
        if path != Path("official.pth"):
            read.tensors["ln_out.bias"][0] = -0.0  # one bit that keeps the value equal as a number
        return read

    monkeypatch.setattr("rwkv_pl.weights.write.read_weights", flipped)
    assert_refused(convert("official.pth", target), "ln_out.bias in ", code=1)
    assert list(tmp_path.iterdir()) == [official]


@pytest.mark.parametrize("target", ["x.pth", "x.ckpt", "x"])
def test_full_disk_gives_one_line_error(convert, small_disk, tmp_path, target):  # noqa: F811
    torch.save(RWKV4(RWKV4Config(256, 4, 128)).state_dict(), tmp_path / "larger.pth")
    assert (tmp_path / "larger.pth").stat().st_size > 3e6
    assert_refused(convert("larger.pth", f"{small_disk}/{target}"), f"disk full: {small_disk}/{target}", code=1)
    assert not list(small_disk.iterdir())


@pytest.mark.parametrize(
    ("target", "call"),
    [("x.pth", "os.fsync"), ("x.pth", "pathlib.Path.replace"), ("x", "os.fsync"), ("x", "pathlib.Path.rename")],
)
def test_system_error_gives_one_line(convert, official, tmp_path, monkeypatch, target, call):
    def refuse(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(call, refuse)
    assert_refused(convert("official.pth", target), "Input/output error", code=1)
    assert list(tmp_path.iterdir()) == [official]


def test_help_imports_no_torch():
    code = (
        "import sys\n"
        "from rwkv_pl.cli.convert import main\n"
        "sys.argv = ['rwkv-convert', '--help']\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "sys.exit(3 if 'torch' in sys.modules else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0
    assert "examples:" in result.stdout
