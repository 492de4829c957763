"""A race: bits per byte of held-out text over seconds of training on the same cores.

    python -m benchmarks race [--seconds 100] [--rounds 20] [--data FILE]
    python -m benchmarks race --rates 1e-3 3e-3 1e-2 --rounds 2     which learning rate suits each

rwkv_pl, transformers' Rwkv and a GPT of torch's own layers train from scratch on the same batches, in float32, with
Adam and clipped gradients, in turns of some seconds; validations do not count. All are 6 x 256, 5 million parameters.
The learning rate rises over the first twentieth of the time, then stays constant. gzip and xz compress the whole
validation split; the models are scored on windows spread evenly over it. Writes race.json, and draws docs/race.png.
"""

import gzip
import lzma
import math
import time
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.common import (
    RESULTS,
    Contestant,
    ContestantError,
    begin_benchmark,
    make_parser,
    positive_float,
    print_table,
    save_results,
)
from benchmarks.plot import DOCS, draw_race
from benchmarks.train_step import VOCAB, Setting, make_our_module, make_transformers_model
from rwkv_pl.data.datamodule import DataModule, EvalBatches
from rwkv_pl.data.sources.stdlib import Stdlib
from rwkv_pl.data.sources.text import Text
from rwkv_pl.errors import UserError
from rwkv_pl.inference.evaluate import bits_per_byte
from rwkv_pl.ops.heap import tune_allocator

SIZE = Setting(n_layer=6, n_embd=256, rows=4, steps=512)
TINY = Setting(n_layer=2, n_embd=32, rows=2, steps=32)

# The best of 1e-3, 3e-3 and 1e-2 after 25 seconds, by `--rates`: rwkv_pl 3.04, 2.92 and 3.46 bits per byte,
# transformers' 4.18, 4.52 and 5.93 (after 7 to 9 steps), the GPT 4.14, 4.41 and 4.77.
RATES = {"rwkv_pl": 3e-3, "transformers Rwkv": 1e-3, "GPT of torch's layers": 1e-3}
BETAS = (0.9, 0.99)
WINDOWS = 128  # of the validation


class GPT(nn.Module):
    """A GPT-2 made of torch.nn's TransformerEncoderLayer, with GPT-2's initialisation."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        C = setting.n_embd
        self.emb, self.pos = nn.Embedding(VOCAB, C), nn.Embedding(setting.steps, C)
        layer = nn.TransformerEncoderLayer(
            C, max(1, C // 64), 4 * C, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, setting.n_layer, nn.LayerNorm(C), enable_nested_tensor=False)
        self.head = nn.Linear(C, VOCAB, bias=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(setting.steps))
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                into_residual = name.endswith(("out_proj.weight", "linear2.weight"))
                nn.init.normal_(parameter, std=0.02 / (math.sqrt(2 * setting.n_layer) if into_residual else 1))
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) -> logits (B, T, VOCAB)."""
        x = self.emb(tokens) + self.pos.weight[: tokens.shape[1]]
        return self.head(self.blocks(x, mask=self.mask, is_causal=True))


def nats(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def build_contestant(name: str, setting: Setting) -> tuple[nn.Module, Any, Any]:
    """The model, its training loss, and its cross-entropy in validation, both on tokens (B, T+1)."""
    torch.manual_seed(0)
    tune_allocator()  # for all
    if name == "rwkv_pl":
        module = make_our_module(setting)
        return module, lambda x: module.training_step(x, 0)["loss"], lambda x: nats(module(x[:, :-1])[0], x)
    if name == "transformers Rwkv":
        model = make_transformers_model(setting)

        def loss(tokens: Tensor) -> Tensor:
            return nats(model(tokens[:, :-1], use_cache=False).logits, tokens)

        return model, loss, loss
    gpt = GPT(setting)
    return gpt, lambda x: nats(gpt(x[:, :-1]), x), lambda x: nats(gpt(x[:, :-1]), x)


def open_text(setting: Setting, path: Path | None) -> DataModule:
    settings: dict[str, Any] = {"batch_size": setting.rows, "ctx_len": setting.steps, "eval_batch_size": 8}
    data = DataModule(Text(path) if path else Stdlib(), **settings)
    data.setup("fit")
    return data


def run_contestant(name: str, setting: Setting, rate: float, seconds: float, path: Path | None, pipe: Any) -> None:
    """Train for as long as asked; answer with the steps taken and the validation score."""
    model, loss, cross_entropy = build_contestant(name, setting)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, betas=BETAS, fused=True)
    data = open_text(setting, path)
    batches, held_back = data.train_dataloader().dataset, cast(EvalBatches, data.val_dataloader().dataset)
    # The last batch of the validation is padded.
    whole = len(held_back) - 1
    places = np.unique(np.linspace(0, max(whole - 1, 0), max(1, WINDOWS // 8)).astype(int))
    loss(batches[0]).backward()  # includes building and loading
    model.zero_grad()
    steps, clock = 0, 0.0

    @torch.no_grad()
    def validate() -> float:
        model.eval()
        nats_per_byte = float(np.mean([float(cross_entropy(held_back[int(i)])) for i in places]))
        model.train()
        return bits_per_byte(nats_per_byte, 1)

    pipe.send(sum(p.numel() for p in model.parameters()))
    while True:
        (budget,) = pipe.recv()
        before = clock
        while clock - before < budget:
            started = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, (clock + 0.01 * seconds) / (0.05 * seconds))
            loss(batches[steps]).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            steps += 1
            clock += time.perf_counter() - started
        pipe.send({"seconds": clock, "steps": steps, "bits_per_byte": validate()})


def run_race(
    entries: dict[str, tuple[str, float]], setting: Setting, seconds: float, turns: int, path: Path | None
) -> dict[str, Any]:
    """entries: label of a curve to the contestant and its rate. Returns each label's model size, rate and curve."""
    runners: dict[str, Contestant] = {}
    found: dict[str, Any] = {}
    try:
        for label, (name, rate) in entries.items():
            contestant = Contestant(partial(run_contestant, name, setting, rate, seconds, path))
            try:
                found[label] = {"parameters": contestant.answer(), "rate": rate, "curve": [contestant.ask(0.0)]}
                runners[label] = contestant
            except ContestantError as why:
                print(f"left out: {label}: {why}")
        for turn in range(1, turns + 1):
            for label, contestant in runners.items():
                curve = found[label]["curve"]
                # If a step overruns its turn, the next turn is shortened.
                curve.append(contestant.ask(turn * seconds / turns - curve[-1]["seconds"]))
            scores = ", ".join(f"{label} {one['curve'][-1]['bits_per_byte']:.3f}" for label, one in found.items())
            print(f"{turn * seconds / turns:5.0f} s: {scores}", flush=True)
    finally:
        for contestant in runners.values():
            contestant.stop()
    return found


def measure_compressors(data: DataModule) -> dict[str, float]:
    lo, hi = data.token_file.splits.val
    content = np.asarray(data.token_file.tokens[lo:hi]).astype(np.uint8).tobytes()
    sizes = {"gzip -9": len(gzip.compress(content, 9)), "xz -9": len(lzma.compress(content, preset=9))}
    return {name: 8 * size / len(content) for name, size in sizes.items()}


def main() -> None:
    parser = make_parser("race", __doc__, rounds=20)
    parser.add_argument("--seconds", type=positive_float, default=100, help="seconds of training for each (100)")
    parser.add_argument("--data", type=Path, help="a text file instead of the standard library's source")
    parser.add_argument("--rates", type=positive_float, nargs="+", help="compare learning rates; writes no results")
    parser.add_argument("--tiny", action="store_true", help="tiny models, to try the program")
    options = parser.parse_args()
    setting = TINY if options.tiny else SIZE
    path = options.data.absolute() if options.data else None
    title = f"bits per byte of held-out text, {options.seconds:g} s each, {setting}, float32"
    try:
        data = open_text(setting, path)
    except UserError as error:
        parser.error(f"argument --data: {error}")
    begin_benchmark(title, options.threads)
    print(data.description())
    if options.rates:
        entries = {f"{name}, {rate:g}": (name, rate) for name in RATES for rate in options.rates}
    else:
        entries = {name: (name, rate) for name, rate in RATES.items()}
    found = run_race(entries, setting, options.seconds, options.rounds, path)
    lines = []
    for label, one in found.items():
        last = one["curve"][-1]
        numbers = [f"{one['parameters']:,}", f"{one['rate']:g}", f"{last['steps']:,}", f"{last['seconds']:.1f}"]
        lines.append([label, *numbers, f"{last['bits_per_byte']:.3f}"])
    compressed = measure_compressors(data)
    lines += [[name, "", "", "", "", f"{bits:.3f}"] for name, bits in compressed.items()]
    print_table(["", "parameters", "rate", "steps", "seconds", "bits per byte"], lines)
    if not options.rates:
        save_results(
            options.results, "race", title, corpus=data.description(), contestants=found, compressors=compressed
        )
        draw_race(options.results, DOCS if options.results == RESULTS else options.results)


if __name__ == "__main__":
    main()
