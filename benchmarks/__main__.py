"""The benchmarks by name.

python -m benchmarks NAME [options]     NAME --help lists its options
python -m benchmarks all [options]      one after another, then the plot; only options that all benchmarks have
"""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

NAMES = (
    "wkv", "wkv7", "train_step", "versions", "generate", "loop", "processes", "memory", "startup", "checkpoint", "race",
    "plot",
)  # fmt: skip
# Not a part of `all`: they need a GPU, the package ziglang, an hour, or the runs of sweeps.
OTHER_NAMES = ("gpu", "wkv_gpu", "compilers", "reversal", "learning")


def read_summary(name: str) -> str:
    """The first line of a benchmark's docstring, without importing it."""
    source = Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").splitlines()[0]


def options_of_all(options: list[str]) -> dict[str, list[str]]:
    """The options of each benchmark if all are run with `options`. Exits if they are invalid."""
    from benchmarks.common import make_parser  # imports torch, which the list does not need

    results = (
        make_parser("all", "All that run on a CPU, one after another, then the plot", None).parse_args(options).results
    )
    return {name: [f"--results={results}"] if name == "plot" else options for name in NAMES}


def main() -> None:
    name, *options = sys.argv[1:] or ["--help"]
    if name == "all":
        commands = {
            each: [sys.executable, "-m", "benchmarks", each, *words] for each, words in options_of_all(options).items()
        }
        failed = [each for each, command in commands.items() if subprocess.run(command).returncode]
        sys.exit(f"failed: {', '.join(failed)}" if failed else 0)
    if name in (*NAMES, *OTHER_NAMES):
        sys.argv = [f"benchmarks {name}", *options]
        import_module(f"benchmarks.{name}").main()
        return
    print(__doc__)
    for each in (*NAMES, *OTHER_NAMES):
        print(f"    {each:12}{read_summary(each)}")
    sys.exit(0 if name in ("-h", "--help") else f"\nthere is no benchmark {name}")


if __name__ == "__main__":
    main()
