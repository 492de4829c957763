"""A training step and its matrix products alone, rwkv_pl and Hugging Face transformers, in turns.

    python -m benchmarks train_step [--rounds 7] [--settings classic small] [--profile]

A step is forward, loss, backward and Adam. Times and their ratios come from one run in which all contestants take
turns, in half as many rounds, but at least three. The part that is not matrix products comes from another run, the
pairs: each round runs the products once, then the step once (short ones as often as fill 0.2 s), each in a separate
process, and the median of the differences counts. If the products of the pairs spread over more than 5%, from minimum
to maximum, the pairs are repeated. The products are those of the model, each with two in the backward pass, computed as
the model does; in bfloat16 without the casts. `full` adds gradient clipping and L2Wrap, like rwkv-train; the peer has
neither. --profile adds the time of each part.
"""

import logging
import re
import statistics
from collections import Counter
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.common import (
    Call,
    Maker,
    Summary,
    begin_benchmark,
    make_parser,
    print_table,
    relative_spread,
    run_once,
    save_results,
    summarize,
    summary_cells,
    take_turns,
)
from rwkv_pl import LitRWKV, Optim
from rwkv_pl.model import MODELS
from rwkv_pl.ops.cross_entropy import cross_entropy
from rwkv_pl.ops.heap import tune_allocator
from rwkv_pl.ops.linear import linear

VOCAB = 256


@dataclass(frozen=True)
class Setting:
    """A model over bytes, and its batch: rows of `steps` tokens."""

    n_layer: int
    n_embd: int
    rows: int
    steps: int

    def __str__(self) -> str:
        return f"{self.n_layer} x {self.n_embd}, {self.rows} x {self.steps:,} tokens"


SETTINGS = {
    "classic": Setting(12, 512, 1, 1024),
    "small": Setting(2, 192, 6, 256),
    "tiny": Setting(2, 32, 2, 64),  # to try the program
}
PRECISIONS = ("float32", "bf16-mixed")

# Pairs are repeated at most TRIES times, while their products spread over more than SPREAD.
SPREAD, TRIES = 0.05, 5

# A single call of some milliseconds would mostly measure caches and threads gone cold in the others' turns.
SECONDS_A_TURN = 0.2


def random_tokens(setting: Setting, device: str = "cpu") -> Tensor:
    return torch.randint(VOCAB, (setting.rows, setting.steps + 1), device=device)


def autocast(precision: str, device: str = "cpu") -> AbstractContextManager[Any]:
    return torch.autocast(device, torch.bfloat16, enabled=precision == "bf16-mixed")


def make_our_module(setting: Setting, version: str = "rwkv4") -> LitRWKV:
    """With the allocator set up as by rwkv-train."""
    tune_allocator()
    model_class, config_class = MODELS[version]
    model = model_class(config_class(VOCAB, setting.n_layer, setting.n_embd))
    return LitRWKV(model, Optim("torch.optim.Adam", lr=1e-5))  # as for the peers


def make_our_step(
    setting: Setting,
    precision: str,
    full: bool = False,
    compiled: bool = False,
    device: str = "cpu",
    version: str = "rwkv4",
) -> Call:
    """One step of LitRWKV and its optimizer; full: with gradient clipping and L2Wrap.

    On a GPU the step can be captured in a CUDA graph.
    """
    module = make_our_module(setting, version).to(device)
    if compiled:
        for block in module.model.blocks:
            block.compile(dynamic=False)
    optimizer = module.configure_optimizers()
    for group in optimizer.param_groups:
        group["capturable"] = device == "cuda"
    tokens = random_tokens(setting, device)

    def step() -> None:
        with autocast(precision, device):
            if full:
                loss = module.training_step(tokens, 0)["loss"]
            else:
                logits, _ = module.model(tokens[:, :-1])
                loss = cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())[0].mean()
        loss.backward()
        if full:
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def make_transformers_model(setting: Setting) -> Any:
    import transformers

    logging.getLogger("transformers").setLevel(logging.ERROR)
    config = transformers.RwkvConfig(
        vocab_size=VOCAB,
        context_length=setting.steps,
        hidden_size=setting.n_embd,
        num_hidden_layers=setting.n_layer,
        tie_word_embeddings=False,
        rescale_every=0,
    )
    return transformers.RwkvForCausalLM(config).train()


def make_transformers_step(setting: Setting, precision: str, device: str = "cpu") -> Call:
    """The same size and text through transformers' RwkvForCausalLM."""
    model = make_transformers_model(setting).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-5, fused=True)
    tokens = random_tokens(setting, device)

    def step() -> None:
        with autocast(precision, device):
            logits = model(tokens[:, :-1], use_cache=False).logits
            loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def make_products(setting: Setting, precision: str) -> Call:
    """Only the matrix products of a step."""
    tune_allocator()
    C, dtype = setting.n_embd, torch.float32 if precision == "float32" else torch.bfloat16
    shapes = [(C, C)] * 5 + [(C, 4 * C), (4 * C, C)]
    weights = [torch.randn(out, into).to(dtype) for out, into in shapes * setting.n_layer + [(VOCAB, C)]]
    inputs = {width: torch.randn(setting.rows * setting.steps, width).to(dtype) for width in (VOCAB, C, 4 * C)}

    @torch.no_grad()
    def step() -> None:
        for weight in weights:
            out, into = weight.shape
            linear(inputs[into], weight)
            linear(inputs[out], weight.T)
            linear(inputs[out].T, inputs[into].T)

    return step


# An operator counts for the first part whose pattern matches its name, or else the name of its nearest caller.
PARTS = {
    "matrix products": r"::(mm|addmm|bmm|_linear_pointwise|linear)$|MmBackward|_Linear",
    "Adam": r"adam|Optimizer",
    "gradient clipping": r"_foreach_norm|linalg_vector_norm|_foreach_mul",
    "WKV": r"wkv4",
    "squared ReLU": r"relu|addcmul",
    "cross-entropy": r"cross_?entropy|softmax|nll_loss|::max$|MaxBackward|logsumexp",
    "LayerNorm, shift, mixes": r"norm|shift|mix|lerp|::cat$|Cat|Lerp|Slice|::slice",
    "gates": r"gate|sigmoid|MulBackward",
    "copies and casts": r"copy_|::to$|_to_copy|contiguous|clone",
}


def profile(
    setting: Setting, precision: str, full: bool = False, steps: int = 5, device: str = "cpu"
) -> dict[str, Any]:
    """Milliseconds per step of each part, from the operators' self times, and the largest operators of the rest.

    On a GPU an operator's time is that of the kernels that it launched.
    """
    step = make_our_step(setting, precision, full, device=device)
    step()
    step()
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CPU, *([activity.CUDA] if device == "cuda" else [])]) as profiler:
        for _ in range(steps):
            step()
        if device == "cuda":
            torch.cuda.synchronize()
    parts: Counter[str] = Counter()
    rest: Counter[str] = Counter()
    for event in profiler.events():
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue  # a kernel, already counted by its operator
        milliseconds = (event.self_device_time_total if device == "cuda" else event.self_cpu_time_total) / 1000 / steps
        part = find_part(event)
        parts[part] += milliseconds
        if part == "rest":
            rest[event.name] += milliseconds
    return {"milliseconds": dict(parts.most_common()), "largest_of_the_rest": dict(rest.most_common(5))}


def find_part(event: Any) -> str:
    """The part of an operator in the profile, by its own name or else by its callers' names, nearest first."""
    own = event.name
    while event is not None:
        for part, pattern in PARTS.items():
            if re.search(pattern, event.name, re.IGNORECASE):
                return part
        event = event.cpu_parent
    return "gates" if own == "aten::mul" else "rest"


def measure_pairs(setting: Setting, rounds: int) -> tuple[dict[str, list[float]], dict[str, float], int]:
    """Seconds of products and steps in turns, the spread of the products, and the number of tries."""
    makers: dict[str, Maker] = {}
    for precision in PRECISIONS:
        makers[f"products, {precision}"] = partial(make_products, setting, precision)
        makers[f"rwkv_pl, {precision}"] = partial(make_our_step, setting, precision)
    tries = []
    for attempt in range(1, TRIES + 1):
        seconds = take_turns(makers, rounds, SECONDS_A_TURN)
        spreads = {precision: relative_spread(seconds[f"products, {precision}"]) for precision in PRECISIONS}
        tries.append((seconds, spreads, attempt))
        if max(spreads.values()) <= SPREAD:
            break
        print(f"the products spread over {max(spreads.values()):.0%}, try {attempt} of {TRIES}", flush=True)
    return min(tries, key=lambda one: max(one[1].values()))


def compute_remainders(seconds: dict[str, list[float]]) -> dict[str, dict[str, Summary]]:
    """The time outside of matrix products, for each precision: relative to the float32 products, and to its own."""
    found = {}
    for precision in PRECISIONS:
        alone = seconds[f"products, {precision}"]
        rest = [step - bare for step, bare in zip(seconds[f"rwkv_pl, {precision}"], alone, strict=True)]
        shares = {}
        for of, times in (("float32 products", seconds["products, float32"]), ("its own products", alone)):
            shares[of] = summarize([value / statistics.median(times) for value in rest])
        found[precision] = shares
    return found


def measure_setting(setting: Setting, rounds: int, profiled: bool) -> dict[str, Any]:
    """Measure one setting, and print each result as it comes."""
    print(f"\n{setting}", flush=True)
    pairs, spreads, attempt = measure_pairs(setting, rounds)
    makers: dict[str, Maker] = {}
    for precision in PRECISIONS:
        makers |= {
            f"products, {precision}": partial(make_products, setting, precision),
            f"rwkv_pl, {precision}": partial(make_our_step, setting, precision),
            f"rwkv_pl, full, {precision}": partial(make_our_step, setting, precision, True),
            f"rwkv_pl, full, compiled, {precision}": partial(make_our_step, setting, precision, True, True),
            f"transformers, {precision}": partial(make_transformers_step, setting, precision),
        }
    rows = {name: summarize(taken) for name, taken in take_turns(makers, max(3, rounds // 2), SECONDS_A_TURN).items()}
    ratios = {name: row["median"] / rows[f"rwkv_pl, {name.split(', ')[-1]}"]["median"] for name, row in rows.items()}
    lines = [[name, *summary_cells(row, 1e3), f"{ratios[name]:.2f}"] for name, row in rows.items()]
    print_table(["", "ms", "quartiles", "x rwkv_pl"], lines)

    rest = compute_remainders(pairs)
    lines = [
        [precision, of, *summary_cells(share, 1, 3)]
        for precision, shares in rest.items()
        for of, share in shares.items()
    ]
    print_table(["not a matrix product", "as a share of", "median", "quartiles"], lines)
    reached = "" if max(spreads.values()) <= SPREAD else f", over {SPREAD:.0%} in {TRIES} tries: the machine is busy"
    spread = ", ".join(f"{value:.1%} in {precision}" for precision, value in spreads.items())
    print(f"try {attempt}: the products spread over {spread}{reached}", flush=True)

    profiles = {}
    for precision in PRECISIONS if profiled else ():
        profiles[precision] = found = run_once(profile, setting, precision)
        total = sum(found["milliseconds"].values())
        lines = [[part, f"{taken:.2f}", f"{taken / total:.1%}"] for part, taken in found["milliseconds"].items()]
        print_table([f"profile, {precision}", "ms", "of the step"], lines)
        print("rest: " + ", ".join(f"{name} {taken:.2f} ms" for name, taken in found["largest_of_the_rest"].items()))
    return {
        "setting": asdict(setting),
        "seconds": rows,
        "times_ours": ratios,
        "pairs": {name: summarize(taken) for name, taken in pairs.items()},
        "not_a_matrix_product": rest,
        "products_spread": spreads,
        "profiles": profiles,
    }


def main() -> None:
    parser = make_parser("train_step", __doc__, rounds=7)
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=["classic", "small"])
    parser.add_argument("--profile", action="store_true", help="also print the time of each part")
    options = parser.parse_args()
    title = "one training step: forward, loss, backward, Adam"
    begin_benchmark(title, options.threads)
    settings = {name: measure_setting(SETTINGS[name], options.rounds, options.profile) for name in options.settings}
    save_results(options.results, "train_step", title, rounds=options.rounds, settings=settings)


if __name__ == "__main__":
    main()
