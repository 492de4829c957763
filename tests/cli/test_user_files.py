"""A file in --config-dir replaces the built-in one of that name, and a line says so."""

import pytest
import yaml
from command import SMALL

MODEL = "name: rwkv4\nn_layer: 3\nn_embd: 24\ndropout: 0.0\n"


@pytest.fixture
def mine(tmp_path):
    """Write a file below mine/; return the line that a command prints for it."""

    def write(name: str, text: str) -> str:
        path = tmp_path / "mine" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return f"{path} replaces the built-in file of that name\n"

    return write


def test_file_of_the_user_replaces_the_built_in_one(train, mine):
    line = mine("model/rwkv4_tiny", MODEL)
    result = train("--config-dir", "mine", "model=rwkv4_tiny", "--cfg", "job")
    assert yaml.safe_load(result.out)["model"] == yaml.safe_load(MODEL)
    assert (result.code, result.err) == (0, line)
    shown = train("--config-dir", "mine", "model=rwkv4_tiny", "--explain", "model.n_layer")
    assert shown.out.split()[:2] == ["model.n_layer", "3"]
    assert train("--config-dir", "mine", "model=rwkv4_mini", "--cfg", "job").err == ""


def test_default_choice_of_the_user_is_used_by_a_run_and_its_resume(train, mine, tmp_path):
    settings = [setting for setting in SMALL if not setting.startswith(("model", "optim"))]
    lines = {mine("model/rwkv4", MODEL), mine("optim/adam", "_target_: torch.optim.Adam\nlr: 0.5\n")}
    result = train("--config-dir", "mine", *settings, "hydra.run.dir=run")
    assert set(result.err.splitlines(keepends=True)) == lines
    assert "3 x 24" in result.out and "lr 0.5" in result.out
    assert train("resume=run", "trainer.max_steps=5", "schedule=linear").code == 0
    (resumed,) = yaml.safe_load((tmp_path / "run" / ".hydra" / "resumes.yaml").read_text())
    assert {key.split(".")[0] for key in resumed["set"]} == {"schedule", "trainer"}


@pytest.mark.parametrize("more", [(), ("-m", "seed=1,2")])
def test_file_of_the_user_is_checked(train, mine, more):
    mine("schedule/cosine", "name: cosine\nwarmup_steps: -1\ndecay_steps: null\nfinal_lr: 0.0\n")
    result = train("--config-dir", "mine", *SMALL, "schedule=cosine", *more)
    assert "schedule.warmup_steps must be at least 0" in result.err


def test_file_of_the_user_replaces_the_built_in_one_in_an_evaluation(evaluate, mine):
    line = mine("data/text", "name: text\npath: book.txt\nctx_len: 7\n")
    result = evaluate("--config-dir", "mine", "weights=x", "data=text", "--cfg", "job")
    assert (yaml.safe_load(result.out)["data"]["ctx_len"], result.err) == (7, line)


def test_main_file_of_the_user_is_not_read_and_a_line_says_so(train, mine, tmp_path):
    mine("train", "seed: 7\n")
    result = train("--config-dir", "mine", "--cfg", "job")
    assert yaml.safe_load(result.out)["seed"] == 42
    assert result.err == f"{tmp_path / 'mine' / 'train.yaml'} is not read: write its settings into an experiment\n"


def test_files_that_include_each_other_give_one_line(train, mine):
    mine("model/rwkv4_tiny", "defaults: [rwkv4_tiny]\nn_layer: 3\n")
    for more in (["hydra.run.dir=run"], ["--cfg", "job"], ["-m", "seed=1,2"]):
        result = train("--config-dir", "mine", *SMALL, "model=rwkv4_tiny", *more)
        assert result.code == 2
        assert result.err.endswith("rwkv-train: a file of --config-dir includes itself in its defaults\n")


def test_typed_setting_that_the_users_file_leaves_out_is_named(train, mine):
    mine("trainer/default", "max_steps: 7\n")
    result = train("--config-dir", "mine", *SMALL)
    assert "trainer.accelerator is not in the chosen file: add it there" in result.err
