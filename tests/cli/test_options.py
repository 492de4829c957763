"""Options for speed or memory change nothing else about a run."""

import os
from dataclasses import replace

import pytest
import torch
from command import SMALL
from test_train import load_checkpoint

from rwkv_pl.cli.entry import cli_entry_point
from rwkv_pl.config import Train
from rwkv_pl.ops import backend
from rwkv_pl.runs import device
from rwkv_pl.runs.device import choose_accelerator, choose_matmul_precision

TRAINED = (*SMALL, "optim.lr=1e-2", "model.dropout=0.1", "trainer.accumulate_grad_batches=3")


def load_weights_of(run):
    return list(load_checkpoint(run)["state_dict"].values())


def test_memory_options_do_not_change_training(train, tmp_path):
    assert train(*TRAINED, "hydra.run.dir=whole").code == 0
    assert train(*TRAINED, "activation_checkpointing=true", "trainer.max_steps=2", "hydra.run.dir=parts").code == 0
    result = train("resume=parts", "activation_checkpointing=false", "trainer.max_steps=4")
    assert result.code == 0 and "changed activation_checkpointing = False" in result.out, result.err
    whole = load_weights_of(tmp_path / "whole")
    assert all(torch.equal(*pair) for pair in zip(load_weights_of(tmp_path / "parts"), whole, strict=True))
    assert train(*TRAINED, "loss_chunk_len=7", "hydra.run.dir=chunks").code == 0
    for found, expected in zip(load_weights_of(tmp_path / "chunks"), whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_run_continues_without_compile_if_it_fails(train, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("no compiler\nis here")

    with monkeypatch.context() as then:
        then.setattr(torch, "compile", refuse)
        result = train(*SMALL, "compile=true", "trainer.max_steps=1", "hydra.run.dir=run")
    assert (result.code, result.err) == (0, "")
    for text in (result.out, (tmp_path / "run" / "train.log").read_text()):
        assert text.count("compile off: no compiler is here\n") == 1


@pytest.mark.slow
def test_compiled_run_resumes_to_the_same_bits(train, tmp_path):
    assert train(*TRAINED, "compile=true", "hydra.run.dir=whole").code == 0
    assert train(*TRAINED, "compile=true", "trainer.max_steps=2", "hydra.run.dir=parts").code == 0
    torch._dynamo.reset()  # like in another process
    result = train("resume=parts", "trainer.max_steps=4")
    assert result.code == 0 and "compile 2 blocks, in " in result.out, result.err
    whole, parts = load_checkpoint(tmp_path / "whole")["state_dict"], load_checkpoint(tmp_path / "parts")["state_dict"]
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


def test_tf32_is_used_only_on_a_gpu(monkeypatch):
    set_to = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", set_to.append)
    config = Train(trainer={"precision": "32-true"})
    choose_matmul_precision(config, torch.device("cpu"))
    assert set_to == []
    choose_matmul_precision(config, torch.device("cuda"))
    choose_matmul_precision(replace(config, tf32=False), torch.device("cuda"))
    assert set_to == ["high", "highest"]
    choose_matmul_precision(replace(config, trainer={"precision": "16-mixed"}), torch.device("cuda"))


@pytest.fixture
def bf16_speed(monkeypatch):
    """bf16_speed(2.0): pretend that bfloat16 products run 2 times as fast as float32."""

    def set_speed(speedup: float) -> None:
        rates = {torch.float32: 1.0, torch.bfloat16: speedup}
        monkeypatch.setattr(device, "measure_product_rates", lambda *_: rates)

    return set_speed


@pytest.mark.parametrize(
    ("speedup", "chosen", "words"),
    [
        (2.0, "bf16-mixed", "bf16 products are 2.0 times as fast as in float32 on this CPU (trainer.precision=auto)"),
        (0.05, "32-true", "bf16 products are 20 times slower than in float32 on this CPU (trainer.precision=auto)"),
    ],
)
def test_faster_precision_is_chosen_once_and_kept(train, tmp_path, bf16_speed, speedup, chosen, words):
    bf16_speed(speedup)
    result = train(*SMALL, "trainer.precision=auto", "trainer.max_steps=2", "hydra.run.dir=run")
    assert result.code == 0 and f"precision {chosen}: {words}" in result.out, result.err
    assert load_checkpoint(tmp_path / "run")["rwkv_pl"]["precision"] == chosen
    bf16_speed(1 / speedup)  # another machine
    result = train("resume=run", "trainer.max_steps=4")
    assert result.code == 0 and "auto" not in result.out, result.err
    assert load_checkpoint(tmp_path / "run")["rwkv_pl"]["precision"] == chosen
    assert ("32-true would be faster" in result.out) == (chosen == "bf16-mixed")
    result = train("resume=run", "trainer.max_steps=6", "trainer.precision=64-true")
    assert result.code == 0, result.err
    assert load_checkpoint(tmp_path / "run")["rwkv_pl"]["precision"] == "64-true"


def test_slower_precision_gives_a_warning(train, bf16_speed):
    bf16_speed(0.1)
    result = train(*SMALL, "trainer.precision=bf16-mixed", "trainer.max_steps=1")
    words = (
        "precision bf16-mixed: bf16 products are 10 times slower than in float32 on this CPU; 32-true would be faster"
    )
    assert result.code == 0 and words in result.out
    bf16_speed(0.95)  # as fast, within the error of the measurement
    assert "would be faster" not in train(*SMALL, "trainer.precision=bf16-mixed", "trainer.max_steps=1").out
    bf16_speed(1.5)
    result = train(*SMALL, "trainer.precision=bf16-mixed", "trainer.max_steps=1")
    assert result.code == 0 and "precision " not in result.out


def test_auto_accelerator_is_cuda_or_cpu(monkeypatch):
    """Lightning's auto would choose a Mac's MPS."""
    for there, chosen in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert choose_accelerator("accelerator", "auto") == chosen


@pytest.mark.parametrize("name", ["cuda", "gpu", "mps"])
@pytest.mark.parametrize("is_built", [False, True])
def test_missing_gpu_is_an_error_with_its_fix(train, monkeypatch, name, is_built):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for kind in (torch.backends.cuda, torch.backends.mps):
        monkeypatch.setattr(kind, "is_built", lambda: is_built)
    result = train(*SMALL, f"trainer.accelerator={name}")
    cause = {
        ("mps", False): "this torch is built without MPS: install torch from pytorch.org on a Mac",
        ("mps", True): "torch finds no GPU of a Mac",
        ("cuda", False): "this torch is built without CUDA: install a CUDA build from pytorch.org",
        ("cuda", True): "torch finds no GPU: check nvidia-smi and CUDA_VISIBLE_DEVICES",
    }[name if name == "mps" else "cuda", is_built]
    line = f"rwkv-train: trainer.accelerator={name} is not available, {cause}, or use trainer.accelerator=cpu\n"
    assert (result.code, result.err) == (2, line)


def test_mps_is_used_if_typed(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    for name in ("mps", "gpu"):
        assert choose_accelerator("accelerator", name) == name


@pytest.mark.parametrize("main", ["train", "evaluate"])
def test_unavailable_compiled_kernel_is_an_error_that_names_the_setting(request, run, monkeypatch, main):
    monkeypatch.setitem(backend._failures, ("wkv4", "cpu"), "no C++ compiler; install g++")
    monkeypatch.setattr(backend, "_kernel", "auto")  # so that it is restored
    command = request.getfixturevalue(main)
    name = f"rwkv-{'train' if main == 'train' else 'eval'}"
    arguments = (*SMALL, "hydra.run.dir=other") if main == "train" else (f"weights={run}",)
    result = command(*arguments, "kernel=compiled")
    line = f"{name}: kernel=compiled is not available: no C++ compiler; install g++; or use kernel=auto\n"
    assert (result.code, result.err) == (2, line)


def test_thread_spin_is_short_unless_the_user_sets_it(monkeypatch):
    """The commands set the variable before they import torch, which reads it then."""
    seen = []
    main = cli_entry_point(lambda: seen.append(os.environ.get("GOMP_SPINCOUNT")))
    for variable, value, expected in (("OMP_WAIT_POLICY", "ACTIVE", None), ("GOMP_SPINCOUNT", "7", "7")):
        with monkeypatch.context() as patch:
            patch.delenv("GOMP_SPINCOUNT", raising=False)
            patch.setenv(variable, value)
            main()
        assert seen.pop() == expected
    monkeypatch.setenv("GOMP_SPINCOUNT", "restored later")
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    main()
    assert seen == ["10000"]
