"""Every rwkv-train line of the README is a command whose settings hold."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from rwkv_pl import RWKV4, RWKV4Config
from rwkv_pl.cli import generate
from rwkv_pl.compose import check, compose, parse_overrides, to_dataclass, to_plain_dict
from rwkv_pl.config import Eval
from rwkv_pl.data.vocabulary import Vocabulary
from rwkv_pl.errors import UserError

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
LINES = re.findall(r"^(?:\.venv\\Scripts\\)?(rwkv-train .*?)(?: *#.*)?$", README, flags=re.MULTILINE)


def test_there_are_commands():
    assert len(LINES) > 6


@pytest.mark.parametrize("line", LINES)
def test_a_readme_command(line):
    arguments = [a for a in shlex.split(line)[1:] if not a.startswith(("--config-dir", "mine", "experiment=big"))]
    sweep = "-m" in arguments
    overrides = [a for a in arguments if a != "-m"]
    parsed = parse_overrides(overrides, sweep)
    values = [o for o in parsed if o.key_or_group not in ("resume", "weights")]
    choices = [str(o.input_line) for o in values if "/" in o.key_or_group]
    plain = [str(o.input_line) for o in values if not o.is_sweep_override()]
    check(compose(plain))
    for override in values:
        if override.is_sweep_override() and not override.is_interval_sweep():
            assert sweep
            check(compose(choices + [f"{override.key_or_group}={v}" for v in override.sweep_string_iterator()]))


def test_the_other_commands_of_the_readme(monkeypatch):
    lines = re.findall(r"^(rwkv-(?:generate|eval) .*?)(?:<.*?)?(?: *#.*)?$", README, flags=re.MULTILINE)
    assert len(lines) > 3
    for name, *arguments in map(shlex.split, lines):
        if name == "rwkv-eval":
            to_dataclass(to_plain_dict(compose(arguments, name="eval")), Eval)
        else:
            monkeypatch.setattr("sys.argv", [name, *arguments])
            assert generate.parse().weights


def test_the_mistake_that_the_readme_shows():
    told = re.search(r"^rwkv-train: (.*)$", README, flags=re.MULTILINE)[1]
    with pytest.raises(UserError, match=re.escape(told)):
        compose(["model.n_layr=3"])


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (code,) = (code for code in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL) if "load_weights" in code)
    model = RWKV4(RWKV4Config(vocab_size=256, n_layer=1, n_embd=8))
    torch.save(model.state_dict(), tmp_path / "small.pth")
    code = code.replace("n_layer=12, n_embd=512", "n_layer=1, n_embd=8")
    code = code.replace('load_weights("outputs/DATE/TIME")', '(load_weights("small.pth")[0], Vocabulary("byte"))')
    exec(compile(code, "README.md", "exec"), {"Vocabulary": Vocabulary})
    assert len(capsys.readouterr().out) > 10
