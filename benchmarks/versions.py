"""A training step of each version of RWKV, compared with RWKV-4's of the same width and depth, in turns.

    python -m benchmarks versions [--rounds 9] [--settings classic small] [--precisions float32]

A step is forward, loss, backward and Adam, as in train_step. The ratio is that of two calls in the same round. The
memory is that of the tensors that a block keeps for its backward pass, for each token, as the blocks keep it from
recompute_from tokens on, without the weights.
"""

from functools import partial
from typing import Any

import torch

from benchmarks.common import (
    Maker,
    begin_benchmark,
    make_parser,
    print_table,
    run_once,
    save_results,
    summarize,
    summary_cells,
    take_turns,
)
from benchmarks.train_step import (
    PRECISIONS,
    SECONDS_A_TURN,
    SETTINGS,
    Setting,
    autocast,
    make_our_module,
    make_our_step,
    random_tokens,
)
from rwkv_pl.model import MODELS


def count_kept_bytes(setting: Setting, precision: str, version: str) -> float:
    """Bytes that the second block keeps for the backward pass, for each token."""
    model: Any = make_our_module(setting, version).model
    model.recompute_from = 0
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    matrices = sum(weight.numel() * 2 for weight in model.blocks[1].parameters() if weight.dim() == 2)
    with autocast(precision):
        x, _, *rest = model.blocks[0](model.emb(random_tokens(setting)[:, :-1]), None)
        before = {tensor.untyped_storage().data_ptr() for tensor in rest}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            outputs = model.blocks[1](x, None, *rest)
    total = sum(size for pointer, size in kept.items() if pointer not in weights | before)
    del outputs
    return (total - (matrices if precision == "bf16-mixed" else 0)) / (setting.rows * setting.steps)


def main() -> None:
    parser = make_parser("versions", __doc__, rounds=9)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=["classic", "small"], help="model sizes")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS), help="of the steps")
    options = parser.parse_args()
    title = "A training step of each version"
    begin_benchmark(title, options.threads)
    rows, lines = [], []
    for name in options.settings:
        for precision in options.precisions:
            makers: dict[str, Maker] = {
                version: partial(make_our_step, SETTINGS[name], precision, version=version) for version in MODELS
            }
            seconds = take_turns(makers, options.rounds, SECONDS_A_TURN)
            for version, taken in seconds.items():
                ratio = summarize([a / b for a, b in zip(taken, seconds["rwkv4"], strict=True)])
                kept = run_once(count_kept_bytes, SETTINGS[name], precision, version)
                step = summarize(taken)
                rows.append(
                    {"setting": str(SETTINGS[name]), "precision": precision, "version": version, "seconds": step,
                     "to_rwkv4": ratio, "kept_bytes_per_token_and_block": kept}
                )  # fmt: skip
                label = f"{SETTINGS[name]}, {precision}, {version}"
                lines.append([label, f"{1e3 * step['median']:.1f}", *summary_cells(ratio), f"{kept / 1024:.1f}"])
    print_table(["", "step, ms", "ratio", "quartiles", "kept, KB"], lines)
    save_results(options.results, "versions", title, rounds=options.rounds, rows=rows)


if __name__ == "__main__":
    main()
