"""Turn a page of the tour into a Jupyter notebook."""

import json
import re
from typing import Any

from docs.page import PICTURE, parse_fences

MATH = re.compile(r"^```math\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


def to_notebook(page: str) -> str:
    """The page as JSON in nbformat 4.5. The text fence after a Python fence becomes the output of its cell."""
    cells: list[dict[str, Any]] = []

    def add(kind: str, source: str, **more: object) -> None:
        # Jupyter writes formulas with $$. Running a cell draws its picture.
        source = PICTURE.sub("", MATH.sub(r"$$\n\1$$", source))
        source = re.sub(r"<details>.*?</summary>|</details>", "", source).strip("\n")
        if source.strip():
            lines = source.splitlines(keepends=True)
            cells.append(
                {
                    "cell_type": kind,
                    "id": f"cell-{len(cells)}",
                    "metadata": {},
                    "source": lines,
                    **more,
                }
            )

    done = 0
    for fence in parse_fences(page):
        if fence.language == "python":
            add("markdown", page[done : fence.start])
            add("code", fence.body, execution_count=None, outputs=[])
        elif fence.language == "text":
            lines = fence.body.splitlines(keepends=True)
            cells[-1]["outputs"] = [
                {"output_type": "stream", "name": "stdout", "text": lines}
            ]
        else:
            continue
        done = fence.end
    add("markdown", page[done:])
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = {
        "cells": cells,
        "metadata": {"kernelspec": kernel},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
