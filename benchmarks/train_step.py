"""A training step at the classic setting, ours and Hugging Face transformers', in the same run.

    python -m benchmarks.train_step [--rounds 3]

Forward, loss, backward and Adam of a 12 x 512 RWKV-4 on 1 x 1,024 bytes, float32. The floor is the step's matrix
products alone, each with its two of the backward pass, as the model makes them. Ours has its memory set up as
rwkv-train does it.
"""

import argparse
import logging
from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional as F

from benchmarks.common import interleaved, report
from rwkv_pl import RWKV4, LitRWKV, RWKV4Config
from rwkv_pl.cli.prepare import keep_freed_memory
from rwkv_pl.ops.linear import linear

B, T, VOCAB, LAYERS, CHANNELS = 1, 1024, 256, 12, 512


def our_step(precision: torch.dtype | None = None) -> Callable[[], None]:
    """What LitRWKV and its optimizer do in one step; precision: of an autocast around the forward pass."""
    keep_freed_memory()
    module = LitRWKV(RWKV4(RWKV4Config(VOCAB, LAYERS, CHANNELS)))
    optimizer = module.configure_optimizers()
    tokens = torch.randint(VOCAB, (B, T + 1))

    def step() -> None:
        with torch.autocast("cpu", precision or torch.bfloat16, enabled=precision is not None):
            loss = module.training_step(tokens, 0)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def transformers_step() -> Callable[[], None]:
    """The same size and text through transformers' RwkvForCausalLM."""
    import transformers

    logging.getLogger("transformers").setLevel(logging.ERROR)
    config = transformers.RwkvConfig(
        vocab_size=VOCAB, context_length=T, hidden_size=CHANNELS, num_hidden_layers=LAYERS, tie_word_embeddings=False
    )
    model = transformers.RwkvForCausalLM(config).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-5, fused=True)
    tokens = torch.randint(VOCAB, (B, T + 1))

    def step() -> None:
        logits = model(tokens[:, :-1], use_cache=False).logits
        F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def products() -> Callable[[], None]:
    """The matrix products of a step and nothing else."""
    shapes = [(CHANNELS, CHANNELS)] * 5 + [(CHANNELS, 4 * CHANNELS), (4 * CHANNELS, CHANNELS)]
    weights = [torch.randn(out, into) for out, into in shapes * LAYERS + [(VOCAB, CHANNELS)]]
    inputs = {width: torch.randn(B * T, width) for width in (VOCAB, CHANNELS, 4 * CHANNELS)}

    @torch.no_grad()
    def step() -> None:
        for weight in weights:
            out, into = weight.shape
            linear(inputs[into], weight)
            linear(inputs[out], weight.T)
            linear(inputs[out].T, inputs[into].T)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    makers: dict[str, Callable[[], Callable[[], None]]] = {
        "products alone": products,
        "rwkv_pl": our_step,
        "rwkv_pl, bf16-mixed": partial(our_step, torch.bfloat16),
        "transformers": transformers_step,
    }
    times = interleaved(makers, rounds)
    ratio = times["transformers"]["median"] / times["rwkv_pl"]["median"]
    report(
        "train_step",
        f"one training step, {LAYERS} x {CHANNELS}, {B} x {T:,} tokens, float32",
        times,
        against="rwkv_pl",
        times_faster_than_transformers=ratio,
    )
    print(f"\n{ratio:.1f} times faster than transformers")


if __name__ == "__main__":
    main()
