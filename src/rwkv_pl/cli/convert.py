"""rwkv-convert: converts weights from one format to another."""

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

# Suffixes of other formats' files, refused as the name of a Hugging Face folder.
FOREIGN_SUFFIXES = (".bin", ".gguf", ".h5", ".json", ".npz", ".onnx", ".pt", ".safetensors")


@cli_entry_point
def main() -> None:
    """The command. Exit codes: 0 written and verified, 1 error of the system, 2 bad input."""
    parser = argparse.ArgumentParser(
        prog="rwkv-convert",
        description="Converts the weights SRC to DST, reads DST back and compares every bit.",
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
        help="dtype of the numbers in DST (default: that of SRC)",
    )
    parser.add_argument(
        "--with-block0-v",
        action="store_true",
        help="add block 0's v0, v1 and v2 as zeros to NAME.pth: nothing reads them, but some programs ask for them",
    )
    arguments = parser.parse_args()
    convert(arguments.source, arguments.target, arguments.dtype, arguments.with_block0_v)


def convert(source: Path, target: Path, dtype: str | None = None, with_unread: bool = False) -> None:
    """Write `target`, and print a line each for the weights read and written. Raises UserError.

    with_unread: add zeros for the parameters that the version's official files may hold and nothing reads.
    """
    check_target(target)
    if with_unread and target.suffix.lower() != ".pth":
        raise UserError(f"--with-block0-v is for an official file: give NAME.pth, not {target}")
    if not source.exists():
        raise UserError(f"{source} does not exist: give a run folder, a .ckpt, a .pth or a Hugging Face folder")
    if sys.stderr.isatty():
        print("loading torch ...", file=sys.stderr, flush=True)
    with default_sigint():
        import torch

        from rwkv_pl.weights.read import read_weights
        from rwkv_pl.weights.write import write_weights

    weights = read_weights(source)
    if with_unread and not weights.unread:
        raise UserError(f"--with-block0-v: the official files of {weights.version} have no v0, v1 and v2; leave it out")
    print(f"read    {weights.path}\n        {weights}")
    wanted = weights.cast(getattr(torch, dtype)) if dtype else weights
    if changes := describe_rounding(weights, wanted):
        print(f"rounded {changes}")
    written = write_weights(wanted, target, with_unread)
    files = [file for file in target.rglob("*") if file.is_file()] if target.is_dir() else [target]
    print(f"wrote   {target} ({sum(file.stat().st_size for file in files) / 1e6:,.1f} MB)\n        {written}")
    if weights.vocabulary and not written.vocabulary:
        print(
            f"        without the vocabulary ({weights.vocabulary.kind}): a .pth holds only weights; "
            "a .ckpt or a Hugging Face folder keeps it"
        )
    print(f"checked by reading it back, every tensor bit for bit; digest {written.digest[:16]}")


def check_target(target: Path) -> None:
    """Raise UserError if `target` can't be written. Nothing is overwritten."""
    if target.suffix.lower() in FOREIGN_SUFFIXES:
        raise UserError(
            f"{target} has the suffix of another format: give NAME.pth, NAME.ckpt or the name of a Hugging Face folder"
        )
    if not target.absolute().parent.is_dir():
        raise UserError(
            f"{target.absolute().parent} is not a folder: create it, or choose another place for {target.name}"
        )
    if target.name in ("", ".."):
        raise UserError(f"{target} has no name: give the name of a new folder")
    if os.path.lexists(partial := target.with_name(target.name + PARTIAL_SUFFIX)):
        raise UserError(f"{partial} exists: another conversion is running, or was killed; if it was killed, remove it")
    is_file = target.suffix.lower() in (".pth", ".ckpt")
    if os.path.lexists(target) and (is_file or target.is_symlink() or not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists and is not overwritten: choose another name")


def describe_rounding(before: "Weights", after: "Weights") -> str:
    """Describe how many values a narrower dtype changed; "" if none."""
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
