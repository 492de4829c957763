"""Blocks compiled in place keep their names and results, and a failed compilation is never an error."""

import copy
import functools
import logging

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision, Precision
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.utils import counters
from versions import VERSIONS, small_model

from rwkv_pl.training.compile import compile_blocks
from rwkv_pl.training.module import LitRWKV

original_compile = torch.compile


@pytest.fixture(params=VERSIONS)
def module(request):
    return LitRWKV(small_model(request.param, vocab_size=9, n_layer=2, n_embd={"rwkv4": 8, "rwkv7": 64}[request.param]))


def compute_loss_and_gradients(module):
    loss, *_ = module.loss(torch.arange(8).view(2, 4), torch.ones(2, 4, dtype=torch.int64))
    loss.backward()
    gradients = [parameter.grad for parameter in module.parameters()]
    module.zero_grad(set_to_none=True)
    return [loss.detach(), *gradients]


def test_training_needs_two_graphs(module, monkeypatch):
    """Traced as usual, but executed by torch itself: the compiler alone takes most of a minute."""
    monkeypatch.setattr(torch, "compile", functools.partial(original_compile, backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    names, expected = list(module.state_dict()), compute_loss_and_gradients(module)
    model, tokens = copy.deepcopy(module.model), torch.arange(8).view(2, 4)
    assert compile_blocks(module, 2, 4, Precision()).startswith("compile 2 blocks, in ")
    assert list(module.state_dict()) == names
    assert all(parameter.grad is None for parameter in module.parameters())
    # The first block has one more norm.
    assert (counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())) == (2, 0)
    module.model.activation_checkpointing = True
    for found, wanted in zip(compute_loss_and_gradients(module), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    # A call with a state is generation, and a copied model is not compiled.
    with torch.no_grad():
        _, state = module.model.hidden(tokens[:, :1])
        torch.testing.assert_close(module.model(tokens, state)[0], model(tokens, state)[0])
    copy.deepcopy(module).model(tokens[:, :3])
    assert counters["stats"]["unique_graphs"] == 2
    # Validation is compiled separately.
    module.eval()
    with torch.no_grad():
        torch.testing.assert_close(module.model(tokens)[0], model(tokens)[0])
    assert (counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())) == (4, 0)


@pytest.mark.parametrize("error", [RuntimeError("no compiler\nis here"), TorchDynamoException("no compiler\nis here")])
@pytest.mark.parametrize("when", ["at once", "called"])
def test_failed_first_compilation_falls_back_to_eager(module, monkeypatch, error, when):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(torch, "compile", refuse if when == "at once" else lambda *_, **__: refuse)
    expected = compute_loss_and_gradients(module)
    assert compile_blocks(module, 2, 4, MixedPrecision("bf16-mixed", "cpu")) == "compile off: no compiler is here"
    assert all(torch.equal(*pair) for pair in zip(compute_loss_and_gradients(module), expected, strict=True))


ADVICE = "\n\nSet TORCHDYNAMO_VERBOSE=1 for the internal stack trace\n"
OF_GCC = f"CppCompileError: C++ compile error\n\nCommand:\ng++ {'-O3 ' * 99}\n\nOutput:\n"


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (
            f"InvalidCxxCompiler: No working C++ compiler found{ADVICE}",
            "InvalidCxxCompiler: No working C++ compiler found",
        ),
        (
            f"{OF_GCC}a.h: In file\na.cpp:3:1: fatal error: no a.h\n  3 |\na.cpp:9: error: b{ADVICE}",
            "a.cpp:3:1: fatal error: no a.h",
        ),
        ("", "RuntimeError"),
    ],
    ids=["no compiler", "a compiler's error", "no word"],
)
def test_compile_failure_gives_a_short_one_line_reason(module, monkeypatch, message, reason):
    def refuse(*_, **__):
        raise RuntimeError(message)

    monkeypatch.setattr(torch, "compile", refuse)
    assert compile_blocks(module, 2, 4, Precision()) == f"compile off: {reason}"


def test_failed_later_compilation_falls_back_to_eager(module, monkeypatch, caplog):
    def compiled(call, **_):
        def refuse(*block_input):
            if not module.training:
                raise TorchDynamoException("no compiler\nis here")
            return call(*block_input)

        return refuse

    monkeypatch.setattr(torch, "compile", compiled)
    expected = compute_loss_and_gradients(module)
    assert compile_blocks(module, 2, 4, Precision()).startswith("compile 2 blocks, in ")
    module.eval()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            found = compute_loss_and_gradients(module)
    assert [record.message for record in caplog.records] == ["compile off: no compiler is here"]
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_out_of_memory_is_not_a_compile_error(module, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda call, **_: call)

    def refuse(*_):
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(module, "loss", refuse)
    assert compile_blocks(module, 2, 4, Precision()).startswith("compile 2 blocks, in ")
    assert module.model.blocks[0]._compiled_call_impl
