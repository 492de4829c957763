"""What makes a run faster or smaller changes nothing else about it."""

from dataclasses import replace

import pytest
import torch
from command import SMALL
from test_train import checkpoint

from rwkv_pl.cli.prepare import choose_precision
from rwkv_pl.config import Train

TRAINED = (*SMALL, "optim.lr=1e-2", "model.dropout=0.1", "trainer.accumulate_grad_batches=3")


def weights(run):
    return list(checkpoint(run)["state_dict"].values())


def test_less_memory_is_the_same_training(train, tmp_path):
    assert train(*TRAINED, "hydra.run.dir=whole").code == 0
    assert train(*TRAINED, "activation_checkpointing=true", "trainer.max_steps=2", "hydra.run.dir=parts").code == 0
    result = train("resume=parts", "activation_checkpointing=false", "trainer.max_steps=4")
    assert result.code == 0 and "changed activation_checkpointing = False" in result.out, result.err
    whole = weights(tmp_path / "whole")
    assert all(torch.equal(*pair) for pair in zip(weights(tmp_path / "parts"), whole, strict=True))
    assert train(*TRAINED, "loss_chunk_len=7", "hydra.run.dir=chunks").code == 0
    for found, expected in zip(weights(tmp_path / "chunks"), whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_a_run_that_cannot_be_compiled_goes_on(train, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("no compiler\nis here")

    with monkeypatch.context() as then:
        then.setattr(torch, "compile", refuse)
        result = train(*SMALL, "compile=true", "trainer.max_steps=1", "hydra.run.dir=run")
    assert (result.code, result.err) == (0, "")
    for told in (result.out, (tmp_path / "run" / "train.log").read_text()):
        assert told.count("compile off: no compiler is here\n") == 1


@pytest.mark.slow
def test_a_compiled_run_resumes_in_the_same_bits(train, tmp_path):
    assert train(*TRAINED, "compile=true", "hydra.run.dir=whole").code == 0
    assert train(*TRAINED, "compile=true", "trainer.max_steps=2", "hydra.run.dir=parts").code == 0
    torch._dynamo.reset()  # as in another process
    result = train("resume=parts", "trainer.max_steps=4")
    assert result.code == 0 and "compile 2 blocks, in " in result.out, result.err
    whole, parts = checkpoint(tmp_path / "whole")["state_dict"], checkpoint(tmp_path / "parts")["state_dict"]
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


def test_tensor_cores_serve_float32_on_a_gpu_alone(monkeypatch):
    set_to = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", set_to.append)
    config = Train(trainer={"precision": "32-true"})
    choose_precision(config, torch.device("cpu"))
    assert set_to == []
    choose_precision(config, torch.device("cuda"))
    choose_precision(replace(config, tf32=False), torch.device("cuda"))
    assert set_to == ["high", "highest"]
    choose_precision(replace(config, trainer={"precision": "16-mixed"}), torch.device("cuda"))
