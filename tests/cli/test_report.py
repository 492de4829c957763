"""rwkv-report: many runs as a table, a file and a picture."""

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rwkv_pl.cli import report as command
from rwkv_pl.runs.folder import locked
from rwkv_pl.runs.outcome import write_result
from rwkv_pl.sweeps import report
from rwkv_pl.training.curve import COLUMNS


def make_run_folder(folder: Path, bits: list[float], *, status: str | None = "finished", **settings: object) -> Path:
    """Write a run folder like a real one: one row per value in `bits`, 1,000 tokens and 10 seconds apart."""
    (folder / ".hydra").mkdir(parents=True)
    config = {"model": {"n_layer": 2, "n_embd": 64}, "optim": {"lr": 1e-3}, "seed": 42, "resume": None}
    for key, value in settings.items():
        group, _, name = key.partition("__")
        config[group][name] = value
    (folder / ".hydra" / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / ".hydra" / "overrides.yaml").write_text("[]\n")
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for i, value in enumerate(bits, 1):
            common = {"step": i, "tokens": 1000 * i, "seconds": 10 * i}
            writer.writerow(common | {"train/bits_per_byte": value + 0.1, "tokens_per_second": 100 + i})
            writer.writerow(common | {"val/bits_per_byte": value})
    if status:
        write_result(folder, status=status, objective=min(bits))
    return folder


def run_report(capsys, monkeypatch, *arguments: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["rwkv-report", *map(str, arguments)])
    code = 0
    try:
        command.main()
    except SystemExit as exit:
        code = int(exit.code or 0)
    streams = capsys.readouterr()
    return code, streams.out, streams.err


def read_cells(out: str) -> list[list[str]]:
    """The rows of the table, its head first. Old consoles of Windows have other lines."""
    rows = [re.split("[│┃|]", line)[1:-1] for line in out.splitlines() if line.startswith(("│", "┃", "|"))]
    return [[cell.strip() for cell in row] for row in rows]


def test_report_prints_a_table_and_writes_csv_and_picture(tmp_path, capsys, monkeypatch):
    make_run_folder(tmp_path / "10", [5.0, 3.0, 3.5], optim__lr=1e-2)
    make_run_folder(tmp_path / "2", [5.0, 4.0], optim__lr=1e-4, status=None)
    make_run_folder(tmp_path / "3", [6.0], optim__lr=1e-5, status="stopped")
    write_result_only = tmp_path / "4"
    write_result_only.mkdir()
    write_result(write_result_only, status="failed", error="no such thing", overrides=["optim.lr=7", "data=text"])
    with locked(tmp_path / "2"):
        code, out, err = run_report(capsys, monkeypatch, tmp_path)
    assert (code, err) == (0, "")
    assert read_cells(out)[1:] == [
        ["2", "0.0001", "4.0000", "102", "2", "0:20", "running"],
        ["3", "1e-05", "6.0000", "101", "1", "0:10", "stopped"],
        ["4", "7", "", "", "", "", "failed"],
        ["10", "0.01", "3.0000", "102", "3", "0:30", "finished"],
    ]
    assert "4: no such thing" in out
    assert "n_layer" not in out and "seed" not in out  # the same in all runs
    with (tmp_path / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["run"], row["optim.lr"], row["val/bits_per_byte"]) for row in rows][-1] == ("10", "0.01", "3.0")
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_mean_and_spread_over_seeds(tmp_path, capsys, monkeypatch):
    for number, (seed, lr, bits) in enumerate([(1, 1e-3, 2.0), (2, 1e-3, 2.5), (3, 1e-3, 3.0), (1, 1.00001e-3, 4.0)]):
        folder = make_run_folder(tmp_path / str(number), [bits], optim__lr=lr)
        config = yaml.safe_load((folder / ".hydra" / "config.yaml").read_text()) | {"seed": seed}
        (folder / ".hydra" / "config.yaml").write_text(yaml.safe_dump(config))
    make_run_folder(tmp_path / "4", [9.0], optim__lr=1e-3, status="stopped")
    make_run_folder(tmp_path / "5", [9.0], optim__lr=1e-3, status="pruned")
    again = make_run_folder(tmp_path / "6", [3.0], optim__lr=1e-3)
    shutil.copy(tmp_path / "2" / ".hydra" / "config.yaml", again / ".hydra" / "config.yaml")
    _, out, _ = run_report(capsys, monkeypatch, tmp_path)
    assert read_cells(out)[-2:] == [["0.001", "3", "2.5000", "0.5000"], ["0.001", "1", "4.0000", ""]]


def make_job(folder: Path, bits: float, *overrides: str, **settings: object) -> None:
    make_run_folder(folder, [bits], **settings)
    (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(list(overrides)))


def test_sweep_shows_the_swept_overrides(tmp_path, capsys, monkeypatch):
    """Also those of a job that failed before it had a config; not the settings that a swept file changes."""
    (tmp_path / "multirun.yaml").touch()
    fixed = "data=text", "schedule.final_lr='${divide:1.5,${model.n_embd}}'"
    make_job(tmp_path / "0", 5.0, *fixed, "optim=adam", "optim.lr=0.001", optim__lr=1e-3, optim__eps=1e-8)
    make_job(tmp_path / "1", 4.0, *fixed, "optim=adamw", "optim.lr=0.001", optim__lr=1e-3, optim__eps=1e-6)
    resumes = [{"set": {"optim.lr": 0.5}, "remove": [], "overrides": ["optim.lr=0.5"]}]
    (tmp_path / "1" / ".hydra" / "resumes.yaml").write_text(yaml.safe_dump(resumes))
    (tmp_path / "2").mkdir()
    write_result(tmp_path / "2", status="failed", error="no", overrides=[*fixed, "optim=sgd", "optim.lr=0.001"])
    _, out, _ = run_report(capsys, monkeypatch, tmp_path)
    cells = [row[:3] for row in read_cells(out)]
    assert cells == [["run", "optim", "lr"], ["0", "adam", "0.001"], ["1", "adamw", "0.5"], ["2", "sgd", "0.001"]]
    assert "best: run 1, 4.0000 bits per byte: optim=adamw, optim.lr=0.5\n" in out


def test_seeds_of_a_sweep_with_a_changed_file_are_not_averaged(tmp_path, capsys, monkeypatch):
    (tmp_path / "multirun.yaml").touch()
    for number, lr in enumerate((1e-3, 1e-3, 2e-3)):
        make_job(tmp_path / str(number), 5.0 + number, f"seed={number}", optim__lr=lr)
    _, out, _ = run_report(capsys, monkeypatch, tmp_path)
    assert read_cells(out)[-2:] == [["2", "5.5000", "0.7071"], ["1", "7.0000", ""]]


def test_settings_of_a_resume_replace_earlier_ones(tmp_path):
    folder = make_run_folder(tmp_path / "a", [5.0], optim__lr=1e-2)
    (folder / ".hydra" / "resumes.yaml").write_text(yaml.safe_dump([{"set": {"optim.lr": 5e-3}, "remove": []}]))
    assert report.read_run(folder).settings["optim.lr"] == 5e-3


def test_equal_numbers_are_not_a_difference(tmp_path):
    written = (("a", 2, [0, 0.9], True), ("b", 2.0, [0.0, 0.9], True), ("c", 2.0, [0.0, 0.9], 1))
    for name, layers, betas, value in written:
        make_run_folder(tmp_path / name, [5.0], model__n_layer=layers, optim__betas=betas, optim__fused=value)
    runs = [report.read_run(tmp_path / name) for name in "abc"]
    assert report.find_differing_settings(runs[:2]) == []
    assert report.find_differing_settings(runs) == ["optim.fused"]


def test_titles_of_columns_are_distinct():
    keys = ["optim._target_", "callbacks.best._target_", "optim.lr", "seed", "data.seed"]
    expected = ["optim._target_", "best._target_", "lr", "seed", "data.seed"]
    assert report._short_titles(keys) == expected


def test_interpolated_setting_is_shown_as_a_number(tmp_path):
    folder = make_run_folder(tmp_path / "a", [5.0], optim__lr="${divide:1.5,${model.n_embd}}")
    assert report.read_run(folder).settings["optim.lr"] == 1.5 / 64


def test_corrupt_run_is_reported(tmp_path, capsys, monkeypatch):
    make_run_folder(tmp_path / "0", [5.0])
    make_run_folder(tmp_path / "1", [5.0])
    make_run_folder(tmp_path / "2", [5.0])
    (tmp_path / "1" / "metrics.csv").write_text("step,tokens\nx,y\n")
    (tmp_path / "2" / ".hydra" / "config.yaml").write_text("{")
    make_run_folder(tmp_path / "3", [6.0])
    (tmp_path / "3" / "metrics.csv").write_text("")
    make_run_folder(tmp_path / "4", [float("nan")])
    (tmp_path / "5").mkdir()
    (tmp_path / "5" / "result.json").write_text('{"status": "failed", "overrides": 5}')
    code, out, _ = run_report(capsys, monkeypatch, tmp_path)
    assert code == 0
    assert out.count("damaged") >= 2 and out.count("finished") == 3
    # An unreadable run has no effect on the columns: equal settings of the others get none.
    assert "n_layer" not in out
    assert "6.0000" in out and f"{tmp_path / '3' / 'metrics.csv'} has no validation" in out
    assert "best: run 0, 5.0000 bits per byte" in out


@pytest.mark.parametrize(
    ("file", "content", "status"),
    [
        (".hydra/config.yaml", "", "damaged"),
        ("metrics.csv", "step,val/bits_per_byte\n1,2\n", "damaged"),
        ("result.json", '{"status": "finished", "step": "abc", "seconds": {"a": 1}, "objective": []}', "finished"),
    ],
)
def test_folder_with_other_content_does_not_break_the_report(tmp_path, capsys, monkeypatch, file, content, status):
    # Names that rich would parse as markup.
    for name in ("[bold]", "q[/x]"):
        make_run_folder(tmp_path / name, [5.0])
    (tmp_path / "[bold]" / file).write_text(content)
    if file == "result.json":
        (tmp_path / "[bold]" / "metrics.csv").unlink()
    code, out, err = run_report(capsys, monkeypatch, tmp_path)
    assert (code, err) == (0, "")
    assert "[bold]" in out and "q[/x]" in out and status in out
    assert (tmp_path / "sweep.csv").exists()


@pytest.mark.parametrize("content", ["[]", "{", "3", ""])
def test_unreadable_result_is_ignored(tmp_path, content):
    folder = make_run_folder(tmp_path / "a", [5.0], status=None)
    (folder / "result.json").write_text(content)
    assert report.read_run(folder).status == "broken off"


def test_picture_of_text_and_mixed_values(tmp_path, capsys, monkeypatch):
    for i, value in enumerate(["a", None, 3, True, float("nan")]):
        make_run_folder(tmp_path / str(i), [5.0 - i], optim__lr=value)
    assert run_report(capsys, monkeypatch, tmp_path)[0] == 0


def test_report_on_several_folders_is_written_to_the_given_folder(tmp_path, capsys, monkeypatch):
    make_run_folder(tmp_path / "a" / "x", [5.0])
    make_run_folder(tmp_path / "b" / "y", [4.0])
    code, out, _ = run_report(capsys, monkeypatch, tmp_path / "a", tmp_path / "b" / "y", "--out", tmp_path / "out")
    assert code == 0 and "a/x" in out and "b/y" in out
    assert (tmp_path / "out" / "sweep.csv").exists() and not (tmp_path / "a" / "sweep.csv").exists()


@pytest.mark.parametrize("arguments", [["nosuch"], ["empty"], ["empty", "--out", "new"]])
def test_bad_input_gives_one_line_error(tmp_path, capsys, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    code, _, err = run_report(capsys, monkeypatch, *arguments)
    assert (code, err.count("\n")) == (2, 1)


def test_report_imports_no_torch():
    code = "import sys, rwkv_pl.cli.report; sys.exit('torch' in sys.modules or 'lightning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_picture_of_failed_runs_only(tmp_path, capsys, monkeypatch):
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "result.json").write_text(json.dumps({"status": "failed", "error": "no"}))
    code, out, _ = run_report(capsys, monkeypatch, tmp_path)
    assert (code, "sweep.png" in out) == (0, False)
