"""The commands keep no checkpoint or state open while they work: Windows would not replace it."""

import psutil
import pytest
from command import SMALL

from rwkv_pl.cli import generate
from rwkv_pl.inference import evaluate as protocols
from rwkv_pl.training.module import LitRWKV

pytestmark = pytest.mark.skipif(not hasattr(psutil.Process, "memory_maps"), reason="can't list mapped files")


@pytest.fixture
def mapped(monkeypatch) -> list[str]:
    """The checkpoints that are mapped while a command trains, evaluates or generates. "-" marks that it did."""
    found: list[str] = []

    def watch(owner, name: str) -> None:
        original = getattr(owner, name)

        def watched(*arguments, **options):
            paths = {each.path for each in psutil.Process().memory_maps()}
            found.extend(["-", *(path for path in paths if path.endswith((".ckpt", "memory")))])
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, watched)

    watch(LitRWKV, "training_step")
    watch(protocols, "evaluate_stream")
    watch(generate, "_print_texts")
    return found


def test_no_checkpoint_or_state_is_open_during_the_work(train, evaluate, command, run, mapped):
    results = [
        command(generate.main, "rwkv-generate", "run", "--max-tokens", "2", "--state-out", "memory"),
        command(
            *(generate.main, "rwkv-generate", "run", "--max-tokens", "2"),
            *("--state-in", "memory", "--state-out", "memory"),
        ),
        evaluate("weights=run", "protocol=carried"),
        train("resume=run", "trainer.max_steps=5"),
        train(*SMALL, "weights=run", "trainer.max_steps=1", "hydra.run.dir=other"),
    ]
    assert [result.code for result in results] == [0, 0, 0, 0, 0], [result.err for result in results]
    assert mapped == ["-"] * 5
