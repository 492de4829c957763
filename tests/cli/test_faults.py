"""Runs that are told to stop, or killed, and go on: the same bits as the run that nobody touched."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from command import SMALL, TEXT

RUN = (
    *SMALL,
    "model.dropout=0.2",
    "trainer.max_steps=24",
    "trainer.accumulate_grad_batches=3",
    "trainer.val_check_interval=4",
    "trainer.limit_val_batches=15",
    "trainer.log_every_n_steps=1",
    "callbacks.last.every_n_train_steps=3",
)

# The command, slowed so that a signal meets it at work.
SLOW = """
import sys, time
from lightning.pytorch.callbacks import Callback
from rwkv_pl.training import module
for hook in ("training_step", "validation_step"):
    def slow(self, *args, step=getattr(module.LitRWKV, hook), **kwargs):
        time.sleep(0.01)
        return step(self, *args, **kwargs)
    setattr(module.LitRWKV, hook, slow)
from rwkv_pl.cli.train import main
sys.argv = ["rwkv-train", *sys.argv[1:]]
main()
"""


def start(folder: Path, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-c", SLOW, *arguments]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_rows(run: Path, rows: int) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if (run / "metrics.csv").exists() and len((run / "metrics.csv").read_text().splitlines()) > rows:
            return
        time.sleep(0.01)
    raise AssertionError("the run does not begin")


def state(run: Path) -> dict[str, torch.Tensor]:
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    moments = content["optimizer_states"][0]["state"]
    return content["state_dict"] | {f"{n}.{k}": v for n, of in moments.items() for k, v in of.items()}


def figures(run: Path) -> list[list[str]]:
    """metrics.csv without what the clock says."""
    lines = [line.split(",") for line in (run / "metrics.csv").read_text().splitlines()]
    timed = {lines[0].index("seconds"), lines[0].index("tokens_per_second")}
    return [[cell for i, cell in enumerate(line) if i not in timed] for line in lines]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    (folder / "corpus.txt").write_bytes(TEXT)
    process = start(folder, *RUN, "hydra.run.dir=run")
    assert process.communicate(timeout=120) and process.returncode == 0
    return folder / "run"


@pytest.mark.parametrize(
    ("number", "delay"),
    [
        (signal.SIGTERM, 0.0),
        (signal.SIGINT, 0.12),
        (signal.SIGKILL, 0.06),
        *(
            pytest.param(number, delay / 100, marks=pytest.mark.slow)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL)
            for delay in range(1, 30, 4)
        ),
    ],
)
def test_a_run_that_was_stopped_goes_on_in_the_same_bits(tmp_path, whole, number, delay):
    (tmp_path / "corpus.txt").write_bytes(TEXT)
    process = start(tmp_path, *RUN, "hydra.run.dir=run")
    wait_for_rows(tmp_path / "run", 12)
    time.sleep(delay)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number)
    if number != signal.SIGKILL:
        assert f"stopped by {number.name} after step" in out
        assert f"rwkv-train resume={tmp_path / 'run'} goes on" in out
    resumed = start(tmp_path, "resume=run")
    _, err = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, err
    assert figures(tmp_path / "run") == figures(whole)
    expected, found = state(whole), state(tmp_path / "run")
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_a_second_signal_ends_at_once(tmp_path):
    (tmp_path / "corpus.txt").write_bytes(TEXT)
    process = start(tmp_path, *RUN, "hydra.run.dir=run")
    wait_for_rows(tmp_path / "run", 3)
    os.kill(process.pid, signal.SIGSTOP)
    os.kill(process.pid, signal.SIGINT)
    os.kill(process.pid, signal.SIGTERM)
    os.kill(process.pid, signal.SIGCONT)
    process.communicate(timeout=20)
    assert process.returncode in (130, 143)
