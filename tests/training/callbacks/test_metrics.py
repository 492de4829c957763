"""metrics.csv after faults and resumes, speeds that count only training steps, and curves of any rows."""

from types import SimpleNamespace

import pytest
from lightning.pytorch import Trainer

from rwkv_pl import RWKV4, CorpusDataModule, LitRWKV, RWKV4Config
from rwkv_pl.errors import UserError
from rwkv_pl.training.callbacks import metrics as history
from rwkv_pl.training.callbacks.checkpoints import LastCheckpoint
from rwkv_pl.training.callbacks.metrics import COLUMNS, MetricsRecorder, draw_curve, read_rows

HEADER = ",".join(COLUMNS) + "\n"


def make_row(step, text="1"):
    return f"{step},{step * 10}" + f",{text}" * (len(COLUMNS) - 2) + "\n"


def test_rows_after_the_resumed_step_and_a_partial_last_row_are_dropped(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text(HEADER + make_row(2) + make_row(4) + make_row(6) + "8,80,1")
    assert [r["step"] for r in read_rows(path, up_to=4)] == [2, 4]
    assert [r["step"] for r in read_rows(path, up_to=99)] == [2, 4, 6]


@pytest.mark.parametrize("change", [
    lambda text: text.replace("\n", "\r"),
    lambda text: text.replace("\n", "\r\n"),
    lambda text: text.replace("\n", "\r\r\n"),
    lambda text: "\ufeff" + text,
    lambda text: text.rstrip("\n"),
], ids=["CR", "CRLF", "CRCRLF", "BOM", "last line"])  # fmt: skip
def test_any_line_ending_keeps_the_rows(tmp_path, change):
    path = tmp_path / "metrics.csv"
    path.write_bytes(change(HEADER + make_row(2) + make_row(4)).encode())
    assert [row["step"] for row in read_rows(path, up_to=9)] == [2, 4]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("epoch,loss\n", "no column step"),
        ((HEADER + make_row(2)).replace("\n", ""), "an unknown column .+"),
        ((HEADER + make_row(2)).replace("\n", "\v"), "an unknown column .+"),
    ],
    ids=["header", "one line", "VT"],
)
def test_file_with_another_header_is_refused_even_without_rows(tmp_path, text, says):
    path = tmp_path / "metrics.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=rf"metrics.csv is corrupt \({says}\)"):
        read_rows(path, up_to=9)


def test_missing_file_has_no_rows(tmp_path):
    assert read_rows(tmp_path / "metrics.csv", up_to=9) == []


@pytest.mark.parametrize(
    "rows",
    [
        [{"step": 1, "tokens": 10, "train/bits_per_byte": 8.0}],
        [{"step": 1, "tokens": 10, "val/bits_per_byte": 8.0}],
        [
            {"step": s, "tokens": s, "train/bits_per_byte": 8 / s, "val/bits_per_byte": float("nan")}
            for s in range(1, 99)
        ],
    ],
    ids=["train", "val", "nan"],
)
def test_curve_of_few_or_invalid_rows(tmp_path, rows):
    draw_curve(rows, tmp_path / "loss.png", {"gzip -9": 2.0})
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]


def test_old_metrics_file_gets_the_new_column(tmp_path):
    path = tmp_path / "metrics.csv"
    old = COLUMNS[: COLUMNS.index("model_flops_per_second")]
    path.write_text(",".join(old) + "\n" + ",".join(["2", "20"] + ["1"] * (len(old) - 2)) + "\n")
    with history._rewrite_csv(path, read_rows(path, up_to=9)) as file:
        history._append_row(file, {"step": 4, "tokens": 40, "mfu": 0.5})
    first, second = read_rows(path, up_to=9)
    assert first == dict.fromkeys(old, 1.0) | {"step": 2, "tokens": 20}
    assert second == {"step": 4, "tokens": 40, "mfu": 0.5}


def test_speed_counts_only_training_steps(tmp_path, monkeypatch):
    """With a fake clock: a step takes 2 seconds, a call of the validation 100, and a checkpoint 50."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(history, "time", SimpleNamespace(perf_counter=lambda: clock.now))

    class Timed(LitRWKV):
        def training_step(self, batch, batch_idx):
            clock.now += 2
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            clock.now += 100
            super().validation_step(batch, batch_idx)

        def on_save_checkpoint(self, checkpoint):
            clock.now += 50
            super().on_save_checkpoint(checkpoint)

    (tmp_path / "corpus.txt").write_bytes(b"The quick brown fox jumps over the lazy dog. " * 100)
    monkeypatch.setattr(history, "draw_curve", lambda *_: None)
    record = MetricsRecorder(tmp_path, tokens_per_step=32, flops_per_token=1000, peak=64_000)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=9,
        max_epochs=-1,
        log_every_n_steps=2,
        val_check_interval=3,
        limit_val_batches=2,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[record, LastCheckpoint(str(tmp_path), every_n_train_steps=2)],
    )
    trainer.fit(
        Timed(RWKV4(RWKV4Config(256, 1, 8))), CorpusDataModule(tmp_path / "corpus.txt", batch_size=2, ctx_len=16)
    )
    rows = [row for row in read_rows(tmp_path / "metrics.csv", up_to=9) if "train/loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 4, 6, 8]
    for row in rows:
        assert (row["tokens_per_second"], row["model_flops_per_second"], row["mfu"]) == (16, 16_000, 0.25)
    assert record.latest["seconds"] == 9 * 2 + 3 * 200 + 4 * 50
