"""The README and the guides are correct: commands parse, settings exist, code runs, links have targets."""

import ast
import copy
import functools
import importlib
import importlib.util
import itertools
import re
import shlex
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from benchmarks.__main__ import NAMES, OTHER_NAMES
from omegaconf import DictConfig, OmegaConf

from rwkv_pl.cli import convert, doctor, generate, report
from rwkv_pl.cli.arguments import parse_arguments
from rwkv_pl.compose import check_config, compose, to_dataclass, to_plain_dict
from rwkv_pl.config import GROUPS, Eval, corpus_defaults
from rwkv_pl.errors import UserError
from rwkv_pl.overrides import is_group_choice, parse_overrides, require_key  # fmt: skip

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in
         (README, *sorted((ROOT / "docs" / "guides").glob("*.md")))}  # fmt: skip
TOUR = {
    page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").glob("*.md"))
}
GENERATED = {"docs/guides/settings.md"}
ANY_PAGE = "\n".join(PAGES.values())

# Commands that use argparse.
PARSERS = {"rwkv-convert": convert, "rwkv-doctor": doctor, "rwkv-generate": generate, "rwkv-report": report}
# Programs of other packages. An unknown program fails the test, so that a misspelt name is found.
FOREIGN = {"source", "tensorboard", "torchrun", "py", "python3", "eval", "["}
# Prefixes of a command.
BEFORE = {"srun", "then", "else", "if", "fi", "export"}


def blocks(text: str, *languages: str) -> list[str]:
    return re.findall(rf"^```(?:{'|'.join(languages)})\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def prose(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[list[str]]:
    """The words of every command in shell blocks, and of rwkv_pl's commands in `code` within a sentence."""
    inline = re.findall(r"`((?:rwkv-\w+|make|pip install|python -m|pytest) [^`\n]+)`", prose(text))
    lines = "\n".join([*blocks(text, "bash", "bat"), *inline]).replace("\\\n", " ").replace(".venv\\Scripts\\", "")
    found = []
    for line in lines.splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if word in (";", "|", "&&"):
                found.append(words)
                words = []
            elif words or not (word in BEFORE or re.match(r"[A-Z_]+=", word)):
                words.append(word.removeprefix(".venv/bin/"))
    return [words[: words.index("<")] if "<" in words else words for words in found if words]


COMMANDS = list(dict.fromkeys(tuple(words) for text in (PAGES | TOUR).values() for words in commands(text)))


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """Change to a folder with the pages' files, whose first comment is their name, such as `# mine/optim/lion.yaml`."""
    for text in blocks(ANY_PAGE, "python", "yaml"):
        if name := re.match(r"(?:# @package _global_\n)?# ([\w/]+\.(?:py|yaml))\n", text):
            path = tmp_path / name[1]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("RWKV_PL_CONFIG", str(tmp_path / "user"))
    return tmp_path


def test_commands_are_found_in_pages():
    ours = {"make", "pip", "python", "pytest", *PARSERS, "rwkv-eval", "rwkv-train"}
    assert {words[0] for words in COMMANDS} == ours | FOREIGN
    assert len(COMMANDS) > 50


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_documented_command_parses(words, mine, monkeypatch):
    name, *arguments = words
    if name in ("rwkv-train", "rwkv-eval"):
        check_overrides(name, arguments)
    elif name in PARSERS:
        check_arguments(PARSERS[name], arguments, monkeypatch)
    elif name == "make":
        check_make(arguments)
    elif name == "pip":
        check_pip(arguments)
    elif words[:3] == ("python", "-m", "benchmarks") and arguments[2:]:
        assert arguments[2] in (*NAMES, *OTHER_NAMES)
        check_arguments(importlib.import_module(f"benchmarks.{arguments[2]}"), arguments[3:], monkeypatch)
    elif words[:2] == ("python", "-m"):
        assert find_spec(arguments[1])
    elif name == "pytest":
        assert all(Path(ROOT, word).exists() for word in arguments if word.startswith("tests"))
    else:
        assert name in FOREIGN


def check_overrides(name: str, arguments: list[str]) -> None:
    args = parse_arguments(arguments)
    if args.help or args.shell_completion:
        return
    overrides = parse_overrides(args.overrides, sweep=args.multirun or name == "rwkv-eval")
    values = [o for o in overrides if o.key_or_group != "resume"]
    fixed = [o for o in values if not o.is_sweep_override()]
    if len(values) < len(overrides) and any(o.key_or_group.startswith("hydra.sweeper.") for o in values):
        fixed += parse_overrides(["hydra/sweeper=optuna"])  # stored by the sweep
    swept = [o for o in values if o.is_sweep_override() and not o.is_interval_sweep()]
    jobs = itertools.zip_longest(*([f"{o.key_or_group}={v}" for v in o.sweep_string_iterator()] for o in swept))
    for job in list(jobs) or [()]:
        settings = [*fixed, *parse_overrides([text for text in job if text])]
        choices = tuple(str(o.input_line) for o in settings if is_group_choice(o))
        config = copy.deepcopy(composed(choices, args.config_dir, name.removeprefix("rwkv-")))
        for override in settings:
            if not is_group_choice(override):
                require_key(override.key_or_group, config)
                OmegaConf.update(config, override.key_or_group, override.value())
        if name == "rwkv-eval":
            to_dataclass(to_plain_dict(config), Eval)
        else:
            check_config(config, [o for o in fixed if o.key_or_group == "plugins"], args.config_dir)


@functools.cache
def composed(choices: tuple[str, ...], config_dir: str | None, name: str) -> DictConfig:
    """Compose once per choice of files, because it is slow; values are set in a copy."""
    return compose(choices, config_dir, name)


class _Parsed(BaseException):
    pass


def check_arguments(module: ModuleType, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Start the command, and stop it after its parser has read the arguments."""

    def parse(parser, *_):
        assert parser.parse_known_args(arguments)[1] == []
        raise _Parsed

    monkeypatch.setattr("sys.argv", [module.__name__, *arguments])
    if module is generate:
        assert generate.parse_arguments().weights
        return
    monkeypatch.setattr("argparse.ArgumentParser.parse_args", parse)
    for variable in ("GOMP_SPINCOUNT", "HYDRA_FULL_ERROR"):
        monkeypatch.setenv(variable, "1")  # set by a command
    with pytest.raises(_Parsed):
        module.main()


def check_make(arguments: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in arguments:
        assert re.search(rf"^{target.partition('=')[0]} *(?:\?=|:)", makefile, flags=re.MULTILINE), target


def check_pip(arguments: list[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in arguments:
        for extra in re.findall(r"\.\[(.*)\]", word):
            assert set(extra.split(",")) <= extras.keys()


def test_settings_in_text_exist():
    known = {key for group in GROUPS for path in (ROOT / "conf" / group).glob("**/*.yaml")
             for key in keys(yaml.safe_load(path.read_text()), group)}  # fmt: skip
    known |= {f"data.corpora.{name}.{key}" for name in ("code", "books") for key in ("share", *corpus_defaults("text"))}
    for key in re.findall(rf"`((?:{'|'.join(GROUPS)})\.[\w.]+)(?:=[^`]*)?`", prose(ANY_PAGE)):
        assert key in known, key


def keys(node: object, prefix: str) -> list[str]:
    if not isinstance(node, dict):
        return []
    below = {f"{prefix}.{key}".lstrip("."): value for key, value in node.items()}
    return [*below, *(inner for key, value in below.items() for inner in keys(value, key))]


def test_readme_error_example_is_the_real_message():
    shown = re.search(r"^rwkv-train: (.*)$", PAGES["README.md"], flags=re.MULTILINE)[1]
    with pytest.raises(UserError, match=re.escape(shown)):
        compose(["model.n_layr=3"])


@pytest.mark.parametrize("code", blocks(ANY_PAGE, "python"), ids=lambda code: code.splitlines()[0])
def test_documented_python_compiles_and_imports_resolve(code):
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            assert all(find_spec(name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module.startswith("rwkv_pl"):
            assert all(hasattr(importlib.import_module(node.module), name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert find_spec(node.module)


def test_documented_dotted_names_exist():
    for module, name in re.findall(r"`(rwkv_pl[\w.]*)\.(\w+)`", "\n".join((PAGES | TOUR).values())):
        found = importlib.import_module(module)
        is_module = hasattr(found, "__path__") and importlib.util.find_spec(f"{module}.{name}")
        assert is_module or hasattr(found, name), f"{module}.{name}"


def python_block(part: str) -> str:
    (code,) = (code for code in blocks(ANY_PAGE, "python") if part in code)
    return code


def test_readme_python_runs(mine, capsys):
    Path("text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    brief = ["data=text", "data.path=text.txt", "data.ctx_len=16", "model.n_layer=1", "model.n_embd=8"]
    brief += ["trainer.max_steps=2", "trainer.accelerator=cpu"]
    code = python_block("load_weights(run.folder)").replace('"experiment=quickstart"', f"*{brief}")
    exec(compile(code, "README.md", "exec"), {})
    assert "step 2/2  validation" in (printed := capsys.readouterr().out)
    assert "\ndef " in printed


def test_optimizer_of_the_plugin_guide_reduces_the_loss(mine):
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = importlib.import_module("lion").Lion([parameter], lr=0.1, scale=2.0)
    sys.modules.pop("lion")
    (parameter**2).sum().backward()
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), torch.full((3,), 0.8))


@pytest.mark.parametrize("page", PAGES | TOUR)
def test_links_and_pictures_have_targets(page):
    text = (PAGES | TOUR)[page]
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(text)) + re.findall(r'(?:src|srcset)="([^"]+)"', prose(text)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, target


@pytest.mark.parametrize("page", PAGES)
def test_line_and_readme_lengths_are_limited(page):
    if page not in GENERATED:
        assert [line for line in PAGES[page].splitlines() if len(line) > 120] == []
    assert page != "README.md" or PAGES[page].count("\n") <= 150


def test_table_of_files_that_a_version_touches_is_complete():
    """In CONTRIBUTING.md, with RWKV-7 as the example."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.partition("## What a new version of RWKV touches")[2].partition("\n## ")[0]
    cells = re.findall(r"^\| (`.*?`) \|", section, flags=re.MULTILINE)
    listed = [path.replace("wkvN", "wkv7") for cell in cells for path in re.findall(r"`(.*?)`", cell)]
    folders = ("src", "conf", "cuda", "benchmarks")
    kinds = (".py", ".yaml", ".md", ".h", ".cpp", ".cu", ".cuh")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in kinds]
    naming = [path for path in files if "wkv7" in path.name or "wkv7" in path.read_text(encoding="utf-8")]
    assert not [path for path in naming if not any(path.match(pattern) for pattern in listed)]
    for pattern in listed:
        found = naming if pattern.startswith(folders) else ROOT.glob(pattern)
        assert any(path.match(pattern) for path in found), pattern
