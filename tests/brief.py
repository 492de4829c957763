"""Shorten the end of a run: the loss curve and the sample of 400 tokens take as long as a run of a few steps.

The tests make hundreds of runs. Tests that check neither the picture nor the sample write a picture of one pixel and
generate a few tokens; all files are still written.
"""

import base64
import os
from typing import Any, Protocol

FEW_TOKENS = 8
PIXEL = base64.b64decode(
    b"iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGP4DwABAQEAsTj2FAAAAABJRU5ErkJggg=="
)


class SetAttribute(Protocol):
    def __call__(self, owner: Any, name: str, value: Any, /) -> None: ...


def shorten_run_end(set_attribute: SetAttribute = setattr) -> None:
    """set_attribute: monkeypatch.setattr, if the process later runs other tests."""
    from rwkv_pl.runs import train
    from rwkv_pl.training import curve
    from rwkv_pl.training.callbacks import sample_text

    original = sample_text.sample_tokens

    def few_tokens(model: Any, prompt: list[int], n_tokens: int, seed: int) -> list[int]:
        return original(model, prompt, min(n_tokens, FEW_TOKENS), seed)

    set_attribute(curve, "plot_curve", lambda *_: None)
    set_attribute(curve, "render_png", lambda _: PIXEL)
    for module in (sample_text, train):
        set_attribute(module, "sample_tokens", few_tokens)


def skip_disk_sync() -> None:
    """Make os.fsync return at once.

    Only a crash of the system loses what was not synced, never a killed process, and a run waits for the disk 25 times.
    """
    os.fsync = lambda _: None
