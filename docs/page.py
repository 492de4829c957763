"""Run a page of the tour or a guide: Markdown whose Python runs from top to bottom in one session and prints what the page shows.

    ```python                 runs; a text fence after it shows all that it prints
    ```python picture=NAME    draws with matplotlib, without savefig; runs twice, for pictures/NAME_light.png and
                              pictures/NAME_dark.png, which the <picture> after it shows
    ```text                   the output: words and whole numbers match exactly, a number with a point or an exponent
                              to one unit of its last printed digit
    ```text rel=0.1           numbers with a point or an exponent match to 10%
    ```text any               only the words match, because the numbers are times
    ```text part              these lines are among those that it prints, in this order; only their words match
    ```python picture=NAME    may also end with an object that Jupyter shows as a picture

Other fences are only shown. A number in the prose with a point or a thousands comma has to be one that the page prints,
rounded; numbers in `code`, formulas and links are free. A page with the line NEEDS_KERNEL runs only with the compiled
kernel.
"""

import ast
import contextlib
import io
import itertools
import linecache
import re
import sys
import time
import traceback
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

FOLDER = Path(__file__).parent
PICTURES = FOLDER / "pictures"
NEEDS_KERNEL = "<!-- needs the compiled kernel -->"
SHADES = ("light", "dark")
# The guides whose code runs, besides the chapters.
GUIDES = ("library", "notebook")
# The site cuts off longer lines of code.
WIDTH = 88

FENCE = re.compile(
    r"^```(\w*)(?: +(\S+))? *\n(.*?)^``` *$", flags=re.MULTILINE | re.DOTALL
)
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:,\d{3})*(?:\.\d+)?(?:e[-+]?\d+)?(?!\w)")
NOT_PROSE = re.compile(
    r"```.*?^```|\$[^$\n]+\$|`[^`]*`|\]\([^)]*\)|</?[a-z][^<>]*>|<!--.*?-->",
    flags=re.MULTILINE | re.DOTALL,
)
PICTURE = re.compile(r"\s*(?:</details>\s*)?<picture>.*?</picture>", flags=re.DOTALL)
LANGUAGES = ("python", "text", "math", "bash", "console", "yaml", "cpp")
# A fence in a form that FENCE does not know: its code would never run.
STRAY_FENCE = re.compile(r"^\s*(```|~~~).*$", flags=re.MULTILINE)
# GitHub's Markdown removes a backslash before punctuation, also inside $...$.
FRAGILE_FORMULA = re.compile(r"(?<!\$)\$[^$\n]*(\\[^a-zA-Z\s])[^$\n]*\$")


@dataclass
class Fence:
    """A fenced block. line: the line of the page where its body starts; start and end: its place in the text."""

    language: str
    option: str
    body: str
    line: int
    start: int
    end: int


@dataclass
class Report:
    """faults: each as `file:line: problem`; outdated: the number of these that the new text corrects; text: the page
    with the printed output; seconds: (line, seconds) of each fence that ran."""

    faults: list[str] = field(default_factory=list)
    outdated: int = 0
    text: str = ""
    seconds: list[tuple[int, float]] = field(default_factory=list)


def list_pages(names: list[str] | None = None) -> list[Path]:
    """The pages whose names start with one of `names`, or all: the chapters by number, then the guides."""
    guides = [FOLDER / "guides" / f"{name}.md" for name in GUIDES]
    pages = [*sorted(FOLDER.glob("[0-9][0-9]_*.md")), *guides]
    return [page for page in pages if page.name.startswith(tuple(names or [""]))]


def parse_fences(text: str) -> list[Fence]:
    return [
        Fence(
            found[1],
            found[2] or "",
            found[3],
            line_at(text, found.start()) + 1,
            found.start(),
            found.end(),
        )
        for found in FENCE.finditer(text)
    ]


def run(path: Path, pictures: Path | None = None) -> Report:
    """Run a page in this process, in the current folder. pictures: where its pictures are saved."""
    text = path.read_text(encoding="utf-8")
    name = (
        path.relative_to(FOLDER.parent).as_posix()
        if path.is_relative_to(FOLDER.parent)
        else path.name
    )
    report = Report()
    report.faults = [
        f"{name}:{line}: {problem}" for line, problem in _check_layout(text)
    ]
    session = types.ModuleType("page")
    sys.modules["page"] = session
    linecache.cache[str(path)] = (
        len(text),
        None,
        text.splitlines(keepends=True),
        str(path),
    )
    edits: list[tuple[int, int, str]] = []
    output = ""
    fences = parse_fences(text)
    for fence, after in itertools.zip_longest(fences, fences[1:]):
        if fence.language != "python":
            continue
        since = time.perf_counter()
        try:
            # The empty lines give every traceback the page's own line numbers.
            code = _compile("\n" * (fence.line - 1) + fence.body, str(path))
            printed = (
                _draw(code, session, fence.option, pictures)
                if fence.option
                else _print(code, session)
            )
        except (Exception, SystemExit) as error:
            lines = [
                f.lineno
                for f in traceback.extract_tb(error.__traceback__)
                if f.filename == str(path)
            ]
            line = lines[-1] if lines else getattr(error, "lineno", None) or fence.line
            report.faults.append(
                f"{name}:{line}: {''.join(traceback.format_exception_only(error)).strip()}"
            )
            break
        report.seconds.append((fence.line, time.perf_counter() - since))
        output += printed
        if (
            after
            and after.language == "text"
            and not text[fence.end : after.start].strip()
        ):
            if difference := find_difference(after.body, printed, after.option):
                report.outdated += 1
                report.faults.append(
                    f"{name}:{after.line + difference[0]}: {difference[1]}"
                )
                header = f"```text {after.option}".rstrip()
                edits.append(
                    (after.start, after.end, f"{header}\n{printed.strip(chr(10))}\n```")
                )
        elif printed.strip():
            report.outdated += 1
            report.faults.append(
                f"{name}:{fence.line}: prints {printed.splitlines()[0]!r}, but no text fence follows"
            )
            edits.append(
                (fence.end, fence.end, f"\n\n```text\n{printed.strip(chr(10))}\n```")
            )
    else:
        report.faults += [
            f"{name}:{line}: {number} in the prose is not a number that the page prints"
            for line, number in _unprinted_numbers(text, output)
        ]
    for start, end, new in reversed(edits):
        text = text[:start] + new + text[end:]
    report.text = text
    return report


def find_difference(
    shown: str, printed: str, option: str = ""
) -> tuple[int, str] | None:
    """The first line, from 0, in which the shown output differs from the printed one, and how. option: see above."""
    if option == "part":
        return _find_missing_line(shown, printed)
    lines = [text.strip("\n").split("\n") for text in (shown, printed)]
    for i in range(max(map(len, lines))):
        a, b = (text[i].rstrip() if i < len(text) else "" for text in lines)
        words = [NUMBER.sub("#", line).split() for line in (a, b)]
        numbers = zip(NUMBER.findall(a), NUMBER.findall(b), strict=False)
        if words[0] != words[1] or not (
            option == "any" or all(_is_close(*pair, option) for pair in numbers)
        ):
            return (
                i,
                f"the page shows a different output\n    shown    {a}\n    printed  {b}",
            )
    return None


def _find_missing_line(shown: str, printed: str) -> tuple[int, str] | None:
    """The first shown line, from 0, that is not printed after the lines before it."""
    rest = iter([NUMBER.sub("#", line).split() for line in printed.splitlines()])
    for i, line in enumerate(shown.splitlines()):
        if NUMBER.sub("#", line).split() not in rest:
            return i, f"the page shows a line that is not printed\n    {line}"
    return None


def _is_close(shown: str, printed: str, option: str) -> bool:
    a, b = (float(number.replace(",", "")) for number in (shown, printed))
    if not set(".e") & set(shown + printed):
        return a == b
    if option.startswith("rel="):
        return abs(a - b) <= float(option.removeprefix("rel=")) * abs(a)
    return abs(a - b) <= 1.001 * min(_unit(shown), _unit(printed))


def _unit(number: str) -> float:
    """One unit of the last printed digit: 0.01 for 3.14, 1e-6 for 1.5e-05."""
    mantissa, _, exponent = number.partition("e")
    return float(10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2])))


def _check_layout(text: str) -> Iterator[tuple[int, str]]:
    """Lines, and what is wrong in them apart from the output."""
    for found in STRAY_FENCE.finditer(_blank(FENCE, text)):
        yield (
            line_at(text, found.start(1)),
            f"{found[0].strip()} is not a fence that runs, nor the end of one",
        )
    for found in FRAGILE_FORMULA.finditer(_blank(FENCE, text)):
        yield (
            line_at(text, found.start()),
            f"GitHub removes the backslash of {found[1]}: use a math fence",
        )
    before = None
    for fence in parse_fences(text):
        if fence.language not in LANGUAGES:
            yield (
                fence.line - 1,
                f"unknown language {fence.language!r} of a fence; known: {', '.join(LANGUAGES)}",
            )
        if fence.language == "python":
            for i, code in enumerate(fence.body.splitlines()):
                if len(code) > WIDTH:
                    yield (
                        fence.line + i,
                        f"more than {WIDTH} characters of code, which the site cuts off",
                    )
            picture = PICTURE.match(text, fence.end)
            name = fence.option.removeprefix("picture=")
            files = [f"{name}_{shade}.png" for shade in SHADES]
            if name and not (picture and all(file in picture[0] for file in files)):
                problem = f"no <picture> with both shades follows {name}"
                yield fence.line - 1, problem
        elif fence.language == "text":
            if (
                not before
                or before.language != "python"
                or text[before.end : fence.start].strip()
            ):
                yield (
                    fence.line - 1,
                    "a text fence has to follow the code that prints it",
                )
            if not re.fullmatch(r"|any|part|rel=0\.\d+", fence.option):
                yield fence.line - 1, f"unknown option {fence.option} of a text fence"
        before = fence


def _compile(source: str, file: str) -> types.CodeType:
    """The code of a fence, which keeps the value of an expression at its end as `_`, as Python's prompt does."""
    tree = ast.parse(source, file)
    if tree.body and isinstance(last := tree.body[-1], ast.Expr):
        name = ast.copy_location(ast.Name("_", ast.Store()), last)
        tree.body[-1] = ast.copy_location(ast.Assign([name], last.value), last)
    return compile(tree, file, "exec")


def _print(code: types.CodeType, session: types.ModuleType) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(code, session.__dict__)
    return out.getvalue()


def _draw(
    code: types.CodeType, session: types.ModuleType, option: str, folder: Path | None
) -> str:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot
    from PIL import Image

    printed = ""
    for shade in SHADES:
        with pyplot.style.context(FOLDER / f"{shade}.mplstyle"):
            printed = _print(code, session)
            drawn = io.BytesIO()
            if hasattr(value := session.__dict__.pop("_", None), "_repr_png_"):
                drawn = io.BytesIO(value._repr_png_())
            elif pyplot.get_fignums():
                pyplot.gcf().savefig(drawn)
            else:
                raise RuntimeError("the code draws no picture")
            pyplot.close("all")
        file = f"{option.removeprefix('picture=')}_{shade}.png"
        if not folder and not (PICTURES / file).exists():
            raise FileNotFoundError(f"pictures/{file} is missing: --write draws it")
        if folder:  # 64 colours make the file three times smaller
            picture = Image.open(drawn).quantize(
                64, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE
            )
            picture.save(folder / file, optimize=True)
    return printed


def _unprinted_numbers(text: str, output: str) -> Iterator[tuple[int, str]]:
    printed = [abs(float(number.replace(",", ""))) for number in NUMBER.findall(output)]
    prose = _blank(NOT_PROSE, text)
    for found in NUMBER.finditer(prose):
        number = found[0]
        value = abs(float(number.replace(",", "")))
        if set(".,") & set(number) and not any(
            abs(value - other) <= 0.501 * _unit(number) for other in printed
        ):
            yield line_at(prose, found.start()), number


def _blank(pattern: re.Pattern[str], text: str) -> str:
    """Replaces what matches by spaces, so that places in the text stay the same."""
    return pattern.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), text)


def line_at(text: str, place: int) -> int:
    """The number of the line, from 1, that holds this place in the text."""
    return text.count("\n", 0, place) + 1
