"""The measured speed of the machine's matrix products."""

import os
import time

import pytest
import torch
from lightning.pytorch.plugins import HalfPrecision, MixedPrecision, Precision

from rwkv_pl.training import peak_flops as peak
from rwkv_pl.training.callbacks.metrics import MetricsRecorder

CPU = torch.device("cpu")


@pytest.fixture
def measure_calls(tmp_path, monkeypatch):
    """Record the calls of `measure`, which returns 1e9, 2e9, ..."""
    asked = []
    monkeypatch.setenv("RWKV_PL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(peak, "measure_peak", lambda *what: asked.append(what) or 1e9 * len(asked))
    return asked


def test_no_product_exceeds_the_measured_peak():
    """Nor may the peak be far above the speed of a measured product that is run again."""
    found = peak.measure_peak(CPU, torch.float32, seconds=0.05)
    a = torch.randn(256, 256)
    best = min(peak._time_product(a, a, CPU) for _ in range(5))
    assert 0.2 < found / (2 * 256**3 / best) < 20


def test_peak_is_measured_once_a_day(measure_calls, tmp_path):
    assert peak.load_or_measure_peak(CPU, torch.float32) == peak.load_or_measure_peak(CPU, torch.float32) == 1e9
    assert peak.load_or_measure_peak(CPU, torch.bfloat16) == 2e9
    for path in (tmp_path / "cache").glob("peaks/*.json"):
        os.utime(path, (time.time() - peak.CACHE_SECONDS - 1,) * 2)
    assert peak.load_or_measure_peak(CPU, torch.float32) == 3e9
    assert [what[1] for what in measure_calls] == [torch.float32, torch.bfloat16, torch.float32]


def test_another_number_of_threads_is_measured_again(measure_calls, monkeypatch):
    assert peak.load_or_measure_peak(CPU, torch.float32) == 1e9
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert peak.load_or_measure_peak(CPU, torch.float32) == 2e9


def test_unwritable_or_corrupt_cache_only_repeats_the_measurement(measure_calls, tmp_path):
    (tmp_path / "cache").write_text("a file")
    assert [peak.load_or_measure_peak(CPU, torch.float32) for _ in range(2)] == [1e9, 2e9]
    (tmp_path / "cache").unlink()
    assert peak.load_or_measure_peak(CPU, torch.float32) == 3e9
    (kept,) = (tmp_path / "cache").glob("peaks/*.json")
    kept.write_text("{")
    assert peak.load_or_measure_peak(CPU, torch.float32) == 4e9


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        (Precision(), torch.float32),
        (MixedPrecision("bf16-mixed", "cpu"), torch.bfloat16),
        (HalfPrecision("bf16-true"), torch.bfloat16),
    ],
    ids=["32-true", "bf16-mixed", "bf16-true"],
)
def test_dtype_is_the_one_used_by_matrix_products(precision, dtype):
    assert peak.matmul_dtype(CPU, precision) == dtype


def test_higher_speed_raises_the_peak(tmp_path):
    history = MetricsRecorder(tmp_path, 1, flops_per_token=10, peak=100)
    shares = [history._flops_figures(speed)["mfu"] for speed in (5, 20, 5)]
    assert shares == [0.5, 1, 0.25]
