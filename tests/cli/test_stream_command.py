"""A run with data.stream=true: its start, its checkpoint, its resume, and what is refused."""

import torch
from command import SMALL, load_checkpoint

STREAM = (*SMALL, "data.stream=true", "trainer.val_check_interval=2")


def refusal(result):
    assert (result.code, result.err.count("\n")) == (2, 1), result.err
    return result.err


def test_run_keeps_the_state_of_its_rows_and_resumes_to_the_same_bits(train, tmp_path):
    result = train(*STREAM, "trainer.max_steps=6", "hydra.run.dir=unbroken")
    assert result.code == 0, result.err
    assert "stream  each of the 6 rows reads on from batch to batch, with its state; gradients reach" in result.out
    assert train(*STREAM, "hydra.run.dir=run").code == 0
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    content = torch.load(last, weights_only=True)
    assert content["rwkv_pl"]["past"]["data.stream"] is True
    shapes = [{name: tuple(tensor.shape) for name, tensor in block.items()} for block in content["stream_state"]]
    assert shapes == [{"att_shift": (6, 16), "wkv": (6, 3, 16), "ffn_shift": (6, 16)}] * 2
    assert "data.stream=False contradicts the past" in refusal(train("resume=run", "data.stream=false"))
    damaged = {key: value for key, value in content.items() if key != "stream_state"}
    for name in ("last.ckpt", "last.prev.ckpt", "best.ckpt"):
        last.with_name(name).unlink(missing_ok=True)
    torch.save(damaged, last)
    assert "last.ckpt does not fit this run (it has no state of the stream)" in refusal(
        train("resume=run", "trainer.max_steps=6")
    )
    torch.save(content, last)
    result = train("resume=run", "trainer.max_steps=6")
    assert result.code == 0, result.err
    found, expected = load_checkpoint(tmp_path / "run"), load_checkpoint(tmp_path / "unbroken")
    assert all(torch.equal(found["state_dict"][name], tensor) for name, tensor in expected["state_dict"].items())
    for here, there in zip(found["stream_state"], expected["stream_state"], strict=True):
        assert all(torch.equal(here[name], tensor) for name, tensor in there.items())


def test_run_older_than_its_settings_has_their_defaults(train, run, tmp_path):
    stored = tmp_path / "run" / ".hydra" / "config.yaml"
    lines = stored.read_text().splitlines()
    newer = ("  stream: false", "checkpoints:", "  sharded: false", "skip_nonfinite: 0", "  num_workers: 0")
    stored.write_text("\n".join(line for line in lines if line not in newer))
    assert len(lines) == len(stored.read_text().splitlines()) + len(newer)
    assert "data.stream=True contradicts the past" in refusal(train("resume=run", "data.stream=true"))
    defaults = ("data.stream=false", "checkpoints.sharded=false", "skip_nonfinite=1", "data.num_workers=0")
    assert train("resume=run", *defaults, "trainer.max_steps=5").code == 0


def test_mix_with_a_stream_is_refused(train, tmp_path):
    mix = ("data=mix", "data.corpora={a:{path:corpus.txt,share:1}}", *SMALL[2:])
    assert "data.stream=true reads one corpus, and data=mix draws each" in refusal(train(*mix, "data.stream=true"))
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.txt"]
