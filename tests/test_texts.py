"""Paths and names are taken as typed, whatever Hydra and YAML would read."""

import io

import pytest
from omegaconf import OmegaConf

from rwkv_pl.compose import compose
from rwkv_pl.errors import UserError
from rwkv_pl.overrides import parse_overrides
from rwkv_pl.sweeps.jobs import Job, expand_grid, require_own_run
from rwkv_pl.terminal import quote_override
from rwkv_pl.texts import take_as_typed, yaml_texts_as_written


@pytest.mark.parametrize("text", ["2024_01_01", "1e5", "+5", "nan", "true", "1.50", "korpus-ä.txt", "语料 1.txt"])
@pytest.mark.parametrize(
    "key", ["data.path", "weights", "hydra.run.dir", "logger.wandb.name", "logger.tensorboard.version", "experiment"]
)
def test_path_or_name_is_taken_as_typed(key, text):
    (override,) = parse_overrides(take_as_typed([f"{key}={text}"]))
    assert override.value() == text
    assert take_as_typed(take_as_typed([f"{key}={text}"])) == take_as_typed([f"{key}={text}"])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("data.path=null", None),
        ("data.path='1e5'", "1e5"),
        ('data.path="a,2024_01_01,ä"', "a,2024_01_01,ä"),
        ("data.path=${seed}_1e5", "${seed}_1e5"),
        ("data.path=ä\\,b", "ä,b"),
        ("data.path=ä_${divide:1,${seed}}", "ä_${divide:1,${seed}}"),
        ("data.path=C:\\ä\\n", "C:\\ä\\n"),
        ("seed=1_000", 1000),
        ("optim.lr=1e5", 1e5),
        ("compile=true", True),
        ("data.split=[1,0,0]", [1, 0, 0]),
    ],
)
def test_everything_else_keeps_its_meaning(text, value):
    (override,) = parse_overrides(take_as_typed([text]))
    assert override.value() == value and type(override.value()) is type(value)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("2024_01_01,1e5,a,null", ["'2024_01_01'", "'1e5'", "a", "null"]),
        ("ä.txt,语.txt", ["'ä.txt'", "'语.txt'"]),
        ("choice(1e5, b)", ["'1e5'", "b"]),
        ("'1e5,2',\"a,1e5\"", ["'1e5,2'", '"a,1e5"']),
        ("range(1,3)", ["'1'", "'2'"]),
    ],
)
def test_sweep_syntax_keeps_its_meaning(text, values):
    (override,) = parse_overrides(take_as_typed([f"data.path={text}"]), sweep=True)
    assert list(expand_grid([override])) == [[f"data.path={value}"] for value in values]


@pytest.mark.parametrize("text", ["a\\b", "it's", "a\\", "\\'", "\\\\'\\\\", "a\\\\b", "$x, (y)", ""])
def test_quoted_text_is_read_unchanged(text):
    (override,) = parse_overrides([f"data.path={quote_override(text)}"])
    assert override.value() == text


FILE = """
defaults: [{data: 2024_01_01}]
data: {path: 2024_01_01, url: 0x1F, batch_size: 1_000, val_path: null, field: yes}
logger: {mine: {name: 007, project: "1", version: 3, group: 2025_01}}
hydra: {run: {dir: 12:30}, sweeper: {params: {data.path: 1e5, seed: 1_0}}}
callbacks: {mine: {path: 1_0, filename: on, duration: 12:00:00:00}}
weights: 1e5
seed: 1_0
"""


def test_yaml_file_is_read_as_written():
    with yaml_texts_as_written():
        read = OmegaConf.load(io.StringIO(FILE))
    assert read == {
        "defaults": [{"data": "2024_01_01"}],
        "data": {"path": "2024_01_01", "url": "0x1F", "batch_size": 1000, "val_path": None, "field": "yes"},
        "logger": {"mine": {"name": "007", "project": "1", "version": 3, "group": "2025_01"}},
        "hydra": {"run": {"dir": "12:30"}, "sweeper": {"params": {"data.path": "1e5", "seed": 10}}},
        "callbacks": {"mine": {"path": 10, "filename": "on", "duration": "12:00:00:00"}},
        "weights": "1e5",
        "seed": 10,
    }
    assert OmegaConf.load(io.StringIO("path: 1_0")) == {"path": 10}


def test_file_of_a_group_is_read_as_written(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "2024_01_01.yaml").write_text("defaults: [text]\npath: 1e5\nctx_len: 1_6\n")
    (data,) = take_as_typed(["data=2024_01_01"])
    config = compose([data], str(tmp_path))
    assert (config.data.path, config.data.ctx_len) == ("1e5", 16)


def test_job_of_a_sweep_of_an_earlier_version_is_recognised(tmp_path):
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "overrides.yaml").write_text("- data.path=2024_01\n- logger.wandb.name=1e5\n- seed=3\n")
    job = Job(take_as_typed(["data.path=2024_01", "logger.wandb.name=1e5", "seed=3"]), tmp_path)
    require_own_run(job)
    job.overrides[2] = "seed=4"
    with pytest.raises(UserError, match="holds another run, which differs in seed"):
        require_own_run(job)
