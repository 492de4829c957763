"""The command line has Hydra's flags."""

import argparse
import sys
from pathlib import Path

import pytest
from hydra._internal.utils import get_args_parser

from rwkv_pl.cli.arguments import HydraParser, parse_arguments
from rwkv_pl.errors import UserError
from rwkv_pl.overrides import parse_overrides
from rwkv_pl.texts import take_as_typed


def flags(parser: argparse.ArgumentParser) -> dict[str, tuple]:
    """By Hydra's name of an argument: its flags and options."""
    return {
        action.dest: (type(action), action.option_strings, action.nargs, action.const, action.default, action.type,
                      action.choices and list(action.choices), action.required)
        for action in parser._actions
    }  # fmt: skip


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="argparse refuses Hydra's own parser")
def test_flags_match_installed_hydra():
    ours = flags(HydraParser())
    del ours["explain"]
    assert ours == flags(get_args_parser())


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
        (["--frob"], "unrecognized arguments: --frob; settings are written key=value"),
        (["--explian"], "unrecognized arguments: --explian; did you mean --explain?"),
        (["--config-dri=x", "seed=1"], "did you mean --config-dir?"),
        (["--explain", "model", "optim"], "--explain takes one name, got model optim"),
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


@pytest.mark.parametrize("text", ["~/a b", "~", "'~/a,b'"])
def test_home_folder_is_expanded_in_a_path(text, monkeypatch):
    monkeypatch.setenv("HOME", "/h")
    monkeypatch.setenv("USERPROFILE", "/h")
    (override,) = parse_overrides(take_as_typed([f"data.path={text}"]))
    assert override.value() == str(Path(text.strip("'").replace("~", "/h")))


@pytest.mark.parametrize("text", ["data.path=~/a,~/b", "data.path=a~/b", "data.path=~user/a", "data.field=~/a", "-m"])
def test_home_folder_is_not_expanded_elsewhere(text):
    assert take_as_typed([text]) == [text]


def test_shell_completion_lists_choices(train, monkeypatch):
    monkeypatch.setenv("COMP_LINE", "rwkv-train seed=1 -m schedule=")
    assert train("-sc", "query=bash").out.split() == [
        f"schedule={name}" for name in ("constant", "cosine", "exponential", "linear", "wsd")
    ]


def rows(result) -> dict[str, str]:
    """The lines of settings that a command explains, by key."""
    lines = [line.strip() for line in result.out.splitlines() if line.startswith("  ")]
    return {key: " ".join(rest.split()) for key, _, rest in (line.partition(" ") for line in lines)}


def test_explain_has_every_setting_with_value_kind_and_comment(train):
    from rwkv_pl.compose import compose, to_plain_dict

    result = train("--explain")
    assert result.code == 0, result.err
    shown = rows(result)
    assert shown["seed"].startswith("42 a whole number of the initial weights")
    assert shown["data.path"].startswith("data/enwik8 a string or null ")
    assert shown["optim.lr"].startswith("1.0e-05 a number")
    assert shown["hydra.launcher.jobs"].startswith("1 a whole number")
    plain = to_plain_dict(compose([]))
    for group in ("data", "model", "optim", "schedule", "trainer"):
        assert {f"{group}.{key}" for key in plain[group]} <= shown.keys()


def test_explain_takes_a_group_a_choice_a_key_and_other_settings(train):
    group = train("--explain", "model")
    assert rows(group)["model.n_layer"].startswith("12 a whole number blocks")
    assert rows(group)["model=rwkv4_tiny"].startswith("2 x 192, 1.06 million parameters")
    assert rows(train("--explain", "optim=sgd"))["optim.momentum"].startswith("0.9 a number")
    assert rows(train("--explain", "data.ctx_len", "experiment=quickstart")) == {
        "data.ctx_len": "256 a whole number tokens of a sequence"
    }
    assert rows(train("--explain", "experiment=quickstart"))["trainer.max_steps"] == "3800"
    assert "relative to the folder where the run first starts" in " ".join(train("--explain", "data=text").out.split())


def test_explain_experiment_shows_its_group_choices(train):
    shown = rows(train("--explain", "experiment"))
    assert "data=stdlib model=rwkv4 optim=rwkv schedule=cosine" in shown["experiment=quickstart"]
    shown = rows(train("--explain", "experiment=search"))
    assert (shown["data"], shown["optim"], shown["trainer.max_steps"]) == ("stdlib", "rwkv", "300")
    assert shown["hydra.sweeper.params.model.n_embd"] == "128,192,256"


def test_explain_has_each_command_on_its_own_line_and_no_blanks_at_line_ends(train):
    lines = train("--explain", "experiment=debug").out.splitlines()
    assert "    rwkv-train experiment=debug" in lines
    assert [line for line in lines if line != line.rstrip()] == []


def test_explain_a_key_of_files_that_are_not_chosen(train):
    lines = train("--explain", "schedule.final_lr").out.splitlines()
    assert [line.split()[0] for line in lines] == [
        f"schedule={name}" for name in ("cosine", "exponential", "linear", "wsd")
    ]
    assert train("--explain", "hydra.job.name").out.split() == ["hydra.job.name", "train"]


def test_explain_survives_other_files_of_the_users_own(train, tmp_path):
    (tmp_path / "mine" / "optim").mkdir(parents=True)
    (tmp_path / "mine" / "optim" / "ams.yaml").write_text("defaults: [adamw]\namsgrad: true\n")
    shown = rows(train("--explain", "optim=ams", "--config-dir", "mine"))
    assert shown["optim.amsgrad"] == "true true or false" and "highest learning rate" in shown["optim.lr"]
    (tmp_path / "mine" / "optim" / "broken.yaml").write_text("lr: [\n")
    result = train("--explain", "seed", "--config-dir", "mine")
    assert (result.code, result.err.count("\n"), "broken.yaml is not YAML: " in result.err) == (2, 1, True), result.err


def test_explain_a_file_of_the_users_own(train, tmp_path):
    (tmp_path / "mine" / "optim").mkdir(parents=True)
    text = "# Mine.\n_target_: torch.optim.SGD\nlr: 0.1  # my rate\nweight_decay: 0.0\nlr_scale: null\n"
    (tmp_path / "mine" / "optim" / "mine.yaml").write_text(text)
    shown = rows(train("--explain", "optim=mine", "--config-dir", "mine"))
    assert (shown["optim.lr"], shown["optim=mine"]) == ("0.1 a number my rate", "Mine.")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--explain", "optim.lrr"], "optim.lrr is not a setting; did you mean lr?"),
        (["--explain", "optin"], "optin is not a setting; did you mean optim?"),
        (["--explain", "foo"], "logger, experiment, hydra/launcher, hydra/sweeper"),
        (["--explain", "data=../x"], "data takes the name of a file, not a path"),
        (["--explain", "data=nothing"], "data=nothing does not exist; available: binidx, enwik8, mix, stdlib, text"),
        (["--explain", "seed", "-m"], "--explain and --multirun exclude each other"),
    ],
)
def test_explain_refuses_what_does_not_exist_in_one_line(train, argv, message):
    result = train(*argv)
    assert (result.code, result.err.count("\n"), message in result.err) == (2, 1, True), result.err


def test_eval_explains_its_own_settings(evaluate):
    shown = rows(evaluate("--explain"))
    assert shown["warmup"].startswith("1024 a whole number carried:") and "data.path" in shown
    assert "seed" not in shown


def test_settings_page_is_up_to_date():
    from rwkv_pl.cli.explain import markdown

    page = Path(__file__).parents[2] / "docs" / "guides" / "settings.md"
    assert "```text\ndata=stdlib\nmodel=rwkv4\noptim=rwkv\nschedule=cosine\n" in markdown()
    assert page.read_text(encoding="utf-8") == markdown(), "python -m rwkv_pl.cli.explain > docs/guides/settings.md"
