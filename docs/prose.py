"""Counts the habits of writing that CONTRIBUTING.md warns of: in comments, docstrings, messages and Markdown.

python docs/prose.py PATH...           a table: hits per 1,000 lines, one column a path
python docs/prose.py --list PATH...    each hit as FILE:LINE: habit: the text around it

Lines are the files' non-blank lines, code included. Patterns know no grammar: read a hit before you change it.
"""

import argparse
import ast
import io
import re
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

HABITS = {
    "told": r"\btold\b",
    "what (noun)": r"\bwhat (?!about\b|if\b|to\b|else\b)\w+(?![^.!?\n]{0,120}\?)",
    "is no X": r"(?<!\bthere )\b(?:is|are|was|were) no (?!longer\b|more than\b|less than\b|one\b)\w",
    "of ours / own": r"\bof (?:ours|yours|theirs|(?:its|their|our|your) own)\b",
    "lies, stands": r"\b(?:lies?|stands?|stood)\b(?! for\b| in for\b|-)",
    "begun, mended": r"\b(?:begun|mend(?:s|ed|ing)?)\b",
    "that which": r"\b(?:that|those) which\b",
    "is there": r"\b(?:is|are|was|were) (?:not |already |still )?there(?=[.,;:)]| where\b|\n)",
    "beside": r"\bbeside\b",
    "so many": r"\bso (?:many|much|few)\b(?! that\b)",
    "Where ...,": r"(?:(?<=[.;:] )|(?<=\n))(?-i:Where)\b[^.?\n]{3,120},",
}
SUFFIXES = {".py", ".md", ".yaml", ".yml", ".h", ".cpp", ".cu", ".cuh"}
SKIPPED = {
    ".git",
    ".venv",
    "build",
    "dist",
    "node_modules",
    "outputs",
    "multirun",
    "__pycache__",
}


def texts(suffix: str, source: str) -> Iterator[tuple[int, str]]:
    """The pieces of a file's prose, each with the number of its first line."""
    if suffix == ".md":
        source = re.sub(
            r"(?ms)^ *(```|~~~).*?^ *\1",
            lambda block: "\n" * block[0].count("\n"),
            source,
        )
        yield 1, re.sub(r"`[^`\n]*`", "x", source)
    elif suffix != ".py":
        comments = (
            r"(?:^|(?<=\s))#.*"
            if suffix in (".yaml", ".yml")
            else r"//.*|/\*(?s:.*?)\*/"
        )
        for comment in re.finditer(comments, source, re.MULTILINE):
            yield (
                source.count("\n", 0, comment.start()) + 1,
                re.sub(r"(?m)^[ /*#]+", "", comment[0]),
            )
    else:
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT:
                yield token.start[0], token.string.lstrip("#!: ")
        nodes: list[ast.AST] = [ast.parse(source)]
        for node in nodes:
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            text = "".join(
                str(part.value) if isinstance(part, ast.Constant) else "{}"
                for part in parts
            )
            nodes += (
                [] if isinstance(node, ast.JoinedStr) else ast.iter_child_nodes(node)
            )
            if re.search(
                r"[A-Za-z]+,? [a-z{}]+,? [a-z{}]+", text
            ):  # three words or more: a message, a docstring
                yield getattr(node, "lineno", 1), text


def prose(suffix: str, source: str) -> str:
    """A file's prose on the lines where the file has it; lines without prose are empty."""
    lines: list[list[str]] = [[] for _ in range(source.count("\n") + 2)]
    for first, text in texts(suffix, source):
        for number, line in enumerate(text.split("\n"), first):
            lines[min(number, len(lines) - 1)] += line.split()
    return "\n".join(" ".join(words) for words in lines)


def hits(text: str) -> Iterator[tuple[int, str, str]]:
    """Line number, habit, and the text around each hit, in the order of lines."""
    flat = re.sub(
        r"(?<!\n)\n(?!\n)", " ", text
    )  # a sentence goes on over the end of a line, not over an empty line
    found = [
        (hit, name)
        for name, habit in HABITS.items()
        for hit in re.finditer(habit, flat, re.IGNORECASE)
    ]
    for hit, name in sorted(found, key=lambda pair: pair[0].start()):
        yield (
            text.count("\n", 0, hit.start()),
            name,
            flat[max(0, hit.start() - 50) : hit.end() + 50].replace("\n", " "),
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--list", action="store_true", help="print the hits, not the table"
    )
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH")
    options = parser.parse_args()
    counts: dict[Path, Counter[str]] = {path: Counter() for path in options.paths}
    for path, count in counts.items():
        for file in [path] if path.is_file() else sorted(path.rglob("*")):
            if file.suffix in SUFFIXES and not SKIPPED & set(
                file.relative_to(path).parts
            ):
                source = file.read_text(encoding="utf-8")
                text = prose(file.suffix, source)
                count.update(
                    words=len(text.split()),
                    lines=sum(bool(line.strip()) for line in source.splitlines()),
                )
                for number, name, around in hits(text):
                    count.update((name, "all"))
                    if options.list:
                        print(f"{file}:{number}: {name}: {around}")
    if not options.list:
        rows = [("", [str(path)[-12:] for path in counts])]
        rows += [
            (k, [f"{1e3 * c[k] / max(1, c['lines']):.1f}" for c in counts.values()])
            for k in (*HABITS, "all")
        ]
        rows += [
            (
                "all, in 10,000 words",
                [f"{1e4 * c['all'] / max(1, c['words']):.0f}" for c in counts.values()],
            )
        ]
        rows += [
            (k, [f"{c[k]:,}" for c in counts.values()]) for k in ("lines", "words")
        ]
        print(
            "\n".join(
                f"{title:22}" + "".join(f"{cell:>13}" for cell in cells)
                for title, cells in rows
            )
        )


if __name__ == "__main__":
    main()
