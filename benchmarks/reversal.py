"""RWKV-7 learns to reverse strings of digits: the toy of the official trainer, next to a plain transcription.

    python -m benchmarks reversal [--rounds 200] [--minutes 60]

The toy (RWKV-LM, RWKV-v7/train_temp/rwkv7_train_simplified.py) has two layers of 32 channels, heads of 16 and ranks of
8, and learns from rows of `digits,reversed#`, up to 60 digits each. First, rwkv_pl's blocks and optimizer, and a
transcription of the equations, take the same steps in float64. The table has the largest differences of the losses, of
the gradients, and of the updates of the weights. Then rwkv_pl's blocks train in float32, at most the official 10,000
steps, until the time is over; the cosine of the learning rate ends with it. The score is the accuracy of the digits
after a comma, which the string before it determines. The official script's own score also counts the digits before the
comma, which are random.

    B  rows    T  tokens    C  channels    H  heads    N  channels of a head
"""

import math
import random
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.common import begin_benchmark, make_parser, positive_float, print_table, save_results
from rwkv_pl import Optim, RWKV7Config
from rwkv_pl.model.rwkv7 import ChannelMix, TimeMix
from rwkv_pl.training.optimizer import build_optimizer, parameter_groups, set_hyperparameters

VOCAB, COMMA, END = 12, 10, 11  # after the digits
LONGEST = 60
LAYERS, C, N, RANK = 2, 32, 16, 8
ROWS, LENGTH, STEPS = 256, 129, 10_000
FIRST_LR, LAST_LR, BETAS, EPS, WEIGHT_DECAY, CLIP = 4e-3, 1e-6, (0.9, 0.999), 1e-8, 0.1, 1.0
# Rows of a batch in the comparison: the transcription's loop over time takes seconds for 256 rows.
COMPARED_ROWS = 8
TEST_ROWS = 1024
LOG_EVERY = 100


def draw_rows(rows: int, generator: random.Random) -> Tensor:
    """Tokens (rows, LENGTH): strings of 1 to LONGEST digits, each with its reversal, until the row is full."""
    tokens = []
    for _ in range(rows):
        row: list[int] = []
        while len(row) < LENGTH:
            n_digits = generator.randint(1, LONGEST)
            digits = [generator.randrange(10) for _ in range(n_digits)]
            if n_digits > 1:
                digits[0] = generator.randrange(1, 10)
            row += [*digits, COMMA, *reversed(digits), END]
        tokens.append(row[:LENGTH])
    return torch.tensor(tokens)


class Toy(nn.Module):
    """The official toy, of rwkv_pl's blocks: unlike a language model, without ln0, and with a bias of the head."""

    def __init__(self) -> None:
        super().__init__()
        ranks = dict.fromkeys(("rank_w", "rank_a", "rank_v", "rank_g"), RANK)
        config = RWKV7Config(vocab_size=VOCAB, n_layer=LAYERS, n_embd=C, head_size=N, **ranks)
        self.emb = nn.Embedding(VOCAB, C)
        self.ln1 = nn.ModuleList(nn.LayerNorm(C) for _ in range(LAYERS))
        self.att = nn.ModuleList(TimeMix(config, layer) for layer in range(LAYERS))
        self.ln2 = nn.ModuleList(nn.LayerNorm(C) for _ in range(LAYERS))
        self.ffn = nn.ModuleList(ChannelMix(config, layer) for layer in range(LAYERS))
        self.ln_out = nn.LayerNorm(C)
        self.head = nn.Linear(C, VOCAB)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The toy's initialisation, where it is not that of the language model."""
        for att, ffn in zip(self.att, self.ffn, strict=True):
            for name, bound in {"receptance": 0.5, "key": 0.05, "value": 0.5}.items():
                nn.init.uniform_(att.get_parameter(f"{name}.weight"), -bound / C**0.5, bound / C**0.5)
            nn.init.ones_(att.get_parameter("ln_x.weight"))
            nn.init.zeros_(ffn.get_parameter("x_k"))
            nn.init.orthogonal_(ffn.get_parameter("key.weight"), gain=2)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) -> logits (B, T, VOCAB)."""
        x, v_first = self.emb(tokens), None
        for ln1, att, ln2, ffn in zip(self.ln1, self.att, self.ln2, self.ffn, strict=True):
            y, _, _, v_first = att(ln1(x), None, None, v_first)
            x = x + y
            x = x + ffn(ln2(x), None)[0]
        return self.head(self.ln_out(x))


def transcribe(p: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """The toy's equations, one token at a time: the parameters by name, tokens (B, T) -> logits (B, T, VOCAB)."""

    def mix(x: Tensor, mu: Tensor) -> Tensor:
        """x (B, T, C) and the token before it, of which there is none at first."""
        before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)
        return x + (before - x) * mu

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (C,), p[f"{name}.weight"], p[f"{name}.bias"])

    B, T = tokens.shape
    H = C // N
    x = p["emb.weight"][tokens]
    for layer in range(LAYERS):
        q = {name.removeprefix(f"att.{layer}."): value for name, value in p.items() if name.startswith(f"att.{layer}.")}
        y = norm(x, f"ln1.{layer}")
        x_r, x_w, x_k, x_v, x_a, x_g = (mix(y, q[f"x_{name}"]) for name in "rwkvag")
        r, k, v = x_r @ q["receptance.weight"].T, x_k @ q["key.weight"].T, x_v @ q["value.weight"].T
        # The toy writes the decay as exp(-exp(-softplus(-w) - 1/2)).
        w = torch.exp(-torch.exp(-F.softplus(-(q["w0"] + torch.tanh(x_w @ q["w1"]) @ q["w2"])) - 0.5))
        a = torch.sigmoid(q["a0"] + (x_a @ q["a1"]) @ q["a2"])
        g = torch.sigmoid(x_g @ q["g1"]) @ q["g2"]
        if layer == 0:
            v_first = v
        else:
            v = v + (v_first - v) * torch.sigmoid(q["v0"] + (x_v @ q["v1"]) @ q["v2"])
        kk = (k * q["k_k"]).view(B, T, H, N)
        kk = kk / kk.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        k = k * (1 + (a - 1) * q["k_a"])
        r, k, v, w, a = (z.view(B, T, H, N) for z in (r, k, v, w, a))
        state, outputs = x.new_zeros(B, H, N, N), []
        for t in range(T):
            removed = torch.einsum("bhij,bhj->bhi", state, -kk[:, t])
            state = (
                state * w[:, t, :, None]
                + removed[..., None] * (kk * a)[:, t, :, None]
                + v[:, t, ..., None] * k[:, t, :, None]
            )
            outputs.append(torch.einsum("bhij,bhj->bhi", state, r[:, t]))
        y = torch.stack(outputs, dim=1)
        mean, var = y.mean(-1, keepdim=True), y.var(-1, keepdim=True, unbiased=False)
        y = ((y - mean) / torch.sqrt(var + 64e-5)).flatten(2) * q["ln_x.weight"] + q["ln_x.bias"]
        y = y + ((r * k * q["r_k"]).sum(-1, keepdim=True) * v).flatten(2)
        x = x + (y * g) @ q["output.weight"].T
        key = mix(norm(x, f"ln2.{layer}"), p[f"ffn.{layer}.x_k"]) @ p[f"ffn.{layer}.key.weight"].T
        x = x + torch.relu(key) ** 2 @ p[f"ffn.{layer}.value.weight"].T
    return norm(x, "ln_out") @ p["head.weight"].T + p["head.bias"]


def cross_entropy(logits: Tensor, tokens: Tensor) -> Tensor:
    """logits (B, T, VOCAB), tokens (B, T+1) -> the mean loss."""
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """rwkv_pl's optimizer. The toy decays the same parameters, and has no factors of the learning rate."""
    optim = Optim(lr=FIRST_LR, betas=list(BETAS), eps=EPS, weight_decay=WEIGHT_DECAY, lr_scale=None)
    optimizer = build_optimizer(torch.optim.AdamW, parameter_groups(model, {}), optim)
    set_hyperparameters(optimizer, optim, {})
    return optimizer


class Adam:
    """AdamW in five lines (arXiv 1711.05101), on the parameters by name."""

    def __init__(self, parameters: dict[str, Tensor]) -> None:
        self.parameters, self.steps = parameters, 0
        self.m = {name: torch.zeros_like(p) for name, p in parameters.items()}
        self.v = {name: torch.zeros_like(p) for name, p in parameters.items()}

    @torch.no_grad()
    def step(self, gradients: dict[str, Tensor], rate: float) -> None:
        self.steps += 1
        norm = math.sqrt(sum(float(grad.square().sum()) for grad in gradients.values()))
        for name, p in self.parameters.items():
            grad = gradients[name] * min(1.0, CLIP / (norm + 1e-6))
            decay = WEIGHT_DECAY if ".weight" in name and "ln" not in name else 0.0
            self.m[name] = BETAS[0] * self.m[name] + (1 - BETAS[0]) * grad
            self.v[name] = BETAS[1] * self.v[name] + (1 - BETAS[1]) * grad**2
            m, v = self.m[name] / (1 - BETAS[0] ** self.steps), self.v[name] / (1 - BETAS[1] ** self.steps)
            p -= rate * (m / (v.sqrt() + EPS) + decay * p)


def cosine(progress: float) -> float:
    """The learning rate after a part of the training, from 0 to 1."""
    return LAST_LR + (FIRST_LR - LAST_LR) * 0.5 * (1 + math.cos(math.pi * progress))


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    """|ours - theirs| / |theirs|, where 0 / 0 is 0."""
    difference = float((ours - theirs).norm())
    return difference / max(float(theirs.norm()), 1e-300) if difference else 0.0


def compare(steps: int, rows: int = COMPARED_ROWS) -> dict[str, Any]:
    """Train in float64; the transcription takes each step from the same weights, with its own moments.

    Returns the largest relative differences, each with its step and the parameter. If each trained alone, they would
    drift apart, and a difference in one step could not be separated from one in the weights before it.
    """
    torch.manual_seed(0)
    model = Toy().double()
    theirs = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    optimizer, adam = make_optimizer(model), Adam(theirs)
    generator = random.Random(0)
    worst: dict[str, dict[str, Any]] = {}
    losses = []

    def judge(what: str, step: int, name: str, ours: Tensor, expected: Tensor) -> None:
        found = relative_difference(ours.detach(), expected.detach())
        if what not in worst or found > worst[what]["difference"]:
            worst[what] = {"difference": found, "step": step, "name": name}

    for step in range(steps):
        tokens, rate = draw_rows(rows, generator), cosine(step / STEPS)
        loss = cross_entropy(model(tokens[:, :-1]), tokens)
        loss.backward()
        expected = cross_entropy(transcribe(theirs, tokens[:, :-1]), tokens)
        gradients = dict(zip(theirs, torch.autograd.grad(expected, list(theirs.values())), strict=True))
        losses.append(float(expected.detach()))
        judge("loss", step, "", loss, expected)
        for name, p in model.named_parameters():
            assert p.grad is not None
            judge("gradient", step, name, p.grad, gradients[name])
        before = {name: p.detach().clone() for name, p in theirs.items()}
        for group in optimizer.param_groups:
            group["lr"] = rate
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        adam.step(gradients, rate)
        for name, p in model.named_parameters():
            judge("update", step, name, p - before[name], theirs[name] - before[name])
            theirs[name].data.copy_(p.detach())
    return {"steps": steps, "rows": rows, "first_loss": losses[0], "last_loss": losses[-1], "worst": worst}


def reversed_parts(tokens: list[int]) -> Iterator[tuple[int, range]]:
    """Of a row, the length of each string, and the places of its reversal as far as it is in the row."""
    start = 0
    while COMMA in tokens[start:]:
        comma = tokens.index(COMMA, start)
        length = comma - start
        yield length, range(comma + 1, min(comma + 1 + length, len(tokens)))
        start = comma + length + 2


@torch.no_grad()
def measure_accuracy(model: nn.Module) -> dict[str, float]:
    """Accuracy on new rows: of the reversed digits, by the length of the string, and the official script's."""
    tokens = draw_rows(TEST_ROWS, random.Random("test"))
    right = torch.cat([model(part[:, :-1]).argmax(-1) == part[:, 1:] for part in tokens.split(ROWS)])
    counts: dict[str, list[int]] = {}
    for row, row_right in zip(tokens.tolist(), right.tolist(), strict=True):
        for length, places in reversed_parts(row):
            hits = [row_right[place - 1] for place in places]
            band = f"{(length - 1) // 20 * 20 + 1} to {(length - 1) // 20 * 20 + 20} digits"
            for name, numbers in {
                "reversed digits": hits,
                band: hits,
                "whole strings": [all(hits)] if len(hits) == length else [],
            }.items():
                count = counts.setdefault(name, [0, 0])
                count[0] += sum(numbers)
                count[1] += len(numbers)
    found = {name: count[0] / count[1] for name, count in sorted(counts.items()) if count[1]}
    return found | {"all tokens, as the official script counts": float(right.double().mean())}


def train(minutes: float) -> dict[str, Any]:
    """Train in float32 until the time or the official number of steps is over; returns the curve and the accuracy."""
    torch.manual_seed(1)
    model = Toy()
    optimizer = make_optimizer(model)
    generator = random.Random(1)
    # CPU time, because it is the same on a busy machine.
    curve, step, started = [], 0, time.process_time()
    while True:
        progress = max(step / STEPS, (time.process_time() - started) / (60 * minutes))
        if progress >= 1:
            break
        tokens = draw_rows(ROWS, generator)
        for group in optimizer.param_groups:
            group["lr"] = cosine(progress)
        loss = cross_entropy(model(tokens[:, :-1]), tokens)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % LOG_EVERY == 0 or step == 1:
            curve.append({"step": step, "seconds": time.process_time() - started, "loss": float(loss.detach())})
            print(f"{step:6,} steps, {curve[-1]['seconds']:6.0f} s: loss {curve[-1]['loss']:.4f}", flush=True)
    return {"minutes": minutes, "steps": step, "curve": curve, "accuracy": measure_accuracy(model)}


def main() -> None:
    parser = make_parser("reversal", __doc__, rounds=200, threads=1)
    parser.add_argument("--minutes", type=positive_float, default=60, help="minutes of training, in CPU time (60)")
    options = parser.parse_args()
    title = "RWKV-7 reverses strings of digits, the official toy"
    begin_benchmark(title, options.threads)
    compared = compare(options.rounds)
    print_table(
        [f"{options.rounds} steps in float64", "largest relative difference", "parameter", "step"],
        [[what, f"{one['difference']:.1e}", one["name"], str(one["step"])] for what, one in compared["worst"].items()],
    )
    trained = train(options.minutes)
    print_table(
        [f"accuracy after {trained['steps']:,} steps, {options.minutes:g} minutes", "%"],
        [[name, f"{100 * value:.2f}"] for name, value in trained["accuracy"].items()],
    )
    save_results(options.results, "reversal", title, compared=compared, trained=trained)


if __name__ == "__main__":
    main()
