"""The progress of a run, in a terminal and elsewhere."""

import contextlib
import io
import logging
import re
import signal

import pytest
import rich
from lightning.pytorch import Callback, Trainer
from rich.console import Console
from systems import WINDOWS

from rwkv_pl import RWKV4, CorpusDataModule, LitRWKV, RWKV4Config
from rwkv_pl.training.callbacks import progress
from rwkv_pl.training.callbacks.metrics import MetricsRecorder
from rwkv_pl.training.callbacks.progress import ConsoleHandler, TrainingProgress, format_duration
from rwkv_pl.training.callbacks.signals import StopOnSignal


def run_training(tmp_path, monkeypatch, terminal: bool, *more: Callback) -> str:
    (tmp_path / "corpus.txt").write_bytes(b"The quick brown fox jumps over the lazy dog. " * 100)
    screen = Console(file=io.StringIO(), force_terminal=terminal, color_system="256" if terminal else None, width=140)
    monkeypatch.setattr(rich, "_console", screen)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0)
    handler = ConsoleHandler()
    log = logging.getLogger("rwkv_pl")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    history = MetricsRecorder(tmp_path, tokens_per_step=32, flops_per_token=6000, peak=1e9)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=4,
        max_epochs=-1,
        log_every_n_steps=2,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[history, TrainingProgress(history), *more],
    )
    data = CorpusDataModule(tmp_path / "corpus.txt", batch_size=2, ctx_len=16)
    with contextlib.suppress(SystemExit):
        trainer.fit(LitRWKV(RWKV4(RWKV4Config(256, 1, 8))), data)
    log.removeHandler(handler)
    return screen.file.getvalue()


FIGURES = r"loss \d+\.\d+  \d+\.\d+ bits/byte  [\d,]+ tokens/s  \d+% MFU"


def test_progress_without_a_terminal_is_plain_lines(tmp_path, monkeypatch):
    shown = run_training(tmp_path, monkeypatch, False)
    assert re.search(rf"^step 3/4  {FIGURES}  \d+ s left$", shown, flags=re.MULTILINE), shown
    assert re.search(r"^step 4/4  validation \d+\.\d{4} bits per byte$", shown, flags=re.MULTILINE)
    assert "\r" not in shown and "\x1b" not in shown


class Interrupt(Callback):
    """Ctrl-C in the third step."""

    def on_train_batch_start(self, trainer: Trainer, *_: object) -> None:
        if trainer.global_step == 2:
            signal.raise_signal(signal.SIGINT)


def test_message_of_ctrl_c_is_below_the_bar(tmp_path, monkeypatch):
    shown = remove_escapes(run_training(tmp_path, monkeypatch, True, StopOnSignal(), Interrupt()))
    bar, _, after = shown.partition("stopped by SIGINT after step 3")
    assert "3/4" in bar.splitlines()[-1] and "━" not in after, shown


def remove_escapes(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


@pytest.mark.skipif(WINDOWS, reason="without its own console, rich draws as for old ones")
def test_progress_in_a_terminal_is_a_bar(tmp_path, monkeypatch):
    colored = run_training(tmp_path, monkeypatch, True)
    assert re.findall(r"\x1b\[([0-9;]+)m━", colored)[-1] == "38;5;197"  # a full bar has the color of a growing one
    shown = remove_escapes(colored)
    assert re.search(FIGURES, shown), shown
    assert "4/4" in shown and re.search(r"% MFU  ?[\d:-]+ left", shown), shown
    assert "step 4/4  validation" in shown


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 s"),
        (59, "59 s"),
        (200, "3 min 20 s"),
        (18_600, "5 h 10 min"),
        (97_200, "1 day 3 h"),
        (180_000, "2 days 2 h"),
    ],
)
def test_duration_is_formatted_in_words(seconds, words):
    assert format_duration(seconds) == words


def test_messages_in_a_notebook_are_one_plain_text(monkeypatch, capsys):
    """rich would display each line as an output of its own."""
    monkeypatch.setattr(rich, "_console", Console(force_jupyter=True))
    for message in ("one", "two"):
        ConsoleHandler().emit(logging.LogRecord("rwkv_pl", logging.INFO, "", 0, message, None, None))
    assert capsys.readouterr().out == "one\ntwo\n"
