"""RWKV-7 against a plain float64 transcription, the package rwkv7-hf and BlinkDL's `rwkv`, with the same weights."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch.nn import functional as F
from torch.utils.data import DataLoader
from versions import CHANNELS, VOCAB, perturbed_model, relative_error, small_model

from rwkv_pl import RWKV7, LitRWKV, Optim, RWKV7Config, use_kernel
from rwkv_pl.errors import UserError
from rwkv_pl.model import rwkv7 as module
from rwkv_pl.weights.layouts import layout_of

C, N = CHANNELS["rwkv7"], 64


def transcribe(z: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """The official code for one token at a time (RWKV_x070_TMix_one and RWKV_x070_CMix_one in BlinkDL's code), in plain
    torch: the parameters by name, tokens (T,) -> logits (T, V)."""
    L, (H, n) = 1 + max(int(name.split(".")[1]) for name in z if "blocks" in name), z["blocks.0.att.r_k"].shape
    att_before, ffn_before = [torch.zeros_like(z["ln_out.bias"])] * L, [torch.zeros_like(z["ln_out.bias"])] * L
    states = [z["ln_out.bias"].new_zeros(H, n, n)] * L
    logits = []
    for token in tokens:
        x = z["emb.weight"][token]
        x = F.layer_norm(x, x.shape, z["blocks.0.ln0.weight"], z["blocks.0.ln0.bias"])
        for l in range(L):
            p = {name.removeprefix(f"blocks.{l}."): value for name, value in z.items() if f"blocks.{l}." in name}
            y = F.layer_norm(x, x.shape, p["ln1.weight"], p["ln1.bias"])
            mixed = {name: y + (att_before[l] - y) * p[f"att.x_{name}"].flatten() for name in "rwkvag"}
            att_before[l] = y
            r = p["att.receptance.weight"] @ mixed["r"]
            k = p["att.key.weight"] @ mixed["k"]
            v = p["att.value.weight"] @ mixed["v"]
            a = torch.sigmoid(p["att.a0"].flatten() + mixed["a"] @ p["att.a1"] @ p["att.a2"])
            g = torch.sigmoid(mixed["g"] @ p["att.g1"]) @ p["att.g2"]
            w = p["att.w0"].flatten() + torch.tanh(mixed["w"] @ p["att.w1"]) @ p["att.w2"]
            decay = torch.exp(-math.exp(-0.5) * torch.sigmoid(w))
            if l == 0:
                v_first = v
            else:
                gate = torch.sigmoid(p["att.v0"].flatten() + mixed["v"] @ p["att.v1"] @ p["att.v2"])
                v = v + (v_first - v) * gate
            kk = (k * p["att.k_k"].flatten()).view(H, n)
            kk = kk / kk.norm(dim=-1, keepdim=True)
            k = k * (1 + (a - 1) * p["att.k_a"].flatten())
            r, k, v, a, decay = (part.view(H, n) for part in (r, k, v, a, decay))
            removed = torch.einsum("hij,hj->hi", states[l], -kk)
            states[l] = (
                states[l] * decay[:, None]
                + removed[:, :, None] * (kk * a)[:, None]
                + v[:, :, None] * k[:, None]
            )  # fmt: skip
            out = torch.einsum("hij,hj->hi", states[l], r)
            mean, var = out.mean(-1, keepdim=True), out.var(-1, keepdim=True, unbiased=False)
            out = ((out - mean) / torch.sqrt(var + 64e-5)).flatten() * p["att.ln_x.weight"] + p["att.ln_x.bias"]
            out = out + ((r * k * p["att.r_k"]).sum(-1, keepdim=True) * v).flatten()
            x = x + p["att.output.weight"] @ (out * g)
            y = F.layer_norm(x, x.shape, p["ln2.weight"], p["ln2.bias"])
            key = p["ffn.key.weight"] @ (y + (ffn_before[l] - y) * p["ffn.x_k"].flatten())
            ffn_before[l] = y
            x = x + p["ffn.value.weight"] @ torch.relu(key) ** 2
        x = F.layer_norm(x, x.shape, z["ln_out.weight"], z["ln_out.bias"])
        logits.append(z["head.weight"] @ x)
    return torch.stack(logits)


@pytest.mark.parametrize(
    ("kernel", "dtype"),
    [("scan", torch.float64), ("auto", torch.float64), ("auto", torch.float32)],
)
def test_logits_and_gradients_equal_a_transcription_in_float64(kernel, dtype):
    model = perturbed_model("rwkv7")
    tokens = torch.randint(VOCAB, (19,))
    plain = {name: value.detach().double().requires_grad_() for name, value in model.named_parameters()}
    expected = transcribe(plain, tokens[:-1])
    F.cross_entropy(expected, tokens[1:]).backward()
    with use_kernel(kernel):
        logits, _ = model.to(dtype)(tokens[None, :-1])
        F.cross_entropy(logits[0], tokens[1:]).backward()
    # Norms of keys and heads divide by sums with cancellation, so float32's rounding of 6e-8 grows.
    tolerance = 1e-11 if dtype == torch.float64 else 1e-4
    assert relative_error(logits[0], expected) < tolerance
    for name, parameter in model.named_parameters():
        assert plain[name].grad.norm() > 1e-7, f"{name}: a zero gradient proves nothing"
        assert relative_error(parameter.grad, plain[name].grad) < tolerance, name


def test_logits_and_gradients_equal_rwkv7_hf():
    package = pytest.importorskip("rwkv7_hf")
    model, layout = perturbed_model("rwkv7"), layout_of("rwkv7")
    peer = package.RWKV7ForCausalLM(package.RWKV7Config(**layout.config_of(model.config, torch.float32)))
    peer.load_state_dict(layout.from_official(model.state_dict()))
    tokens = torch.randint(VOCAB, (2, 25))
    for each in (lambda x: model(x)[0], lambda x: peer(x, use_cache=False).logits):
        F.cross_entropy(each(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
    with torch.no_grad():
        assert relative_error(model(tokens)[0], peer(tokens, use_cache=False).logits) < 1e-5
    theirs = layout.to_official({name: p.grad for name, p in peer.named_parameters()}, {}, "peer")
    for name, parameter in model.named_parameters():
        assert theirs[name].norm() > 1e-7, f"{name}: a zero gradient proves nothing"
        # Both round in float32, in which a gradient is up to 5e-5 from that in float64.
        assert relative_error(parameter.grad, theirs.pop(name).view_as(parameter)) < 1e-4, name
    assert not theirs


IN_RWKV = """
import os, sys
os.environ |= {"RWKV_V7_ON": "1", "RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0"}
import torch
from rwkv.model import RWKV
tokens = torch.load("tokens").tolist()
for name in sys.argv[1:]:
    model = RWKV(model=name, strategy="cpu fp32")
    whole, _ = model.forward(tokens, None, full_output=True)
    state, parts = None, []
    for piece in (tokens[:7], tokens[7:8], tokens[8:]):
        last, state = model.forward(piece, state)
        parts.append(last)
    torch.save([whole, torch.stack(parts)], name)
"""


@pytest.mark.slow
def test_saved_weights_run_in_the_rwkv_package(tmp_path):
    """In a process, since RWKV_V7_ON replaces the package's class for the other versions."""
    pytest.importorskip("rwkv")
    model = perturbed_model("rwkv7", n_layer=2).eval()
    tokens = torch.randint(VOCAB, (20,))
    unread = {name: torch.zeros(shape) for name, shape in RWKV7.unread(model.config).items()}
    torch.save(model.state_dict(), tmp_path / "read.pth")
    torch.save(model.state_dict() | unread, tmp_path / "all.pth")
    torch.save(tokens, tmp_path / "tokens")
    command = [sys.executable, "-c", IN_RWKV, "read", "all"]
    subprocess.run(command, check=True, cwd=tmp_path, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    with torch.no_grad():
        logits = model(tokens[None])[0][0]
    for name in ("read", "all"):
        whole, parts = torch.load(tmp_path / name)
        assert relative_error(logits, whole) < 1e-5
        assert relative_error(logits[[6, 7, 19]], parts) < 1e-5


def test_official_parameter_names_and_shapes():
    state = small_model("rwkv7", vocab_size=7, n_layer=2).state_dict()
    layer = {
        "ln1.weight": (C,), "ln1.bias": (C,), "ln2.weight": (C,), "ln2.bias": (C,),
        **{f"att.x_{name}": (1, 1, C) for name in "rwkvag"},
        **{f"att.{name}": (1, 1, C) for name in ("w0", "a0", "v0", "k_k", "k_a")},
        **{f"att.{name}1": (C, 64 if name == "g" else 32) for name in "wavg"},
        **{f"att.{name}2": (64 if name == "g" else 32, C) for name in "wavg"},
        **{f"att.{name}.weight": (C, C) for name in ("receptance", "key", "value", "output")},
        "att.r_k": (C // N, N), "att.ln_x.weight": (C,), "att.ln_x.bias": (C,),
        "ffn.x_k": (1, 1, C), "ffn.key.weight": (4 * C, C), "ffn.value.weight": (C, 4 * C),
    }  # fmt: skip
    expected = {f"blocks.{l}.{name}": shape for l in range(2) for name, shape in layer.items()}
    expected = {
        name: shape for name, shape in expected.items() if not name.startswith("blocks.0.att.v") or "val" in name
    }
    expected |= {"blocks.0.ln0.weight": (C,), "blocks.0.ln0.bias": (C,), "emb.weight": (7, C)}
    expected |= {"ln_out.weight": (C,), "ln_out.bias": (C,), "head.weight": (7, C)}
    assert {name: tuple(value.shape) for name, value in state.items()} == expected


@pytest.mark.parametrize(
    ("n_embd", "ranks"),
    [(64, (32, 32, 32, 32)), (512, (64, 64, 32, 128)), (1024, (64, 64, 64, 160)), (2048, (128, 128, 64, 224))],
)
def test_official_ranks(n_embd, ranks):
    config = RWKV7Config(vocab_size=256, n_layer=12, n_embd=n_embd)
    assert (config.rank_w, config.rank_a, config.rank_v, config.rank_g) == ranks


def test_official_number_of_parameters():
    with torch.device("meta"):
        model = RWKV7(RWKV7Config(vocab_size=256, n_layer=12, n_embd=512))
    assert len(model.state_dict()) == 399
    assert sum(parameter.numel() for parameter in model.parameters()) == 41_635_328


def test_width_that_is_not_a_multiple_of_the_head_is_refused():
    with pytest.raises(UserError, match=r"n_embd must be a multiple of 64 in an rwkv7 model.*, got 100$"):
        RWKV7Config(vocab_size=256, n_layer=2, n_embd=100)


def test_official_initialisation():
    L = 3
    model = small_model("rwkv7", n_layer=L)
    i = np.arange(C)
    x, line, zigzag = i / C, i / (C - 1) - 0.5, (i % N - 31.5) / 31.5
    zigzag = zigzag * np.abs(zigzag)
    for l, block in enumerate(model.blocks):
        r01, r10 = l / (L - 1), 1 - l / L
        powers = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}
        expected = {f"att.x_{name}": 1 - x ** (power * r10) for name, power in powers.items()}
        expected |= {
            "att.w0": -6 + 6 * (i / (C - 1)) ** (1 + r01**0.3) + 0.5 + zigzag * 2.5,
            "att.a0": -0.19 + zigzag * 0.3 + line * 0.4,
            "att.v0": 0.73 - line * 0.4,
            "att.k_k": 0.71 - line * 0.1,
            "att.k_a": 1.02 + 0 * i,
            "att.r_k": -0.04 + 0 * i,
            "att.ln_x.weight": ((1 + l) / L) ** 0.7 + 0 * i,
            "att.ln_x.bias": 0.0 * i,
            "ffn.x_k": 1 - x ** (r10**4),
        }
        parameters = dict(block.named_parameters())
        for name, value in expected.items():
            if l or name != "att.v0":
                found = parameters[name].detach().flatten()
                np.testing.assert_allclose(found, value, rtol=1e-5, atol=1e-5, err_msg=name)
        zeros = {"att.w1", "att.a1", "att.g1", "att.output.weight", "ffn.value.weight"} | ({"att.v1"} if l else set())
        for name in zeros:
            assert not parameters[name].any(), name
        gains = {"att.w2": 0.1, "att.a2": 0.1, "att.g2": 0.1, "att.receptance.weight": 1, "att.key.weight": 0.1}
        gains |= {"att.value.weight": 1, "ffn.key.weight": 1} | ({"att.v2": 0.1} if l else {})
        for name, gain in gains.items():
            assert_orthogonal(parameters[name].detach(), gain, name)
        norms = {f"ln{n}.{part}" for n in ((1, 2) if l else (0, 1, 2)) for part in ("weight", "bias")}
        for name in norms:
            assert (parameters[name] == name.endswith("weight")).all(), name
        assert set(parameters) == (expected.keys() - (set() if l else {"att.v0"})) | zeros | set(gains) | norms
    assert (model.ln_out.weight == 1).all() and not model.ln_out.bias.any()
    assert model.emb.weight.abs().max() <= 1e-4
    # The standard deviation of a uniform distribution is its bound divided by the root of 3; 6,400 numbers.
    assert model.emb.weight.std().item() == pytest.approx(1e-4 / 3**0.5, rel=0.03)
    assert_orthogonal(model.head.weight.detach(), 0.5, "head.weight")
    wide = small_model("rwkv7", n_layer=1, vocab_size=2 * C).head.weight.detach()
    assert_orthogonal(wide, 0.5 * 2**0.5, "head.weight")


def assert_orthogonal(weight, gain, name):
    gram = weight @ weight.T if weight.shape[0] < weight.shape[1] else weight.T @ weight
    torch.testing.assert_close(gram, gain**2 * torch.eye(len(gram)), rtol=0, atol=1e-4, msg=name)


def official_groups(parameters: dict[str, torch.Tensor]) -> dict[str, tuple[float, float]]:
    """configure_optimizers of the official trainer: factor of the learning rate and weight decay by name."""
    groups = {}
    for name, parameter in parameters.items():
        if "att.w0" in name:
            groups[name] = (2.0, 0.0)
        elif parameter.squeeze().dim() >= 2 and ".weight" in name:
            groups[name] = (1.0, 0.001)
        else:
            groups[name] = (1.0, 0.0)
    return groups


def official_gradients(parameters: dict[str, torch.Tensor], tokens: torch.Tensor) -> tuple[torch.Tensor, list]:
    """tokens (B, T+1) -> cross-entropy, gradients with L2Wrap, which adds 1e-4 / (B T) of the largest logit to its own
    gradient, clipped as DeepSpeed does it."""
    logits = torch.stack([transcribe(parameters, row) for row in tokens[:, :-1]])
    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    (of_logits,) = torch.autograd.grad(loss, logits, retain_graph=True)
    largest, places = logits.detach().max(-1, keepdim=True)
    of_logits = of_logits.scatter_add(-1, places, largest * 1e-4 / tokens[:, 1:].numel())
    gradients = torch.autograd.grad(logits, list(parameters.values()), of_logits)
    norm = torch.sqrt(sum(gradient.square().sum() for gradient in gradients))
    return loss, [gradient / max(1.0, float(norm) + 1e-6) for gradient in gradients]


def test_training_steps_equal_those_of_the_official_trainer():
    """Loss, gradients, clipping, parameter groups and AdamW, with the numbers of the official command."""
    rate, betas, eps = 6e-4, (0.9, 0.99), 1e-18
    model = small_model("rwkv7", n_layer=2).double()
    theirs = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    groups = official_groups(theirs)
    start = {name: p.detach().clone() for name, p in theirs.items()}
    moments = {name: [torch.zeros_like(p), torch.zeros_like(p)] for name, p in theirs.items()}
    module = LitRWKV(model, Optim(lr=rate, betas=list(betas), eps=eps, weight_decay=0.001))
    batches = torch.randint(VOCAB, (4, 2, 12))
    recorded = []

    class Record(Callback):
        def on_train_batch_end(self, trainer, module, outputs, *_):
            recorded.append((outputs["nats"], {name: p.detach().clone() for name, p in model.named_parameters()}))

    trainer = Trainer(
        max_steps=len(batches), precision="64-true", gradient_clip_val=1.0, accelerator="cpu", logger=False,
        callbacks=[Record()], enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(batches, batch_size=None))
    for step, (tokens, (nats, ours)) in enumerate(zip(batches, recorded, strict=True), 1):
        loss, gradients = official_gradients(theirs, tokens)
        assert float(nats) == pytest.approx(float(loss.detach()), rel=1e-12)
        for (name, parameter), gradient in zip(theirs.items(), gradients, strict=True):
            factor, decay = groups[name]
            m, v = moments[name]
            m.lerp_(gradient, 1 - betas[0])
            v.lerp_(gradient.square(), 1 - betas[1])
            update = m / (1 - betas[0] ** step) / ((v / (1 - betas[1] ** step)).sqrt() + eps)
            parameter.data -= rate * factor * (update + decay * parameter.data)
            difference, change = (float((parameter - x).detach().norm()) for x in (ours[name], start[name]))
            # Adam divides tiny gradients by their own size, so their rounding of 1e-16 grows.
            assert difference <= 1e-9 * change, (step, name, difference, change)
    assert all((parameter != start[name]).any() for name, parameter in theirs.items())


def test_decay_is_not_rounded_under_autocast(monkeypatch):
    """In bfloat16 the raw decay has three digits, and a state lasts a thousand steps."""
    model, dtypes = perturbed_model("rwkv7"), []
    wkv7 = module.wkv7
    monkeypatch.setattr(
        module, "wkv7", lambda r, w, k, *rest: dtypes.append((w.dtype, k.dtype)) or wkv7(r, w, k, *rest)
    )
    monkeypatch.setattr(module.Block, "supports_fused", lambda *arguments: False)  # for the call of wkv7 below
    with torch.autocast("cpu", torch.bfloat16):
        rounded, _ = model(torch.arange(8)[None])
    assert set(dtypes) == {(torch.float32, torch.bfloat16)}
    assert relative_error(rounded, model(torch.arange(8)[None])[0]) < 0.03


def test_other_sizes_of_heads_ranks_and_channel_mixing():
    model = perturbed_model(
        "rwkv7", n_layer=2, n_embd=32, head_size=16, n_ffn=112, rank_w=8, rank_a=8, rank_v=4, rank_g=8
    )
    tokens = torch.randint(VOCAB, (9,))
    expected = transcribe({name: value.double() for name, value in model.state_dict().items()}, tokens)
    assert relative_error(model(tokens[None])[0][0], expected) < 1e-5


def test_sizes_are_read_from_the_tensors():
    sizes = {"n_layer": 2, "n_embd": 128, "n_ffn": 112, "rank_w": 8, "rank_a": 16, "rank_v": 4, "rank_g": 24}
    model = small_model("rwkv7", **sizes)
    assert RWKV7.sizes(model.state_dict()) | {"dropout": 0.0} == vars(model.config)


def test_other_heads_are_not_official():
    """No run could start from a file with 2 heads of 50: n_embd=100 is not a multiple of 64."""
    model = small_model("rwkv7", n_embd=100, head_size=50)
    with pytest.raises(ValueError, match="it has heads of 50 channels; only heads of 64 are supported"):
        RWKV7.check_official(RWKV7.sizes(model.state_dict()))


def test_arithmetic_counts_matrices_and_the_state():
    L = 12
    with torch.device("meta"):
        model = RWKV7(RWKV7Config(vocab_size=256, n_layer=L, n_embd=512))
    low_rank = 2 * 512 * (L * (64 + 64 + 128) + (L - 1) * 32)
    matrices = L * (4 + 8) * 512**2 + low_rank + 256 * 512
    assert model.flops_per_token == 6 * matrices + L * (512 // N) * 33 * N**2
