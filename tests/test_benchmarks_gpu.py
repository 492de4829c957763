"""`python -m benchmarks gpu` without a GPU: how it reports runs that succeed, fail, hang or die."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from benchmarks import gpu
from benchmarks.gpu import Row, Run, ratios_to_transformers, run_measurement
from benchmarks.gpu_runs import Blocks, Finding, Scale, Unavailable
from systems import WINDOWS

pytestmark = pytest.mark.skipif(WINDOWS, reason="the benchmark kills groups of processes, as POSIX has them")

ROOT = Path(__file__).parents[1]
TINY = Scale("cpu", tiny=True, rounds=1)


@pytest.fixture(autouse=True)
def forked(monkeypatch):
    """Fork the fake runs from this process: they use no torch, so they need not wait for the server's imports."""
    monkeypatch.setattr(gpu, "CONTEXT", multiprocessing.get_context("fork"))
    monkeypatch.setattr(gpu.CONTEXT, "set_forkserver_preload", lambda names: None)


def succeed(scale):
    return Finding("done", {"device": scale.device})


def fail(scale):
    print("about to fail")
    raise ValueError("it failed\nwith details")


def lack_a_tool(scale):
    raise Unavailable("nvcc is not on PATH")


def die(scale):
    os.kill(os.getpid(), signal.SIGKILL)


def end_as_a_command(scale):
    sys.exit(3)


def is_gone(pid):
    """Return whether the process has ended. A zombie has."""
    state = Path("/proc", pid, "stat")
    return not state.exists() or state.read_text().split()[2] == "Z"


def test_successful_run_is_a_row_with_its_figures():
    row = run_measurement(Run("part", "name", succeed, 10), TINY, 10)
    assert (row.part, row.name, row.status, row.summary) == ("part", "name", "ok", "done")
    assert row.figures == {"device": "cpu"} and not row.log


@pytest.mark.parametrize(
    ("measure", "status", "summary"),
    [
        (fail, "failed", "ValueError: it failed"),
        (end_as_a_command, "failed", "SystemExit: 3"),
        (die, "failed", "its process ended with exit code -9"),
        (lack_a_tool, "unavailable", "nvcc is not on PATH"),
    ],
)
def test_failed_run_is_a_row_with_the_reason(measure, status, summary):
    row = run_measurement(Run("part", "name", measure, 10), TINY, 10)
    assert (row.status, row.summary, row.figures) == (status, summary, {})
    if measure is fail:
        assert "about to fail" in row.log and "ValueError" in row.log


def test_timeout_kills_a_run_and_its_children(tmp_path):
    path = tmp_path / "process"

    def hang(scale):
        path.write_text(str(subprocess.Popen(["sleep", "60"]).pid))
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(60)

    row = run_measurement(Run("part", "name", hang, 1.0), TINY, 100)
    assert (row.status, row.summary) == ("timeout", "stopped at its limit of 1 s")
    assert is_gone(path.read_text())


def test_run_without_a_gpu_or_time_left_is_not_started(tmp_path):
    def touch(scale):
        (tmp_path / "started").touch()

    rows = [
        run_measurement(Run("part", "name", touch, 10, needs_gpu=True), TINY, 10),
        run_measurement(Run("part", "name", touch, 10, not_tiny=True), TINY, 10),
        run_measurement(Run("part", "name", touch, 10), TINY, 0.0),
    ]
    assert [row.summary for row in rows] == ["needs a GPU", "not at tiny sizes", "no time is left"]
    assert [row.status for row in rows] == ["unavailable", "skipped", "skipped"]
    assert not (tmp_path / "started").exists()


def test_budget_limits_all_runs_and_results_are_written_after_each(tmp_path, monkeypatch, capsys):
    written = []
    saved = gpu.save_results

    def save(folder, name, *about, **content):
        saved(folder, name, *about, **content)
        written.append(len(json.loads((folder / f"{name}.json").read_text())["rows"]))

    monkeypatch.setattr(gpu, "save_results", save)
    runs = [Run("kernels", "first", succeed, 9), Run("step", "left out", die, 9)]
    runs += [Run("kernels", "second", lambda scale: time.sleep(60), 9), Run("kernels", "third", succeed, 9)]
    monkeypatch.setattr(gpu, "RUNS", runs)
    monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    options = ["--device", "cpu", "--tiny", "--budget", "1.5", "--parts", "kernels", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["benchmarks gpu", *options, f"--results={tmp_path}"])
    threads, handler = torch.get_num_threads(), signal.getsignal(signal.SIGTERM)
    gpu.main()
    torch.set_num_threads(threads)
    signal.signal(signal.SIGTERM, handler)
    rows = json.loads((tmp_path / "gpu_cpu.json").read_text())["rows"]
    assert [(row["name"], row["status"]) for row in rows] == [
        ("first", "ok"),
        ("second", "timeout"),
        ("third", "skipped"),
    ]
    assert written == [1, 2, 3]
    printed = capsys.readouterr().out
    assert all(row["summary"] in printed for row in rows)


def test_sigterm_kills_the_current_run(tmp_path, monkeypatch):
    def hang(scale):
        (tmp_path / "process").write_text(str(os.getpid()))
        time.sleep(60)

    monkeypatch.setattr(gpu, "RUNS", [Run("kernels", "hang", hang, 60)])
    monkeypatch.setattr(gpu, "PARTS", ("kernels",))
    monkeypatch.setattr(sys, "argv", ["benchmarks gpu", "--device=cpu", f"--results={tmp_path}"])
    process = gpu.CONTEXT.Process(target=gpu.main)
    process.start()
    end = time.monotonic() + 600
    while not ((path := tmp_path / "process").exists() and path.read_text()):
        assert time.monotonic() < end
        time.sleep(0.01)
    process.terminate()
    process.join(600)
    assert process.exitcode == 143
    assert is_gone(path.read_text())


def test_missing_gpu_gives_one_line_error(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    monkeypatch.setattr(sys, "argv", ["benchmarks gpu"])
    with pytest.raises(SystemExit) as end:
        gpu.main()
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("torch finds no GPU; --device cpu --tiny tries the program")


def test_ratio_to_transformers_at_the_same_batch_and_precision():
    def row(part, name, median):
        return Row(part, name, "ok", "", 1.0, {"seconds_a_step": {"median": median}})

    rows = [
        row("step", "rwkv-train, float32", 0.5),
        row("step", "rwkv-train, bf16", 0.25),
        row("batch", "rwkv-train, bf16", 1.0),
        row("step", "transformers, float32", 2.0),
        row("step", "transformers, bf16", 3.0),
        Row("batch", "transformers, bf16", "timeout", "", 1.0, {}),
    ]
    assert ratios_to_transformers(rows) == {"step: rwkv-train, float32": 4.0, "step: rwkv-train, bf16": 12.0}


def test_warm_up_block_is_not_timed():
    blocks, count = Blocks("cpu", steps=3), 0

    def step():
        nonlocal count
        count += 1
        time.sleep(0.05 if count <= 3 else 0.002)

    blocks.run(step, rounds=2)
    figures = blocks.figures(tokens=10)
    assert count == 9
    assert 0.002 <= figures["seconds_a_step"]["max"] < 0.05
    assert figures["tokens_per_second"] == 10 / figures["seconds_a_step"]["median"]


@pytest.mark.slow
def test_all_parts_at_tiny_sizes_on_a_cpu(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "gpu", "--device=cpu", "--tiny", "--rounds=2", "--threads=1"]
    done = subprocess.run([*command, f"--results={tmp_path}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "gpu_cpu.json").read_text())
    rows = {(row["part"], row["name"]): row for row in content["rows"]}
    assert list(rows) == [(run.part, run.name) for run in gpu.RUNS]
    for (part, name), row in rows.items():
        if "CUDA graph" in name or part in ("wkv", "sanitizer") or name == "pytest -m gpu":
            assert row["status"] == "unavailable", row
            assert "needs a GPU" in row["summary"] or "compute-sanitizer is not on PATH" in row["summary"], row
        elif row["status"] == "skipped":
            assert "compile=true" in name and row["summary"] == "not at tiny sizes", row
        else:
            assert row["status"] == "ok", row
        assert row["summary"] in done.stdout
        if part in ("step", "batch") and row["status"] == "ok":
            assert 0 < row["figures"]["seconds_a_step"]["median"] < 10
        if name.startswith("rwkv-train") and row["status"] == "ok":
            assert 0 < row["figures"]["mfu"] < 1.5
    resumed = rows["resume", "SIGTERM, resume="]["figures"]
    assert resumed["exact"] and 20 <= resumed["stopped_after"] < resumed["steps"] and resumed["tensors"] > 100
    assert rows["doctor", "rwkv-doctor"]["figures"]["code"] in (0, 1)
    assert rows["generate", "bfloat16"]["figures"]["tokens_per_second"] > 1
    for name in ("step, bf16", "batch, bf16"):
        profile = rows["profile", name]["figures"]
        assert profile["milliseconds"]["matrix products"] > 0 and 0 < profile["not_a_matrix_product"] < 1
    assert {"step: rwkv-train, float32", "batch: rwkv-train, bf16"} <= set(content["times_transformers"])
