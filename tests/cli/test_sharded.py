"""Several processes, with the whole model each (ddp) or a part of it (fsdp), train like one and continue its runs."""

import sys
from pathlib import Path
from typing import Any

import forks
import pytest
import torch
from command import SMALL, TEXT
from forks import Strike
from scheduler import run_ranks
from systems import needs_gloo
from torch import Tensor
from versions import RUN_SETTINGS

from rwkv_pl.training.curve import read_rows
from rwkv_pl.weights.checkpoint import read_checkpoint
from rwkv_pl.weights.parts import load_whole

SETTINGS = (*SMALL, "trainer.max_steps=6", "trainer.val_check_interval=3", "callbacks.last.every_n_train_steps=3",
            "trainer.log_every_n_steps=1", "trainer.limit_val_batches=3", "logger=none")  # fmt: skip
VARIANTS = {
    "plain": (),
    "accumulation": ("trainer.accumulate_grad_batches=3",),
    "checkpointing": ("activation_checkpointing=true",),
    "clipped values": ("trainer.gradient_clip_algorithm=value", "trainer.gradient_clip_val=1.0"),
    "muon": ("optim=muon",),
    "compile": ("compile=true",),
    "rwkv7": RUN_SETTINGS["rwkv7"],
    "ema": ("callbacks=[default,ema]", "callbacks.ema.decay=0.5"),
    "stream": ("data.stream=true",),
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


BOTH = ("ddp", "fsdp")
# In bf16 the tolerance is so wide that only the way of the numbers counts: whole, in parts, through compiled blocks.
CASES = [
    *((variant, "32-true", BOTH) for variant in VARIANTS if variant != "plain"),
    ("plain", "32-true", ("ddp",)),
    ("plain", "bf16-mixed", BOTH),
    ("rwkv7", "bf16-mixed", ("fsdp",)),
    ("compile", "bf16-mixed", ("fsdp",)),
]
QUICK = ("plain", "32-true", ("fsdp",))


@needs_gloo
@pytest.mark.parametrize(
    ("variant", "precision", "strategies"),
    [QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in CASES)],
)
def test_two_processes_train_as_one(folder, variant, precision, strategies):
    settings = (*SETTINGS, *VARIANTS[variant], f"trainer.precision={precision}")
    run(folder, "auto", 1, *settings, "hydra.run.dir=one")
    expected = read_figures(folder / "one")
    # Sums of 96 tokens in another order: a few units in the last place, of 8 bits in bf16, in which Muon iterates.
    tolerance = 1e-6 if precision == "32-true" and variant != "muon" else 1e-2
    for strategy in strategies:
        more = ("checkpoints.sharded=true",) if strategy == "fsdp" and variant in ("plain", "ema") else ()
        run(folder, strategy, 2, *settings, *more, f"hydra.run.dir={folder / strategy}")
        found = read_figures(folder / strategy)
        assert len(found) == 8
        for here, there in zip(found, expected, strict=True):
            assert here == pytest.approx(there, rel=tolerance), strategy


def load(path: Path) -> dict[str, Any]:
    """The whole content of a checkpoint of either kind."""
    return load_whole(read_checkpoint(path))


def assert_close(found: Any, expected: Any, tolerance: float, where: str = "") -> None:
    """Equal keys, shapes and numbers. tolerance: of a tensor's numbers, relative to its largest."""
    if isinstance(expected, Tensor):
        assert found.shape == expected.shape, where
        assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max()), where
    elif isinstance(expected, dict | list):
        assert len(found) == len(expected), where
        for key in expected if isinstance(expected, dict) else range(len(expected)):
            assert_close(found[key], expected[key], tolerance, f"{where}/{key}")


@needs_gloo
@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "sharded"),
    [((), False), ((), True), (("callbacks=[default,ema]",), True), (("data.stream=true",), True)],
    ids=str,
)
def test_run_continues_on_other_devices_and_strategies(folder, more, sharded):
    """One process, two with the whole model, three with parts, two, one: as one unbroken process, also its average."""
    settings = (*SETTINGS, *more)
    run(folder, "auto", 1, *settings, "trainer.max_steps=10", "hydra.run.dir=unbroken")
    run(folder, "auto", 1, *settings, "trainer.max_steps=2", "hydra.run.dir=run")
    steps = [("ddp", 2), ("fsdp", 3), ("fsdp", 2), ("auto", 1)]
    for step, (strategy, processes) in enumerate(steps, 2):
        kind = f"checkpoints.sharded={sharded and strategy == 'fsdp'}".lower()
        run(folder, strategy, processes, f"resume={folder / 'run'}", f"trainer.max_steps={2 * step}", kind)
        last = folder / "run" / "checkpoints" / "last.ckpt"
        assert len(list(last.glob("part-*"))) == (processes if sharded and strategy == "fsdp" else 0)
    # A validation is due at each end of training, so the broken run has more of them.
    expected, found = (
        [row["train/loss"] for row in read_rows(folder / name / "metrics.csv", 1000) if "train/loss" in row]
        for name in ("unbroken", "run")
    )
    assert found == pytest.approx(expected, rel=1e-6)
    expected, found = (load(folder / name / "checkpoints" / "last.ckpt") for name in ("unbroken", "run"))
    assert found.keys() == expected.keys()
    # Adam divides by small numbers, so rounding grows more there than in the loss.
    for part, tolerance in (("state_dict", 1e-5), ("current_model_state", 1e-5), ("optimizer_states", 1e-4)):
        assert_close(found.get(part), expected.get(part), tolerance, part)
    assert len(found.get("stream_state", [])) == len(expected.get("stream_state", []))
    for here, there in zip(found.get("stream_state", []), expected.get("stream_state", []), strict=True):
        assert here["att_shift"].shape == (6, 16)
        assert_close(dict(here), dict(there), 1e-4, "stream_state")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize(
    ("strategy", "processes", "accumulate"), [("auto", 1, 3), ("auto", 1, 2), ("ddp", 2, 3), ("fsdp", 3, 1)]
)
def test_stream_stopped_inside_a_step_continues_on_other_devices(folder, strategy, processes, accumulate):
    """The same devices and micro-batches give the same bits."""
    settings = (*SETTINGS, "data.stream=true", "trainer.accumulate_grad_batches=3")
    run(folder, "auto", 1, *settings, "hydra.run.dir=unbroken")
    strike = Strike("rwkv_pl.training.module:LitRWKV.training_step", 3 * 3 + 2, forks.terminate)
    stopped = forks.run(folder, *settings, "hydra.run.dir=run", strikes=[strike])
    assert stopped.code == 143, stopped.err
    assert load(folder / "run" / "checkpoints" / "last.ckpt")["global_step"] == 3
    run(folder, strategy, processes, f"resume={folder / 'run'}", f"trainer.accumulate_grad_batches={accumulate}")
    expected, found = read_figures(folder / "unbroken"), read_figures(folder / "run")
    for here, there in zip(found, expected, strict=True):
        assert here == (there if (processes, accumulate) == (1, 3) else pytest.approx(there, rel=1e-6))
    expected, found = (
        load(folder / "unbroken" / "checkpoints" / "last.ckpt"),
        load(folder / "run" / "checkpoints" / "last.ckpt"),
    )
    for here, there in zip(found["stream_state"], expected["stream_state"], strict=True):
        for name, tensor in there.items():
            if (processes, accumulate) == (1, 3):
                assert torch.equal(here[name], tensor)
            assert torch.allclose(here[name], tensor, rtol=1e-4, atol=1e-5), name
