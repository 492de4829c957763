"""RWKV-4 against two references: HF transformers' Rwkv and BlinkDL's `rwkv` package, with the same weights."""

import math
import os

import numpy as np
import pytest
import torch
import versions
from torch.nn import functional as F
from versions import LAYERS, VOCAB, relative_error

from rwkv_pl import RWKV4, RWKV4Config, use_kernel
from rwkv_pl.ops.linear import cast_linear_weights

CHANNELS = versions.CHANNELS["rwkv4"]
HF_NAMES = {
    "emb": "rwkv.embeddings",
    "blocks": "rwkv.blocks",
    "ln_out": "rwkv.ln_out",
    "ln0": "pre_ln",
    "att": "attention",
    "ffn": "feed_forward",
    "time_mix_k": "time_mix_key",
    "time_mix_v": "time_mix_value",
    "time_mix_r": "time_mix_receptance",
}


def perturbed_model(seed: int = 0, **config: float) -> RWKV4:
    return versions.perturbed_model("rwkv4", seed, **config)


def hf_name(name: str) -> str:
    return ".".join(HF_NAMES.get(part, part) for part in name.split("."))


def hf_model(model: RWKV4):
    transformers = pytest.importorskip("transformers")
    config = transformers.RwkvConfig(
        vocab_size=VOCAB,
        context_length=64,
        hidden_size=CHANNELS,
        num_hidden_layers=LAYERS,
        rescale_every=0,
        tie_word_embeddings=False,
    )
    peer = transformers.RwkvForCausalLM(config)
    peer.load_state_dict({hf_name(name): value for name, value in model.state_dict().items()})
    return peer


@pytest.mark.parametrize("kernel", ["auto", "scan", "recurrence"])
def test_logits_and_gradients_equal_transformers(kernel):
    model = perturbed_model()
    peer = hf_model(model)
    tokens = torch.randint(VOCAB, (2, 33))
    with use_kernel(kernel):
        logits, _ = model(tokens[:, :-1])
        F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    peer_logits = peer(tokens[:, :-1], use_cache=False).logits
    F.cross_entropy(peer_logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    # Some hundred float32 operations in a row, each with a rounding error of 6e-8.
    assert relative_error(logits, peer_logits) < 1e-5
    peer_gradients = {name: parameter.grad for name, parameter in peer.named_parameters()}
    for name, parameter in model.named_parameters():
        theirs = peer_gradients.pop(hf_name(name))
        assert theirs.norm() > 1e-7, f"{name}: a zero gradient proves nothing"
        assert relative_error(parameter.grad, theirs) < 1e-5, name
    assert not peer_gradients


def test_saved_weights_run_in_the_rwkv_package(tmp_path):
    os.environ |= {"RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0"}
    package = pytest.importorskip("rwkv.model")
    model = perturbed_model(n_layer=2, n_embd=64).eval()
    torch.save(model.state_dict(), tmp_path / "model.pth")
    peer = package.RWKV(model=str(tmp_path / "model"), strategy="cpu fp32")
    tokens = torch.randint(VOCAB, (1, 20))
    whole, _ = model(tokens)
    theirs, _ = peer.forward(tokens[0].tolist(), None, full_output=True)
    assert relative_error(whole[0], theirs) < 1e-5
    state = peer_state = None
    for piece in (tokens[:, :7], tokens[:, 7:8], tokens[:, 8:]):
        logits, state = model(piece, state)
        theirs, peer_state = peer.forward(piece[0].tolist(), peer_state)
        assert relative_error(logits[0, -1], theirs) < 1e-5


def test_official_parameter_names_and_shapes():
    state = RWKV4(RWKV4Config(vocab_size=7, n_layer=2, n_embd=8)).state_dict()
    layer = {
        "ln1.weight": (8,), "ln1.bias": (8,), "ln2.weight": (8,), "ln2.bias": (8,),
        "att.time_decay": (8,), "att.time_first": (8,),
        "att.time_mix_k": (1, 1, 8), "att.time_mix_v": (1, 1, 8), "att.time_mix_r": (1, 1, 8),
        "att.key.weight": (8, 8), "att.value.weight": (8, 8), "att.receptance.weight": (8, 8),
        "att.output.weight": (8, 8),
        "ffn.time_mix_k": (1, 1, 8), "ffn.time_mix_r": (1, 1, 8),
        "ffn.key.weight": (32, 8), "ffn.receptance.weight": (8, 8), "ffn.value.weight": (8, 32),
    }  # fmt: skip
    expected = {f"blocks.{l}.{name}": shape for l in range(2) for name, shape in layer.items()}
    expected |= {"blocks.0.ln0.weight": (8,), "blocks.0.ln0.bias": (8,), "emb.weight": (7, 8)}
    expected |= {"ln_out.weight": (8,), "ln_out.bias": (8,), "head.weight": (7, 8)}
    assert {name: tuple(value.shape) for name, value in state.items()} == expected


def test_squeezed_time_mix_loads():
    model, other = perturbed_model(0), perturbed_model(1)
    squeezed = {n: v.squeeze() if "time_mix" in n else v for n, v in model.state_dict().items()}
    other.load_state_dict(squeezed)
    for name, value in other.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_official_initialisation():
    L, C, V = 3, 24, 96
    torch.manual_seed(1)
    model = RWKV4(RWKV4Config(vocab_size=V, n_layer=L, n_embd=C))
    i = np.arange(C)
    x = i / C
    for l, block in enumerate(model.blocks):
        r01, r10 = l / (L - 1), 1 - l / L
        expected = {
            "att.time_decay": -5 + 8 * (i / (C - 1)) ** (0.7 + 1.3 * r01),
            "att.time_first": math.log(0.3) + 0.5 * ((i + 1) % 3 - 1),
            "att.time_mix_k": x**r10,
            "att.time_mix_v": x**r10 + 0.3 * r01,
            "att.time_mix_r": x ** (0.5 * r10),
            "ffn.time_mix_k": x**r10,
            "ffn.time_mix_r": x**r10,
        }
        parameters = dict(block.named_parameters())
        for name, value in expected.items():
            np.testing.assert_allclose(parameters[name].detach().flatten(), value, rtol=1e-5, atol=1e-6, err_msg=name)
        for name in ("att.key", "att.receptance", "att.output", "ffn.value", "ffn.receptance"):
            assert not parameters[f"{name}.weight"].any(), name
        assert_orthogonal(parameters["att.value.weight"], gain=1)
        assert_orthogonal(parameters["ffn.key.weight"], gain=2)
    assert_orthogonal(model.head.weight, gain=0.5 * math.sqrt(V / C))
    assert 0.9e-4 < model.emb.weight.abs().max() <= 1e-4


def assert_orthogonal(weight, gain):
    gram = weight.T @ weight if weight.shape[0] >= weight.shape[1] else weight @ weight.T
    torch.testing.assert_close(gram, gain**2 * torch.eye(len(gram)), rtol=0, atol=1e-4)


def test_model_with_one_layer_and_one_channel():
    model = RWKV4(RWKV4Config(vocab_size=3, n_layer=1, n_embd=1))
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert float(model.blocks[0].att.time_decay) == -5
    logits, _ = model(torch.tensor([[0, 1, 2]]))
    assert logits.isfinite().all()


def test_hooks_and_replaced_layers_work_as_in_torch():
    tokens = torch.randint(VOCAB, (2, 9))
    inside = [f"att.{name}" for name in ("key", "value", "receptance", "output")]
    inside += ["ffn.key", "ffn.value", "ffn.receptance", "ln1", "ln2"]
    model = perturbed_model()
    called = []
    for name in inside:
        layer = model.blocks[1].get_submodule(name)
        layer.register_forward_hook(lambda layer, given, output, name=name: called.append(name) or 0.5 * output)
    hooked = model(tokens)[0]
    assert sorted(called) == sorted(inside)
    with use_kernel("scan"):
        torch.testing.assert_close(hooked, model(tokens)[0], rtol=1e-5, atol=1e-5)
    for name in inside:
        model = perturbed_model()
        parent, _, child = name.rpartition(".")
        within = model.blocks[1].get_submodule(parent)
        within.register_module(child, torch.nn.Sequential(getattr(within, child), torch.nn.Hardtanh(-0.1, 0.1)))
        replaced = model(tokens)[0]
        assert relative_error(replaced, perturbed_model()(tokens)[0]) > 1e-3
        with use_kernel("scan"):
            torch.testing.assert_close(replaced, model(tokens)[0], rtol=1e-5, atol=1e-5)


def test_cast_linear_weights_casts_only_matrices():
    model = perturbed_model()
    names = {name for name, x in model.named_parameters() if name.endswith(".weight") and x.dim() == 2}
    identities = [id(x) for x in model.parameters()]
    cast_linear_weights(model, torch.bfloat16)
    halves = {name for name, x in model.named_parameters() if x.dtype == torch.bfloat16}
    assert halves == names - {"emb.weight"} and identities == [id(x) for x in model.parameters()]
