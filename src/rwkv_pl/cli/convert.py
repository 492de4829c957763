"""rwkv-convert: weights from one form into another."""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rwkv_pl.cli.entry import cli_entry_point, default_sigint
from rwkv_pl.errors import UserError
from rwkv_pl.files import PARTIAL_SUFFIX

if TYPE_CHECKING:
    from rwkv_pl.weights.tensors import Weights

# What other programs call files of theirs, which is no name for a folder of ours.
FOREIGN_SUFFIXES = (".bin", ".gguf", ".h5", ".json", ".npz", ".onnx", ".pt", ".safetensors")


@cli_entry_point
def main() -> None:
    """The command. Exit codes: 0 written and checked, 1 the system refused, 2 bad input."""
    parser = argparse.ArgumentParser(
        prog="rwkv-convert",
        description="Writes the RWKV-4 weights of SRC in another form into DST, and compares every bit of it.",
        epilog="examples:\n  rwkv-convert outputs/DATE/TIME my-model\n"
        "  rwkv-convert RWKV-4-Pile-169M.pth 169m.ckpt --dtype float32",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source", metavar="SRC", type=Path, help="a run folder, a .ckpt, an official .pth or a Hugging Face folder"
    )
    parser.add_argument(
        "target",
        metavar="DST",
        type=Path,
        help="NAME.pth: an official file; NAME.ckpt: a checkpoint of rwkv_pl; any other name: a Hugging Face folder",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the numbers in DST (default: that of SRC)",
    )
    arguments = parser.parse_args()
    convert(arguments.source, arguments.target, arguments.dtype)


def convert(source: Path, target: Path, dtype: str | None = None) -> None:
    """Writes `target` and says what was read and written. Raises UserError."""
    check_target(target)
    if not source.exists():
        raise UserError(f"there are no weights at {source}")
    if sys.stderr.isatty():
        print("loading torch ...", file=sys.stderr, flush=True)
    with default_sigint():
        import torch

        from rwkv_pl.weights.read import read_weights
        from rwkv_pl.weights.write import write_weights

    weights = read_weights(source)
    print(f"read    {weights.path}\n        {weights}")
    wanted = weights.cast(getattr(torch, dtype)) if dtype else weights
    if changes := describe_rounding(weights, wanted):
        print(f"rounded {changes}")
    written = write_weights(wanted, target)
    files = [file for file in target.rglob("*") if file.is_file()] if target.is_dir() else [target]
    print(f"wrote   {target} ({sum(file.stat().st_size for file in files) / 1e6:,.1f} MB)\n        {written}")
    if weights.vocabulary and not written.vocabulary:
        print(
            f"        without the vocabulary ({weights.vocabulary.kind}): a .pth is weights alone; "
            "a .ckpt or a Hugging Face folder keeps it"
        )
    print(f"checked by reading it again, every tensor bit for bit; digest {written.digest[:16]}")


def check_target(target: Path) -> None:
    """Raises UserError where nothing can be written under that name: whatever is there already stays as it is."""
    if target.suffix.lower() in FOREIGN_SUFFIXES:
        raise UserError(f"{target} is no name for it: give NAME.pth, NAME.ckpt, or that of a Hugging Face folder")
    if not target.absolute().parent.is_dir():
        raise UserError(f"there is no folder {target.absolute().parent} to write {target.name} into")
    if target.name in ("", ".."):
        raise UserError(f"{target} has no name of its own: give that of a folder which is not there yet")
    if os.path.lexists(partial := target.with_name(target.name + PARTIAL_SUFFIX)):
        raise UserError(f"{partial} is there: another conversion is at work, or was killed and left it; take it away")
    is_file = target.suffix.lower() in (".pth", ".ckpt")
    if os.path.lexists(target) and (is_file or target.is_symlink() or not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} is there already: nothing is written over, choose another name")


def describe_rounding(before: "Weights", after: "Weights") -> str:
    """How many values a narrower dtype has changed, in words; nothing where none."""
    changed = lost = total = 0
    for name, value in before.tensors.items():
        total += value.numel()
        if after.tensors[name].dtype != value.dtype:
            rounded = after.tensors[name].to(value.dtype)
            changed += int((rounded != value).sum())
            lost += int(((rounded == 0) & (value != 0)).sum())
    return f"{changed:,} of {total:,} values, {lost:,} of them to 0" if changed else ""


if __name__ == "__main__":
    main()
