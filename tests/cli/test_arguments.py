"""The command line has Hydra's flags."""

import argparse
import sys

import pytest
from hydra._internal.utils import get_args_parser

from rwkv_pl.cli.arguments import HydraParser, parse_arguments
from rwkv_pl.errors import UserError


def flags(parser: argparse.ArgumentParser) -> dict[str, tuple]:
    """By Hydra's name of an argument: its flags and options."""
    return {
        action.dest: (type(action), action.option_strings, action.nargs, action.const, action.default, action.type,
                      action.choices and list(action.choices), action.required)
        for action in parser._actions
    }  # fmt: skip


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="argparse refuses Hydra's own parser")
def test_flags_match_installed_hydra():
    assert flags(HydraParser()) == flags(get_args_parser())


def test_help_of_every_argument_formats():
    """Since Python 3.14, argparse formats the help when an argument is added."""
    parser = HydraParser()
    for action in parser._actions:
        assert isinstance(action.help, str)
    assert "--multirun" in parser.format_help()


def test_flags_and_settings_parse_in_any_order():
    args = parse_arguments(["optim.lr=1,2", "-m", "seed=1"])
    assert (args.multirun, args.overrides) == (True, ["optim.lr=1,2", "seed=1"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--frob"], "unrecognized arguments: --frob"),
        (["--cfg", "all", "-m"], "leave out -m"),
        (["--cfg", "everything"], "invalid choice"),
        (["-cn", "other"], "are not used"),
        (["--experimental-rerun", "x"], "resume=RUN"),
        (["-m", "-r"], "--run and --multirun exclude each other"),
        (["--cfg", "job", "--info"], "--cfg and --info exclude each other"),
        (["-sc"], "install=SHELL"),
        (["-sc", "install=foo"], "install=SHELL"),
        (["-sc", "query=fish"], "COMP_LINE"),
    ],
)
def test_unused_flag_gives_one_line_error(argv, message, monkeypatch):
    monkeypatch.delenv("COMP_LINE", raising=False)
    with pytest.raises(UserError, match=message) as refused:
        parse_arguments(argv)
    assert "\n" not in str(refused.value)


def test_shell_completion_lists_choices(train, monkeypatch):
    monkeypatch.setenv("COMP_LINE", "rwkv-train seed=1 -m schedule=")
    assert train("-sc", "query=bash").out.split() == [
        f"schedule={name}" for name in ("constant", "cosine", "exponential", "linear", "wsd")
    ]
