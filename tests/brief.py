"""Shorten the end of a run: the loss curve and the sample of 400 tokens take as long as a run of a few steps.

The tests make hundreds of runs. Tests that check neither the picture nor the sample draw an empty picture and generate
a few tokens; all files are still written.
"""

from typing import Any, Protocol

FEW_TOKENS = 8


class SetAttribute(Protocol):
    def __call__(self, owner: Any, name: str, value: Any, /) -> None: ...


def shorten_run_end(set_attribute: SetAttribute = setattr) -> None:
    """set_attribute: monkeypatch.setattr, if the process later runs other tests."""
    from matplotlib.figure import Figure

    from rwkv_pl.runs import train
    from rwkv_pl.training.callbacks import sample_text

    original = sample_text.sample_tokens

    def few_tokens(model: Any, prompt: list[int], n_tokens: int, seed: int) -> list[int]:
        return original(model, prompt, min(n_tokens, FEW_TOKENS), seed)

    set_attribute(Figure, "draw", lambda *_: None)
    for module in (sample_text, train):
        set_attribute(module, "sample_tokens", few_tokens)
