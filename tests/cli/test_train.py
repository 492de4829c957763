"""rwkv-train as a user runs it, at a small size."""

import csv
import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command import SMALL, load_checkpoint
from versions import RUN_SETTINGS, VERSIONS

from rwkv_pl import RWKV7, RWKV7Config, load_weights
from rwkv_pl.config import Train
from rwkv_pl.runs.folder import create_run_dir
from rwkv_pl.runs.inputs import choose_val_check_interval
from rwkv_pl.runs.stored import StoredRun
from rwkv_pl.training import memory
from rwkv_pl.weights.metadata import Metadata


def read_metrics(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def read_column(run: Path, name: str) -> list[tuple[int, str]]:
    return [(int(row["step"]), row[name]) for row in read_metrics(run) if row[name]]


def test_run_folder_has_all_files(train, tmp_path):
    result = train(*SMALL, "trainer.log_every_n_steps=2", "trainer.val_check_interval=3")
    assert result.code == 0, result.err
    (run,) = (tmp_path / "outputs").glob("*/*")
    for name in (".hydra/config.yaml", "train.log", "vocab.json", "sample.txt", "checkpoints/best.ckpt"):
        assert (run / name).stat().st_size > 0, name
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list(run.glob("events.out.tfevents.*"))
    assert [step for step, _ in read_column(run, "train/loss")] == [1, 2, 4]
    assert [step for step, _ in read_column(run, "val/bits_per_byte")] == [3, 4]
    assert [int(row["tokens"]) for row in read_metrics(run)] == [int(row["step"]) * 6 * 16 for row in read_metrics(run)]
    last = load_checkpoint(run)
    assert last["global_step"] == 4
    assert last["rwkv_pl"]["config"] == {"vocab_size": 256, "n_layer": 2, "n_embd": 16, "dropout": 0.0}
    assert all(name.startswith("model.") for name in last["state_dict"])
    assert json.loads((run / "vocab.json").read_text())["kind"] == "byte"
    machine = next(line for line in result.out.splitlines() if line.startswith("machine"))
    assert machine.endswith(
        "FLOP/s in float32 matrix products, measured: MFU (model FLOPs utilisation) is the share of it"
    )
    for shown in ("corpus.txt", "validation split:", "this model", "gzip -9", "xz -9", str(run)):
        assert shown in result.out


def test_run_shorter_than_the_interval_ends_with_a_validation(train, tmp_path):
    assert train(*SMALL, "trainer.max_steps=2", "hydra.run.dir=run").code == 0
    assert [step for step, _ in read_column(tmp_path / "run", "val/bits_per_byte")] == [2]
    assert load_checkpoint(tmp_path / "run", "best.ckpt")["global_step"] == 2


def test_max_time_ends_the_run_normally(train, tmp_path):
    result = train(
        *SMALL, "trainer.max_steps=-1", "trainer.max_epochs=-1", "trainer.max_time=00:00:00:01", "hydra.run.dir=run"
    )
    assert result.code == 0, result.err
    run = tmp_path / "run"
    end = load_checkpoint(run)["global_step"]
    assert end > 1
    assert read_column(run, "val/bits_per_byte")[-1][0] == end


def test_last_checkpoint_is_written_every_n_steps_with_the_validation_score(train, tmp_path):
    """A validation is also due at step 4: last.ckpt must hold its score and the path of best.ckpt."""
    arguments = ("trainer.val_check_interval=4", "callbacks.last.every_n_train_steps=4", "hydra.run.dir=run")
    assert train(*SMALL, *arguments).code == 0
    run = tmp_path / "run"
    state = next(s for name, s in load_checkpoint(run)["callbacks"].items() if name.startswith("BestCheckpoint"))
    assert float(state["best_model_score"]) == pytest.approx(
        float(read_column(run, "val/bits_per_byte")[-1][1]), rel=1e-6
    )
    assert Path(state["best_model_path"]) == run / "checkpoints" / "best.ckpt"


def test_one_pass_is_the_default_length(train, tmp_path):
    result = train(*SMALL, "trainer.max_steps=-1", "data.batch_size=3000", "hydra.run.dir=run")
    assert result.code == 0, result.err
    n_train = int(len((tmp_path / "corpus.txt").read_bytes()) * 0.9)
    assert load_checkpoint(tmp_path / "run")["global_step"] == -(-(n_train // 16) // 3000)


def test_accumulation_does_not_change_the_result(train, tmp_path):
    assert train(*SMALL, "hydra.run.dir=1", "trainer.val_check_interval=2").code == 0
    for accumulate in (2, 3):
        arguments = (f"trainer.accumulate_grad_batches={accumulate}", "trainer.val_check_interval=2")
        assert train(*SMALL, *arguments, f"hydra.run.dir={accumulate}").code == 0
        for name in ("train/loss", "train/l2wrap", "train/grad_norm", "val/bits_per_byte", "lr"):
            whole, parts = read_column(tmp_path / "1", name), read_column(tmp_path / str(accumulate), name)
            assert [step for step, _ in whole] == [step for step, _ in parts], name
            # float32 sums in another order, and Adam divides by small numbers.
            assert [float(x) for _, x in parts] == pytest.approx([float(x) for _, x in whole], rel=1e-3), name


def test_validation_comes_ten_times_in_a_run_and_at_the_same_steps_in_a_longer_one(train, tmp_path):
    often = ("trainer.max_steps=25", "trainer.val_check_interval=auto", "trainer.accumulate_grad_batches=2")
    assert train(*SMALL, *often, "hydra.run.dir=run").code == 0
    validated = [3, 6, 9, 12, 15, 18, 21, 24, 25]
    assert [int(step) for step, _ in read_column(tmp_path / "run", "val/loss")] == validated
    assert train("resume=run", "trainer.max_steps=32").code == 0
    assert [int(step) for step, _ in read_column(tmp_path / "run", "val/loss")] == [*validated, 27, 30, 32]
    assert train("resume=run", "trainer.max_steps=36", "trainer.val_check_interval=2").code == 0
    assert [int(step) for step, _ in read_column(tmp_path / "run", "val/loss")][-3:] == [32, 34, 36]


def test_auto_validation_interval():
    def interval(max_steps: int, given: Any = "auto", resumed: int | None = None) -> int:
        metadata = Metadata("rwkv4", {}, None, None, val_check_interval=resumed)
        return choose_val_check_interval(Train(trainer={"val_check_interval": given}), max_steps, metadata)

    assert [interval(steps) for steps in (1, 10, 11, 49_990, 50_001, -1)] == [1, 1, 2, 4_999, 5_000, 5_000]
    assert interval(100, resumed=7) == 7 and interval(100, given=3, resumed=7) == 3


def test_resume_with_another_number_of_threads_says_that_bits_may_differ(train, tmp_path):
    assert train(*SMALL, "hydra.run.dir=run").code == 0
    assert "threads" not in train("resume=run", "trainer.max_steps=5").out
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    content = load_checkpoint(tmp_path / "run")
    before = content["rwkv_pl"]["threads"]
    content["rwkv_pl"]["threads"] = before + 3
    torch.save(content, path)
    result = train("resume=run", "trainer.max_steps=6")
    assert f"threads {before}, the run had {before + 3}: its bits may differ from now on" in result.out, result.err


RESUMED = (
    "model.dropout=0.2",
    "trainer.accumulate_grad_batches=3",
    "trainer.val_check_interval=4",
    "trainer.log_every_n_steps=2",
    "callbacks.last.every_n_train_steps=3",
)


@pytest.mark.parametrize("version", VERSIONS)
def test_resumed_run_ends_in_the_same_bits(train, tmp_path, monkeypatch, version):
    settings = (*SMALL, *RUN_SETTINGS[version], *RESUMED)
    assert train(*settings, "trainer.max_steps=12", "hydra.run.dir=whole").code == 0
    assert train(*settings, "trainer.max_steps=7", "hydra.run.dir=part").code == 0
    first = {path.name: path.read_bytes() for path in (tmp_path / "part" / ".hydra").iterdir()}
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    for max_steps in (10, 12):
        result = train("resume=../part", f"trainer.max_steps={max_steps}")
        assert result.code == 0, result.err
    whole, part = load_checkpoint(tmp_path / "whole"), load_checkpoint(tmp_path / "part")
    assert whole["state_dict"].keys() == part["state_dict"].keys()
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, part["state_dict"][name]), name
    moments = [c["optimizer_states"][0]["state"] for c in (whole, part)]
    for number, of_parameter in moments[0].items():
        for name, value in of_parameter.items():
            assert torch.equal(value, moments[1][number][name]), (number, name)
    for name in ("train/loss", "train/grad_norm", "lr"):
        assert read_column(tmp_path / "whole", name) == read_column(tmp_path / "part", name)
    validations = dict(read_column(tmp_path / "part", "val/bits_per_byte"))
    assert dict(read_column(tmp_path / "whole", "val/bits_per_byte")).items() <= validations.items()
    assert sorted(validations) == [4, 7, 8, 10, 12]
    for name, content in first.items():
        assert (tmp_path / "part" / ".hydra" / name).read_bytes() == content, f".hydra/{name} was touched"
    resumes = yaml.safe_load((tmp_path / "part" / ".hydra" / "resumes.yaml").read_text())
    assert [entry["set"] for entry in resumes] == [{"trainer.max_steps": 10}, {"trainer.max_steps": 12}]
    assert not list(elsewhere.iterdir())


def test_resume_uses_the_previous_checkpoint_if_last_is_corrupt(train, tmp_path):
    assert train(*SMALL, *RESUMED, "trainer.max_steps=12", "hydra.run.dir=whole").code == 0
    assert train(*SMALL, *RESUMED, "trainer.max_steps=7", "hydra.run.dir=part").code == 0
    last = tmp_path / "part" / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:-100])
    result = train("resume=part", "trainer.max_steps=12")
    assert result.code == 0
    assert "resuming from" in result.out
    whole, part = (load_checkpoint(tmp_path / name)["state_dict"] for name in ("whole", "part"))
    assert all(torch.equal(value, part[name]) for name, value in whole.items())


def test_max_steps_can_exceed_one_pass(train, tmp_path):
    assert train(*SMALL, "trainer.max_steps=5", "data.batch_size=3000", "hydra.run.dir=run").code == 0
    assert load_checkpoint(tmp_path / "run")["global_step"] == 5


def test_resume_refuses_max_steps_below_the_current_step(train, tmp_path):
    assert train(*SMALL, *RESUMED, "trainer.max_steps=7", "hydra.run.dir=run").code == 0
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    last.with_name("last.prev.ckpt").replace(last)  # as after a kill: step 6, not finished
    result = train("resume=run", "trainer.max_steps=2")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "already at step 6" in result.err
    result = train(f"resume={last}")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "is a file: give the run's folder" in result.err


def test_resume_of_a_finished_run_changes_nothing(train, run, tmp_path):
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    result = train("resume=run")
    assert result.code == 0
    assert "is finished, after 4 steps" in result.out
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_resume_applies_new_settings(train, tmp_path):
    assert train(*SMALL, "optim.weight_decay=0.1", "hydra.run.dir=run").code == 0
    later = ("trainer.max_steps=6", "optim.lr=3e-3", "optim.weight_decay=0.5", "trainer.log_every_n_steps=1")
    assert train("resume=run", *later).code == 0
    groups = load_checkpoint(tmp_path / "run")["optimizer_states"][0]["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0, 0.5}
    assert read_column(tmp_path / "run", "lr")[-2:] == [(5, "0.003"), (6, "0.003")]
    later = ("trainer.max_steps=8", "schedule=cosine", "schedule.final_lr=1e-3")
    assert train("resume=run", *later).code == 0
    assert read_column(tmp_path / "run", "lr")[-1] == (8, "0.001")


def test_lr_scale_sets_factors_by_parameter_name(train, tmp_path):
    small = [setting for setting in SMALL if setting != "optim=rwkv"]
    assert train(*small, "optim=adam", "optim.lr_scale={time_decay:7}", "hydra.run.dir=run").code == 0
    groups = load_checkpoint(tmp_path / "run")["optimizer_states"][0]["param_groups"]
    assert {group["name"]: group["lr_scale"] for group in groups if group["lr_scale"] != 1} == {"time_decay": 7}


def test_best_checkpoint_is_kept_if_the_run_folder_is_moved(train, tmp_path):
    every = ("trainer.val_check_interval=2", "hydra.run.dir=run")
    assert train(*SMALL, *every).code == 0
    (tmp_path / "run").rename(tmp_path / "moved")
    best = (tmp_path / "moved" / "checkpoints" / "best.ckpt").read_bytes()
    result = train("resume=moved", "trainer.max_steps=6", "optim.lr=30")
    assert result.code == 0, result.err
    assert (tmp_path / "moved" / "checkpoints" / "best.ckpt").read_bytes() == best
    assert not result.err


def test_run_stopped_by_max_time_is_finished(train, tmp_path):
    arguments = ("trainer.max_steps=-1", "trainer.max_epochs=-1", "trainer.max_time=00:00:00:01", "hydra.run.dir=run")
    assert train(*SMALL, *arguments).code == 0
    end = load_checkpoint(tmp_path / "run")["global_step"]
    result = train("resume=run")
    assert (result.code, "is finished" in result.out) == (0, True)
    assert not (tmp_path / "run" / ".hydra" / "resumes.yaml").exists()
    assert train("resume=run", "trainer.max_time=null", f"trainer.max_steps={end + 2}").code == 0
    assert load_checkpoint(tmp_path / "run")["global_step"] == end + 2


def test_diverged_model_is_reported(train, tmp_path):
    result = train(*SMALL, "trainer.max_steps=1", "optim.lr=1e30", "trainer.gradient_clip_val=null")
    assert result.code == 0, result.err
    assert "its training has diverged" in result.out


def test_resume_accepts_new_weight_decay_and_settings_missing_in_the_old_config(train, run, tmp_path):
    stored = tmp_path / "run" / ".hydra" / "config.yaml"
    lines = [line for line in stored.read_text().splitlines() if not line.startswith(("compile:", "loss_chunk_len:"))]
    stored.write_text("\n".join(lines))
    assert train("resume=run", "trainer.max_steps=6", "optim.weight_decay=0.5", "loss_chunk_len=4").code == 0
    groups = load_checkpoint(tmp_path / "run")["optimizer_states"][0]["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0, 0.5}


def test_resume_refuses_settings_that_contradict_the_checkpoint(train, run, tmp_path):
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    for change in (
        "seed=1",
        "data.batch_size=3",
        "data.ctx_len=8",
        "data.vocab=char",
        "model.n_layer=3",
        "model.n_embd=32",
        "weights=x",
    ):
        result = train("resume=run", "trainer.max_steps=6", change)
        assert (result.code, result.err.count("\n")) == (2, 1), change
        assert f"{change} contradicts the past" in result.err
        assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_resume_refuses_another_optimizer_and_unknown_keys(train, run, tmp_path):
    for change, message in {
        "optim=adam": "optim._target_=torch.optim.Adam contradicts the past",
        "optim.lrr=1": "did you mean lr?",
        "trainer.max_steps=abc": "must be a whole number",
        "schedule=nosuch": "schedule=nosuch does not exist",
    }.items():
        result = train("resume=run", change)
        assert (result.code, result.err.count("\n")) == (2, 1), change
        assert message in result.err


def test_resume_takes_a_config_dir(train, run, tmp_path):
    result = train("resume=run", "trainer.max_steps=6", f"--config-dir={tmp_path}")
    assert (result.code, result.err.count("\n")) == (2, 1)


def test_resume_refuses_another_corpus_but_accepts_a_moved_one(train, run, tmp_path):
    text = (tmp_path / "corpus.txt").read_bytes()
    (tmp_path / "other.txt").write_bytes(text.replace(b"a", b"b"))
    result = train("resume=run", "trainer.max_steps=5", "data.path=other.txt")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "is not the text that" in result.err
    (tmp_path / "corpus.txt").rename(tmp_path / "moved.txt")
    assert train("resume=run", "trainer.max_steps=5", "data.path=moved.txt").code == 0


def test_training_on_a_folder_with_validation_on_jsonl(train, tmp_path, monkeypatch):
    text = (tmp_path / "corpus.txt").read_text()
    home = tmp_path / "home"
    (home / "books" / "old").mkdir(parents=True)
    (home / "books" / "a.txt").write_text(text, newline="\n")
    (home / "books" / "old" / "b.txt.gz").write_bytes(gzip.compress(text[::-1].encode()))
    (home / "rows.jsonl").write_text(json.dumps({"body": text[:3000]}) + "\n" + json.dumps({"body": text[3000:6000]}))
    settings = ("data.path=books", "data.val_path=rows.jsonl", "data.field=body")
    with monkeypatch.context() as there:
        there.chdir(home)
        result = train(*SMALL, *settings, "hydra.run.dir=run")
    assert result.code == 0, result.err
    n_train = 2 * len(text) + 2
    assert f"{n_train + 6001:,} bytes, {n_train:,} / 6,001 / 0 tokens to train / validate / test" in result.out
    # Its file names are relative to the folder of the first start; a glob, and names typed now, to the current one.
    assert train("resume=home/run", "trainer.max_steps=5").code == 0
    (home / "rows.jsonl").rename(tmp_path / "moved.jsonl")
    (home / "books").rename(tmp_path / "moved")
    elsewhere = ("data.path='moved/**/*'", "data.val_path=moved.jsonl")
    assert train("resume=home/run", "trainer.max_steps=6", *elsewhere).code == 0
    assert load_checkpoint(home / "run")["global_step"] == 6
    assert train("resume=home/run", "trainer.max_steps=7").code == 0
    (tmp_path / "moved.jsonl").write_text((tmp_path / "moved.jsonl").read_text().replace("a", "b"))
    for change in ((), ("data.val_path=corpus.txt",), ("data.val_path=null",)):
        result = train("resume=home/run", "trainer.max_steps=8", *change)
        assert (result.code, result.err.count("\n")) == (2, 1)
        assert "data.path (with data.val_path, if set) is not the text that" in result.err


def test_weights_of_a_run_initialise_another(train, run, tmp_path):
    there = load_checkpoint(tmp_path / "run", "best.ckpt")["state_dict"]
    torch.save({name.removeprefix("model."): v.bfloat16() for name, v in there.items()}, tmp_path / "official.pth")
    for number, weights in enumerate(("run", "run/checkpoints/last.ckpt", "official.pth")):
        run = f"hydra.run.dir=next{number}"
        result = train(*SMALL, f"weights={weights}", run, "optim.lr=1e-9", "trainer.max_steps=1")
        assert result.code == 0, result.err
        here = load_checkpoint(tmp_path / f"next{number}")
        assert here["global_step"] == 1
        for name, value in there.items():
            # bfloat16 has 8 bits of mantissa.
            torch.testing.assert_close(here["state_dict"][name], value, rtol=2**-8, atol=1e-6)


def test_weights_of_other_ranks_start_a_run_that_resumes(train, tmp_path):
    """They are not settings: a run takes them from the weights, and its resume from the checkpoint."""
    sizes = {"n_ffn": 96, "rank_w": 8, "rank_a": 8, "rank_v": 4, "rank_g": 16}
    torch.save(RWKV7(RWKV7Config(256, 2, 64, **sizes)).state_dict(), "w.pth")
    result = train(*SMALL, *RUN_SETTINGS["rwkv7"], "weights=w.pth", "model.dropout=0.1", "hydra.run.dir=run")
    assert result.code == 0, result.err
    result = train("resume=run", "trainer.max_steps=6", "model.dropout=0.2")
    assert result.code == 0, result.err
    last = load_checkpoint(tmp_path / "run")
    assert last["global_step"] == 6
    assert sizes.items() <= last["rwkv_pl"]["config"].items() and last["rwkv_pl"]["config"]["dropout"] == 0.2
    result = train(*SMALL, "weights=w.pth", "hydra.run.dir=next")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "weights=w.pth holds a rwkv7 model, the config has rwkv4: give model=rwkv7 " in result.err
    assert result.err.endswith("model.n_layer=2 model.n_embd=64\n")


def test_weights_with_the_names_of_other_programs_are_loaded_and_named(train, run, tmp_path):
    state_dict = load_weights(run)[0].state_dict()
    torch.save({"model": {f"module.{name}": value for name, value in state_dict.items()}}, "w.pth")
    result = train(*SMALL, "weights=w.pth", "hydra.run.dir=wrapped")
    assert result.code == 0, result.err
    assert "official .pth, its entry model, names without module., rwkv4 2 x 16" in result.out
    torch.save(state_dict, "plain.pth")
    assert train(*SMALL, "weights=plain.pth", "hydra.run.dir=plain").code == 0
    loss, plain = (read_column(tmp_path / name, "train/loss") for name in ("wrapped", "plain"))
    assert loss == plain


def test_character_vocabulary(train, tmp_path):
    (tmp_path / "corpus.txt").write_text("Fünf größere Bären äßen Öl. " * 2000, encoding="utf-8")
    assert train(*SMALL, "data.vocab=char", "hydra.run.dir=run").code == 0
    model, vocabulary = load_weights(tmp_path / "run")
    assert vocabulary.characters == "Ößäöü"
    assert model.config.vocab_size == 256 + 5
    result = train(*SMALL, "weights=run", "hydra.run.dir=next")
    assert result.code == 2
    assert "was trained with data.vocab=char" in result.err


def test_starts_in_the_same_second_get_separate_folders(tmp_path):
    taken = [create_run_dir(tmp_path / "outputs" / "12-00-00", typed=False) for _ in range(3)]
    assert [folder.name for folder in taken] == ["12-00-00", "12-00-00-2", "12-00-00-3"]
    assert all(folder.is_dir() for folder in taken)


def test_user_experiment(train, tmp_path):
    mine = tmp_path / "my conf, (1)" / "experiment"
    mine.mkdir(parents=True)
    (mine / "mine.yaml").write_text("# @package _global_\nmodel:\n  n_embd: 24\nschedule:\n  warmup_steps: 2\n")
    where = f"--config-dir={mine.parent}"
    small = [setting for setting in SMALL if "n_embd" not in setting]
    assert train(where, *small, "experiment=mine", "hydra.run.dir=run").code == 0
    assert load_checkpoint(tmp_path / "run")["rwkv_pl"]["config"]["n_embd"] == 24
    assert train("resume=run", "trainer.max_steps=5", "schedule=cosine").code == 0
    (mine / "astray.yaml").write_text("model:\n  n_embd: 24\n")
    result = train(where, *SMALL, "experiment=astray")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "# @package _global_" in result.err
    (mine / "wrong.yaml").write_text("# @package _global_\nmodel:\n  n_layr: 24\n")
    result = train(where, *SMALL, "experiment=wrong")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "model.n_layr is not a setting; did you mean n_layer?" in result.err
    (mine / "broken.yaml").write_text("# @package _global_\nmodel: {n_layer: 24\n")
    result = train(where, *SMALL, "experiment=broken")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "broken.yaml" in result.err
    (mine / "kind.yaml").write_text("# @package _global_\ntrainer:\n  log_every_n_steps: abc\n")
    result = train(where, *SMALL, "experiment=kind")
    assert (result.code, result.err.count("\n")) == (2, 1)


def test_folder_names_with_special_characters(train, tmp_path):
    run = tmp_path / "run, (1) it's = 1"
    quoted = str(run).replace("'", "\\'")
    assert train(*SMALL, f"hydra.run.dir='{quoted}'").code == 0
    assert load_checkpoint(run)["global_step"] == 4
    assert train(f"resume='{quoted}'", "trainer.max_steps=5").code == 0
    assert load_checkpoint(run)["global_step"] == 5


def test_paths_and_names_that_read_as_numbers_or_are_not_ascii(train, evaluate, tmp_path):
    for name in ("1e5", "语料.txt"):
        (tmp_path / name).write_bytes((tmp_path / "corpus.txt").read_bytes())
    result = train(*SMALL, "data.path=1e5", "hydra.run.dir=2025_02_03")
    assert result.code == 0, result.err
    for steps, path in ((5, "语料.txt"), (6, "1e5")):
        assert train("resume=2025_02_03", f"trainer.max_steps={steps}", f"data.path={path}", "data.field=1e5").code == 0
        assert load_checkpoint(tmp_path / "2025_02_03")["global_step"] == steps
    data = StoredRun(tmp_path / "2025_02_03").config().data
    assert (data.path, data.field) == (str(tmp_path / "1e5"), "1e5")
    assert evaluate("weights=2025_02_03", "out=1_0", "protocol=windows").code == 0
    assert list((tmp_path / "1_0").glob("*.json"))


def test_names_in_a_config_folder_are_taken_as_written(train, tmp_path):
    experiment = tmp_path / "mine" / "experiment" / "2025_02.yaml"
    experiment.parent.mkdir(parents=True)
    experiment.write_text(
        "# @package _global_\ndata: {path: 1_0}\nhydra: {run: {dir: 1_1}}\ntrainer: {max_steps: 1_1}\n"
    )
    (tmp_path / "corpus.txt").rename(tmp_path / "1_0")
    settings = [text for text in SMALL if not text.startswith(("data.path", "trainer.max_steps"))]
    result = train("--config-dir=mine", "experiment=2025_02", *settings)
    assert result.code == 0, result.err
    assert load_checkpoint(tmp_path / "1_1")["global_step"] == 11
    assert train("resume=1_1", "trainer.max_steps=12", "schedule=cosine").code == 0


@pytest.mark.slow
def test_two_processes_share_the_batch(train, tmp_path):
    """Training on two devices equals training on one: DDP starts the command again, for the second."""
    arguments = [*SMALL, "trainer.log_every_n_steps=1", "trainer.limit_val_batches=1.0", "data.ctx_len=64"]
    assert train(*arguments, "hydra.run.dir=one").code == 0
    command = [str(Path(sys.executable).with_name("rwkv-train")), *arguments, "trainer=ddp", "trainer.devices=2"]
    done = subprocess.run([*command, "hydra.run.dir=two"], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    for name in ("train/loss", "train/grad_norm", "val/bits_per_byte"):
        one, two = read_column(tmp_path / "one", name), read_column(tmp_path / "two", name)
        assert [step for step, _ in one] == [step for step, _ in two]
        assert [float(x) for _, x in two] == pytest.approx([float(x) for _, x in one], rel=1e-3), name


@pytest.mark.parametrize("arguments", [["--help"], ["--cfg", "job"], ["--cfg", "job", "experiment=quickstart"]])
def test_help_and_config_import_no_torch(arguments, tmp_path):
    code = (
        "import sys; from rwkv_pl.cli.train import main\n"
        f"sys.argv = ['rwkv-train', *{arguments!r}]\n"
        "try: main()\nexcept SystemExit as e: assert not e.code\n"
        "assert 'torch' not in sys.modules and 'lightning' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "n_layer" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("compiled_kernel")  # the scan needs more memory
def test_auto_micro_batch_is_chosen_once_and_kept(train, tmp_path, monkeypatch):
    """auto uses as many micro-batches as memory requires; a resume uses the same number for any free memory."""

    monkeypatch.setattr(memory, "free_memory", lambda device: 39 * 10**6)
    auto = (*SMALL, "trainer.accumulate_grad_batches=auto", "data.ctx_len=64")
    assert train(*auto, "hydra.run.dir=run").code == 0
    found = load_checkpoint(tmp_path / "run")["rwkv_pl"]["accumulate"]
    assert found in (2, 3, 6)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert train("resume=run", "trainer.max_steps=6").code == 0
    assert load_checkpoint(tmp_path / "run")["rwkv_pl"]["accumulate"] == found
    assert train(*auto, "hydra.run.dir=roomy").code == 0
    assert load_checkpoint(tmp_path / "roomy")["rwkv_pl"]["accumulate"] == 1
    monkeypatch.setattr(memory, "free_memory", lambda device: 1000)
    result = train(*auto, "hydra.run.dir=none")
    assert (result.code, "not even one sequence fits in memory" in result.err) == (2, True), result.err
    assert not (tmp_path / "none").exists()


def test_partial_files_of_a_killed_start_are_ignored(train, tmp_path):
    (tmp_path / "run" / ".hydra").mkdir(parents=True)
    for name in ("vocab.json.partial", ".hydra/config.yaml.partial"):
        (tmp_path / "run" / name).touch()
    result = train(*SMALL, "hydra.run.dir=run")
    assert result.code == 0, result.err
    assert not list((tmp_path / "run").rglob("*.partial"))


def test_failed_start_leaves_an_existing_folder_unchanged(train, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "new/run"):
        result = train(*SMALL, "trainer.strategy=nonsense", f"hydra.run.dir={folder}")
        assert (result.code, result.err.count("\n")) == (2, 1), result.err
    assert not list((tmp_path / "empty").iterdir()) and not (tmp_path / "new").exists()
