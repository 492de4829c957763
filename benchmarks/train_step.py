"""A training step at the classic setting, ours and Hugging Face transformers', in the same run.

    python -m benchmarks.train_step [--rounds 3]

Forward, loss, backward and Adam of a 12 x 512 RWKV-4 on 1 x 1,024 bytes, float32. The floor is the step's matrix
products alone, each with its two of the backward pass.
"""

import argparse
import logging
from collections.abc import Callable

import torch
from torch.nn import functional as F

from benchmarks.common import interleaved, report
from rwkv_pl import RWKV4, LitRWKV, RWKV4Config

B, T, VOCAB, LAYERS, CHANNELS = 1, 1024, 256, 12, 512


def our_step(precision: torch.dtype | None = None) -> Callable[[], None]:
    """What LitRWKV and its optimizer do in one step; precision: of an autocast around the forward pass."""
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

    def step() -> None:
        for weight in weights:
            out, into = weight.shape
            inputs[into] @ weight.T
            inputs[out] @ weight
            inputs[out].T @ inputs[into]

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    torch.manual_seed(0)
    calls = {
        "products alone": products(),
        "rwkv_pl": our_step(),
        "rwkv_pl, bf16-mixed": our_step(torch.bfloat16),
        "transformers": transformers_step(),
    }
    for name, call in calls.items():
        if name != "transformers":
            call()
    times = interleaved(calls, rounds)
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
