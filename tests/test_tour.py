"""The pages of the tour print what they show, and the runner finds every kind of difference."""

import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import lightning.pytorch  # noqa: F401  (sets a variable of the environment and filters of warnings)
import nbformat
import pytest
import torch
from docs.notebook import to_notebook
from docs.page import FOLDER, GUIDES, NEEDS_KERNEL, PICTURES, find_difference, list_pages, run
from nbclient import NotebookClient

from rwkv_pl.ops.backend import current_kernel, load_all

CHAPTERS = list_pages(["0"])
SHOWN = '\n</details>\n\n<picture>\n<source srcset="pictures/a_dark.png"><img src="pictures/a_light.png">\n</picture>'
DRAW = "```python picture=a\nfrom matplotlib import pyplot\n"


def test_tour_has_nine_chapters():
    assert [page.name[:2] for page in CHAPTERS] == [f"0{i}" for i in range(1, 10)]


def global_state():
    return (
        Path.cwd(), dict(os.environ), torch.get_default_dtype(), torch.get_num_threads(), current_kernel(),
        torch.is_grad_enabled(), warnings.filters[:],
    )  # fmt: skip


# A page of torch and one of the operators, to show that this process stays as it was. make docs runs all of them.
PAGES = [page for page in CHAPTERS if page.stem.startswith(("01", "06"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page_prints_what_it_shows(page, tmp_path, monkeypatch):
    text = page.read_text(encoding="utf-8")
    # Building a kernel inside a page would count as the page's time.
    if (failure := load_all("cpu")) and NEEDS_KERNEL in text:
        pytest.skip(f"the page needs the compiled kernel: {failure}")
    monkeypatch.chdir(tmp_path)
    before = global_state()
    report = run(page, pictures=tmp_path)
    assert not report.faults, "\n" + "\n".join(report.faults)
    assert report.text == text
    assert global_state() == before
    drawn = {picture.name for picture in tmp_path.glob("*.png")}
    assert drawn == set(re.findall(r'"(?:\.\./)?pictures/([^"]*)"', text))
    assert drawn == {picture.name for picture in PICTURES.glob(f"{page.stem.partition('_')[0]}_*.png")}


@pytest.mark.parametrize("page", CHAPTERS, ids=lambda page: page.stem)
def test_chapter_ends_with_exercises_and_answers(page):
    exercises = page.read_text(encoding="utf-8").partition("\n## Now change this and see\n")[2]
    numbers = re.findall(r"^(\d)\. ", exercises, flags=re.MULTILINE)
    assert numbers in (["1", "2", "3"], ["1", "2", "3", "4"])
    answers = re.findall(r"<details><summary>Answer</summary>\n(.*?)\n</details>", exercises, flags=re.DOTALL)
    assert len(answers) == len(numbers)
    assert all("```python" in answer and "```text" in answer for answer in answers)


@pytest.mark.parametrize(
    ("page", "line", "words"),
    [
        ("```python\nprint(1)\nprint(0.25)\n```\n\n```text\n1\n0.35\n```\n", 8, "shown    0.35\n    printed  0.25"),
        ("```python\nprint(1)\n```\n\n```text\n1\n2\n```\n", 7, "shown    2\n    printed  "),
        ("```python\npass\n```\n\n```text\n1\n```\n", 6, "different output"),
        ("text\n\n```python\nx = 1\nraise ValueError('no')\n```\n", 5, "ValueError: no"),
        ("```python\ndef f():\n    return 1 / 0\n```\n\n```python\nf()\n```\n", 3, "ZeroDivisionError"),
        ("```python\nx = 1\nx = = 2\n```\n", 3, "SyntaxError"),
        ("```python\nprint('hello')\n```\n\nprose\n", 2, "prints 'hello', but no text fence follows"),
        ("```python\nprint(2)\n```\n\nprose\n\n```text\n2\n```\n", 7, "has to follow the code that prints it"),
        ("```python\nprint(2.5)\n```\n\n```text\n2.5\n```\n\nIt is 2.6, not `2.7`.\n", 9, "2.6 in the prose"),
        ("```python\nprint(2500)\n```\n\n```text\n2500\n```\n\nIt is 2,501.\n", 9, "2,501 in the prose"),
        ("```python\n" + "x = 1  # " + "-" * 90 + "\n```\n", 2, "more than 88 characters"),
        ("A formula $a\\,b$.\n", 1, "GitHub removes the backslash of \\,"),
        (DRAW + "```\n", 1, "no <picture> with both shades"),
        (DRAW + "```\n" + SHOWN, 2, "the code draws no picture"),
        (DRAW + "\npyplot.plot()\n```\n" + SHOWN, 2, "a_light.png is missing"),
        ("```python\nraise SystemExit\n```\n", 2, "SystemExit"),
        ("```py\n1 / 0\n```\n", 1, "unknown language 'py'"),
        ("```\n1\n```\n", 1, "unknown language ''"),
        ("````python\n1 / 0\n````\n", 1, "````python is not a fence that runs"),
        ("~~~python\n1 / 0\n~~~\n", 1, "~~~python is not a fence that runs"),
        ("  ```python\n  1 / 0\n  ```\n", 1, "```python is not a fence that runs"),
        ("```python\n1 / 0\n", 1, "```python is not a fence that runs"),
        ("```python picture=a text\n1 / 0\n```\n", 1, "is not a fence that runs"),
        ("If x < 3 it is 77.7, and y > 2.\n", 1, "77.7 in the prose"),
        ("```python\nprint(1)\n```\n\n```text some\n1\n```\n", 5, "unknown option some"),
        ("```python\nimport inspect\nfrom docs import page\n\nprint(inspect.getsource(page.line_at))\n```\n\n"
         "```text\ndef line_at(text):\n```\n", 9, "shown    def line_at(text):"),
    ],
)  # fmt: skip
def test_fault_is_reported_with_its_line(page, line, words, tmp_path):
    path = tmp_path / "page.md"
    path.write_text(page)
    faults = run(path).faults
    assert any(fault.startswith(f"page.md:{line}: ") and words in fault for fault in faults), faults


def test_output_and_pictures_are_written(tmp_path):
    path = tmp_path / "page.md"
    code = "```python picture=a\nfrom matplotlib import pyplot\n\npyplot.plot([1, 2])\n```\n\n"
    path.write_text("```python\nprint(1)\n```\n\n```text any\n2 x\n```\n\n```python\nprint(3)\n```\n\n" + code + SHOWN)
    report = run(path, tmp_path)
    assert len(report.faults) == 2
    assert "```text any\n1\n```" in report.text
    assert "print(3)\n```\n\n```text\n3\n```" in report.text
    light, dark = (tmp_path / f"a_{shade}.png" for shade in ("light", "dark"))
    assert light.read_bytes() != dark.read_bytes()
    path.write_text(report.text)
    assert run(path, tmp_path).faults == []


@pytest.mark.parametrize(
    ("shown", "printed", "option", "same"),
    [
        ("loss 0.35", "loss 0.36", "", True),
        ("loss 0.35", "loss 0.37", "", False),
        ("loss 0.3500", "loss 0.3502", "", False),
        ("loss 0.3", "loss 0.39", "", False),
        ("loss 1", "loss 1.9", "", False),
        ("1e-05", "2e-05", "", True),
        ("1,024 steps", "1,025 steps", "", False),
        ("1e-05 and nan", "1.1e-05 and nan", "", True),
        ("1e-05", "nan", "", False),
        ("loss 0.35", "loss 0.38", "rel=0.1", True),
        ("loss 0.35", "loss 0.39", "rel=0.1", False),
        ("155 steps", "156 steps", "rel=0.1", False),
        ("3.1 ms", "88.0 ms", "any", True),
        ("3.1 ms", "3.1 s", "any", False),
        ("True", "False", "any", False),
        ("loss 1\ndone", "head\nloss 2\nmore\ndone", "part", True),
        ("done\nloss 1", "loss 2\ndone", "part", False),
        ("gain 1", "loss 1", "part", False),
        ("a\nb", "a", "", False),
        ("x = -14.0", "x = 14.0", "", False),
        ("tensor([0.1966])", "tensor([0.1967])", "", True),
        ("a  b", "a b", "", True),
    ],
)
def test_numbers_are_compared_to_their_last_digit(shown, printed, option, same):
    assert (find_difference(shown, printed, option) is None) is same


def test_notebook_has_the_code_and_its_output():
    for page in list_pages():
        text = page.read_text(encoding="utf-8")
        notebook = json.loads(to_notebook(text))
        code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
        assert len(code) == text.count("\n```python")
        assert sum(bool(cell["outputs"]) for cell in code) == text.count("\n```text")
        assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
        source = "".join(line for cell in notebook["cells"] for line in cell["source"])
        assert not re.search(r"<details>|<picture>|```math", source)


@pytest.mark.slow
@pytest.mark.parametrize("name", GUIDES)
def test_notebook_of_a_guide_runs_in_jupyter(name, tmp_path):
    text = (FOLDER / "guides" / f"{name}.md").read_text(encoding="utf-8")
    notebook = nbformat.reads(to_notebook(text), 4)
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env=os.environ | {"OMP_NUM_THREADS": "1"})
    shown = {kind for cell in notebook.cells for output in cell.get("outputs", []) for kind in output.get("data", [])}
    assert shown >= ({"image/png", "text/html"} if name == "notebook" else {"image/png"})


def test_command_writes_notebooks_and_refuses_unknown_numbers(tmp_path):
    command = [sys.executable, "-m", "docs"]
    run = subprocess.run(
        [*command, "01", "--notebook", tmp_path], cwd=FOLDER.parent, capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == [str(tmp_path / "01_gradient_step.ipynb")]
    run = subprocess.run([*command, "12"], cwd=FOLDER.parent, capture_output=True, text=True)
    assert (run.returncode, "no page starts with 12" in run.stderr) == (2, True)


def test_new_output_is_counted_apart_from_other_faults(tmp_path):
    path = tmp_path / "page.md"
    path.write_text("```python\nprint(1)\n```\n\n```text\n2\n```\n\n```python\n1 / 0\n```\n")
    report = run(path)
    assert (len(report.faults), report.outdated) == (2, 1)
