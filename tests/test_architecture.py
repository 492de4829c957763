"""Imports between packages go in one direction; every package may import the leaves."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"
LEAVES = {"errors", "files", "checks", "config", "limits", "terminal", "environment", "windows"}
CONFIG = {"compose", "overrides", "user_files"}
MAY_IMPORT = {
    **{leaf: {"errors", "checks"} for leaf in LEAVES},
    "targets": set(),
    "texts": set(),
    "overrides": set(),
    "user_files": set(),
    "compose": {"overrides", "user_files", "targets", "texts"},
    "ops": set(),
    "model": {"ops"},
    "data": set(),
    "weights": {"model", "data"},
    "inference": {"model", "ops", "weights"},
    "training": {"targets", "ops", "model", "inference", "weights"},
    "runs": {*CONFIG, "targets", "texts", "data", "ops", "model", "weights", "inference", "training"},
    "sweeps": {*CONFIG, "texts", "data", "runs", "training"},
    "hydra_plugins": {"runs", "sweeps"},
    "cli": {
        *CONFIG,
        "texts",
        "data",
        "ops",
        "model",
        "weights",
        "inference",
        "training",
        "runs",
        "sweeps",
        "hydra_plugins",
    },
}
FILES = sorted(SOURCE.rglob("*.py"))


def package_of(module: str) -> str:
    """The first part of a module's name below rwkv_pl; hydra_plugins counts as one package."""
    parts = module.split(".")
    return parts[0] if parts[0] == "hydra_plugins" or len(parts) == 1 else parts[1]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(SOURCE).as_posix())
def test_packages_import_only_allowed_packages(file):
    here = package_of(".".join(file.relative_to(SOURCE).with_suffix("").parts))
    if here == "__init__":
        return
    allowed = {here} | MAY_IMPORT[here] | (set() if here in LEAVES else LEAVES)
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        modules = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are written in full"
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        for module in modules:
            if module.startswith(("rwkv_pl.", "hydra_plugins.")):
                assert package_of(module) in allowed, f"{file}:{node.lineno} imports {module}"
                if (here, package_of(module)) == ("weights", "data"):
                    assert module.startswith("rwkv_pl.data.vocabulary."), f"{file}:{node.lineno} imports {module}"


def test_no_module_imports_one_that_imports_it():
    """Also inside functions: a circle of imports is two files that can only be read together."""
    names = {".".join(file.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): file for file in FILES}
    imports: dict[str, set[str]] = {}
    for name, file in names.items():
        nodes = [node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if type(node) is ast.ImportFrom]
        found = [(str(node.module), f"{node.module}.{alias.name}") for node in nodes for alias in node.names]
        imports[name] = {inside if inside in names else module for module, inside in found} & names.keys()
    left = dict(imports)
    while free := [name for name, needs in left.items() if not needs & left.keys()]:
        for name in free:
            del left[name]
    assert not left, f"imports in a circle, or of one: {sorted(left)}"
