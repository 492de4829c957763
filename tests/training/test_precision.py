"""trainer.precision=auto: the faster precision here, measured once and stored."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rwkv_pl.training import precision
from rwkv_pl.training.precision import describe_speedup, measure_product_rates

CPU = torch.device("cpu")
FLOAT32, BF16 = torch.float32, torch.bfloat16


def test_rates_of_both_precisions_are_measured_with_unchanged_threads():
    before = torch.get_num_threads()
    rates = measure_product_rates(CPU, 64, 32)
    assert rates.keys() == {FLOAT32, BF16} and min(rates.values()) > 1e6
    assert torch.get_num_threads() == before


def test_rate_is_the_arithmetic_of_three_products_over_the_best_time(monkeypatch):
    times = iter([9.0, 9.0, 2.0, 4.0, 1.0, 8.0, 3.0, 5.0])  # float32 and bf16 alternate; the first are a warm-up
    monkeypatch.setattr(precision, "_time_product", lambda *_: next(times))
    rates = precision._measure_rates(CPU, 10, 4)
    assert rates == {FLOAT32: 3 * 2 * 10 * 4 * 16 / 1.0, BF16: 3 * 2 * 10 * 4 * 16 / 4.0}


def test_small_product_is_long_enough_for_the_clock():
    ticks = {precision.CLOCK() for _ in range(100_000)}
    assert len(ticks) > 100


def test_large_product_is_skipped_if_a_small_one_is_slow(monkeypatch):
    asked = []

    def rates(device, tokens, n_embd):
        asked.append((tokens, n_embd))
        return {FLOAT32: 10.0, BF16: speed}

    monkeypatch.setattr(precision, "_measure_rates", rates)
    for speed in (1.0, 5.0):  # noqa: B007
        measure_product_rates(CPU, 10**6, 4096)
    assert asked == [(64, 128), (64, 128), (1024, 4096)]


def test_describe_speedup():
    assert describe_speedup(2.06) == "2.1 times as fast as"
    assert describe_speedup(0.0613) == "16 times slower than"
    assert describe_speedup(0.98) == describe_speedup(1.04) == "about as fast as"


@pytest.mark.skipif(not torch.backends.cpu.get_cpu_capability().startswith("AVX"), reason="needs AVX2")
def test_processor_without_bf16_instructions_is_detected():
    """Simulated by limiting oneDNN and torch to AVX2, the best level of most laptops."""
    code = (
        "import torch; from rwkv_pl.training.precision import measure_product_rates as f; "
        "r = f(torch.device('cpu'), 512, 192);"
        "assert 3 * r[torch.bfloat16] < r[torch.float32], r"
    )
    avx2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    subprocess.run([sys.executable, "-c", code], env=os.environ | avx2, check=True, timeout=600)


def test_experiments_use_auto_precision():
    conf = Path(__file__).parents[2] / "conf" / "experiment"
    assert not [path.name for path in conf.glob("*.yaml") if "precision: bf16" in path.read_text()]
