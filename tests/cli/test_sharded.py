"""Several processes, with the whole model each (ddp) or a part of it (fsdp), train like one and continue its runs."""

import itertools
import os
import signal
import sys
from pathlib import Path

import forks
import pytest
import torch
from command import SMALL, TEXT, load_checkpoint
from forks import Strike
from scheduler import environment, free_port, run_ranks
from versions import RUN_SETTINGS

from rwkv_pl.training.curve import read_rows

SETTINGS = (*SMALL, "trainer.max_steps=6", "trainer.val_check_interval=3", "callbacks.last.every_n_train_steps=3",
            "trainer.log_every_n_steps=1", "trainer.limit_val_batches=3", "logger=none")  # fmt: skip
VARIANTS = {
    "plain": (),
    "accumulation": ("trainer.accumulate_grad_batches=3",),
    "checkpointing": ("activation_checkpointing=true",),
    "clipped values": ("trainer.gradient_clip_algorithm=value", "trainer.gradient_clip_val=1.0"),
    "muon": ("optim=muon",),
    "rwkv7": RUN_SETTINGS["rwkv7"],
    "ema": ("callbacks=[default,ema]", "callbacks.ema.decay=0.5"),
}


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "corpus.txt").write_bytes(TEXT)
    return tmp_path


def run(folder: Path, strategy: str, processes: int, *arguments: str) -> None:
    arguments += (f"trainer.devices={processes}", f"trainer.strategy={strategy}")
    if processes == 1:
        results = [forks.run(folder, *arguments)]
    else:
        results = run_ranks(folder, "torchrun", *arguments, world_size=processes)
    for result in results:
        assert result.code == 0, result.err


def read_figures(run: Path) -> list[list[float]]:
    """Loss and gradient norm of each step, and the validations."""
    names = ("train/loss", "train/grad_norm", "val/loss")
    return [[row[name] for name in names if name in row] for row in read_rows(run / "metrics.csv", 1000)]


CASES = itertools.product(("ddp", "fsdp"), VARIANTS, ("32-true", "bf16-mixed"))
QUICK = ("fsdp", "plain", "32-true")


@pytest.mark.parametrize(
    ("strategy", "variant", "precision"),
    [case if case == QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in CASES],
)
def test_two_processes_train_as_one(folder, strategy, variant, precision):
    settings = (*SETTINGS, *VARIANTS[variant], f"trainer.precision={precision}")
    run(folder, "auto", 1, *settings, "hydra.run.dir=one")
    run(folder, strategy, 2, *settings, f"hydra.run.dir={folder / 'two'}")
    expected, found = read_figures(folder / "one"), read_figures(folder / "two")
    # Sums of 96 tokens in another order: a few units in the last place, of 8 bits in bf16, in which Muon iterates.
    tolerance = 1e-6 if precision == "32-true" and variant != "muon" else 1e-2
    assert len(found) == 8
    for here, there in zip(found, expected, strict=True):
        assert here == pytest.approx(there, rel=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("callbacks", ["default", "default,ema"])
def test_run_continues_on_other_devices_and_strategies(folder, callbacks):
    """One process, two with the whole model, three with parts, one: as one unbroken process, also its average."""
    settings = (*SETTINGS, f"callbacks=[{callbacks}]")
    run(folder, "auto", 1, *settings, "trainer.max_steps=8", "hydra.run.dir=unbroken")
    run(folder, "auto", 1, *settings, "trainer.max_steps=2", "hydra.run.dir=run")
    for step, (strategy, processes) in enumerate([("ddp", 2), ("fsdp", 3), ("auto", 1)], 2):
        run(folder, strategy, processes, f"resume={folder / 'run'}", f"trainer.max_steps={2 * step}")
    expected, found = load_checkpoint(folder / "unbroken"), load_checkpoint(folder / "run")
    assert found.keys() == expected.keys()
    for part in ("state_dict", "current_model_state"):
        for name, tensor in expected.get(part, {}).items():
            assert torch.allclose(found[part][name], tensor, rtol=1e-5, atol=1e-6), name
    here, there = (content["optimizer_states"][0]["state"] for content in (found, expected))
    for number, state in there.items():
        for name, tensor in state.items():
            assert torch.allclose(here[number][name], tensor, rtol=1e-4, atol=1e-6), (number, name)


def fail() -> None:
    raise ValueError("a planted fault")


def stall() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


FAULTS = [
    (fail, 1, "process 1: ValueError: a planted fault"),
    (fail, 0, "ValueError: a planted fault"),
    (forks.kill, 1, "process 1 ended without an error (killed?)"),
    (forks.kill, 0, None),
    (stall, 1, "process 1 did not answer within trainer.timeout=4 seconds"),
]


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("fault", "rank", "message"), [FAULTS[0], *(pytest.param(*fault, marks=pytest.mark.slow) for fault in FAULTS[1:])]
)
def test_rank_0_prints_the_error_of_the_rank_that_failed_first(folder, strategy, fault, rank, message):
    """All processes end, and the run can be resumed."""
    settings = (*SETTINGS, f"data.path={folder}/corpus.txt", f"trainer.strategy={strategy}", "trainer.devices=2",
                "trainer.timeout=4")  # fmt: skip
    strike = Strike("rwkv_pl.training.module:LitRWKV.training_step", 5, fault)
    port, run = free_port(), folder / "run"
    places = [folder / "rank 0", folder / "rank 1"]
    processes = []
    for each, place in enumerate(places):
        place.mkdir()
        strikes = [strike] if each == rank else []
        variables = environment("torchrun", each, port)
        processes.append(forks.start(place, *settings, f"hydra.run.dir={run}", strikes=strikes, **variables))
    first = forks.finish(processes[0], places[0])
    if fault == stall:
        processes[1].kill()
    second = forks.finish(processes[1], places[1])
    assert first.code == (1 if message else -9) and second.code in (1, -9)
    assert second.err == ""
    if message:
        assert first.err.count("\n") == 1 and first.err.startswith(f"rwkv-train: {message}")
        assert f"rwkv-train resume={run}" in first.err
    for result in run_ranks(folder, "torchrun", f"resume={run}"):
        assert result.code == 0, result.err
    assert not list(run.glob("error-rank-*"))
