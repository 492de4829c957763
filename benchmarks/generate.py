"""Tokens per second at the classic size: rwkv_pl, BlinkDL's `rwkv` package and Hugging Face transformers, in turns.

    python -m benchmarks generate [--rounds 15]

RWKV-4 and RWKV-7 of 12 x 512 over bytes on the CPU, greedy decoding. The lower bound on the time per token is one read
of all matrix weights: a vectorised sum over them on the same threads, compiled here. Writes
benchmarks/results/generate.json.
"""

import importlib.resources
import logging
import os
import tempfile
from functools import partial
from itertools import islice
from pathlib import Path

import torch

from benchmarks.common import (
    Call,
    Maker,
    begin_benchmark,
    make_parser,
    print_table,
    save_results,
    summarize,
    summary_cells,
    take_turns,
)
from rwkv_pl.inference.generate import Generation, read_tokens
from rwkv_pl.inference.sampling import RowRandom, Sampling
from rwkv_pl.model import MODELS
from rwkv_pl.model.language_model import LanguageModel
from rwkv_pl.ops.build import STABLE_ABI, cpu_flags, cpu_level
from rwkv_pl.ops.huge_pages import move_to_huge_pages
from rwkv_pl.ops.linear import cast_linear_weights

VOCAB, LAYERS, CHANNELS = 256, 12, 512
# By version, what follows the name of a row.
SUFFIXES = {"rwkv4": "", "rwkv7": ", RWKV-7"}
# Tokens per call.
TOKENS = 20


def random_model(layers: int = LAYERS, channels: int = CHANNELS, version: str = "rwkv4") -> LanguageModel:
    """At the official initialisation most matrices are zeros."""
    torch.manual_seed(0)
    model_class, config_class = MODELS[version]
    model = model_class(config_class(VOCAB, layers, channels)).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model


def make_ours(version: str, weights: torch.dtype = torch.float32, batch: int = 1, place: int = 10) -> Call:
    """Start from the state after `place` tokens."""
    return make_writer(random_model(version=version), weights, batch, place)


def make_writer(model: LanguageModel, weights: torch.dtype, batch: int = 1, place: int = 10) -> Call:
    """Generate TOKENS tokens like rwkv-generate, on the model's device."""
    cast_linear_weights(model, weights)
    move_to_huge_pages(model)
    text = torch.randint(VOCAB, (batch, place), device=model.emb.weight.device)
    logits, state = read_tokens(model, text)

    def call() -> None:
        generation = Generation(model, logits, state, Sampling(temperature=0), RowRandom(0, batch), list(text))
        for _ in islice(generation, TOKENS + 1):  # the first needs no step
            pass

    return call


def make_rwkv_package() -> Call:
    os.environ |= {"RWKV_JIT_ON": "1", "RWKV_CUDA_ON": "0"}
    from rwkv.model import RWKV

    with tempfile.TemporaryDirectory() as folder:
        torch.save(random_model().state_dict(), Path(folder, "model.pth"))
        peer = RWKV(model=str(Path(folder, "model")), strategy="cpu fp32", verbose=False)

    def call() -> None:
        token, state = 0, None
        for _ in range(TOKENS):
            logits, state = peer.forward([token], state)
            token = int(logits.argmax())

    return call


def make_transformers() -> Call:
    import transformers

    logging.getLogger("transformers").setLevel(logging.ERROR)
    config = transformers.RwkvConfig(
        vocab_size=VOCAB, context_length=1024, hidden_size=CHANNELS, num_hidden_layers=LAYERS, tie_word_embeddings=False
    )
    model = transformers.RwkvForCausalLM(config).eval()
    prompt = torch.zeros(1, 1, dtype=torch.int64)

    @torch.inference_mode()
    def call() -> None:
        model.generate(prompt, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, pad_token_id=0)

    return call


def make_reader(version: str) -> Call:
    from torch.utils import cpp_extension

    model = random_model(version=version)
    move_to_huge_pages(model)
    weights = [x.detach() for name, x in model.named_parameters() if x.dim() == 2 and name != "emb.weight"]
    with importlib.resources.as_file(importlib.resources.files("rwkv_pl.cuda")) as headers:
        cpp_extension.load(
            "read_weights",
            [str(Path(__file__).parent / "read_weights.cpp")],
            extra_cflags=[*cpu_flags(cpu_level()), STABLE_ABI],
            extra_include_paths=[str(headers)],
            is_python_module=False,
        )

    def call() -> None:
        for _ in range(TOKENS):
            torch.ops.rwkv_pl_benchmarks.read_weights(weights)

    return call


def main() -> None:
    rounds = (options := make_parser("generate", __doc__, rounds=15).parse_args()).rounds
    title = f"tokens per second, {LAYERS} x {CHANNELS}, {VOCAB} tokens"
    begin_benchmark(title, options.threads)
    half = torch.bfloat16
    makers: dict[str, Maker] = {}
    for version, suffix in SUFFIXES.items():
        ours = partial(make_ours, version)
        makers |= {
            f"reading the weights{suffix}": partial(make_reader, version),
            f"rwkv_pl{suffix}": ours,
            f"rwkv_pl{suffix}, batch 8": partial(ours, batch=8),
            f"rwkv_pl{suffix}, bfloat16": partial(ours, half),
            f"rwkv_pl{suffix}, bfloat16, batch 8": partial(ours, half, batch=8),
        }
    makers |= {
        "rwkv_pl, token 10,000": partial(make_ours, "rwkv4", place=10_000),
        "rwkv package, cpu fp32": make_rwkv_package,
        "transformers, generate": make_transformers,
    }
    rows = {}
    for name, taken in take_turns(makers, rounds).items():
        tokens = TOKENS * (8 if name.endswith("batch 8") else 1)
        rows[name] = summarize([tokens / seconds for seconds in taken])
    compared = {
        "times the rwkv package": ("rwkv_pl", "rwkv package, cpu fp32"),
        "token 10,000, times token 10": ("rwkv_pl, token 10,000", "rwkv_pl"),
    }
    for suffix in SUFFIXES.values():
        name = f"rwkv_pl{suffix}"
        compared |= {
            f"reading the weights, times ours{suffix}": (f"reading the weights{suffix}", name),
            f"bfloat16, times float32{suffix}": (f"{name}, bfloat16", name),
            f"batch 8, times batch 1{suffix}": (f"{name}, batch 8", name),
            f"batch 8, times batch 1, bfloat16{suffix}": (f"{name}, bfloat16, batch 8", f"{name}, bfloat16"),
        }
    ratios = {
        about: rows[one]["median"] / rows[other]["median"]
        for about, (one, other) in compared.items()
        if one in rows and other in rows
    }
    print_table(["", "tokens/s", "quartiles"], [[name, *summary_cells(row, 1, 1)] for name, row in rows.items()])
    print_table(["", "times"], [[about, f"{ratio:.2f}"] for about, ratio in ratios.items()])
    save_results(options.results, "generate", title, rounds=rounds, tokens_per_second=rows, ratios=ratios)


if __name__ == "__main__":
    main()
