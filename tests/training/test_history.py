"""metrics.csv survives what happens to files, and the curve is drawn from any rows."""

import pytest

from rwkv_pl.training.history import COLUMNS, draw, read_rows

HEADER = ",".join(COLUMNS) + "\n"


def row(step, text="1"):
    return f"{step},{step * 10}" + f",{text}" * (len(COLUMNS) - 2) + "\n"


def test_rows_after_the_resumed_step_and_a_torn_last_one_are_dropped(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text(HEADER + row(2) + row(4) + row(6) + "8,80,1")
    assert [r["step"] for r in read_rows(path, up_to=4)] == [2, 4]
    assert [r["step"] for r in read_rows(path, up_to=99)] == [2, 4, 6]


def test_no_file_has_no_rows(tmp_path):
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
def test_a_curve_of_few_or_broken_rows(tmp_path, rows):
    draw(rows, tmp_path / "loss.png", {"gzip -9": 2.0})
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]
