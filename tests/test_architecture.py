"""Imports point one way: cli -> training -> inference -> weights -> model -> ops; the leaves serve all."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "rwkv_pl"
LEAVES = {"config", "files", "limits"}
MAY_IMPORT = {
    "config": set(),
    "files": set(),
    "limits": set(),
    "ops": set(),
    "model": {"ops"},
    "data": set(),
    "weights": {"model", "data"},
    "inference": {"model", "ops", "weights"},
    "training": {"ops", "model", "inference", "weights"},
    "cli": {"data", "model", "ops", "training", "inference", "weights"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def room(path: str) -> str:
    return path.removesuffix(".py").split("/")[0]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_one_way(file):
    here = room(file.relative_to(PACKAGE).as_posix())
    if here == "__init__":
        return
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        modules = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are written in full"
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        for module in modules:
            if module.startswith("rwkv_pl."):
                there = module.split(".")[1]
                assert there in {here, *LEAVES} | MAY_IMPORT[here], f"{file}:{node.lineno} imports {module}"
                if (here, there) == ("weights", "data"):
                    assert module.startswith("rwkv_pl.data.vocabulary."), f"{file}:{node.lineno} imports {module}"
    assert MAY_IMPORT.keys() >= {here}
