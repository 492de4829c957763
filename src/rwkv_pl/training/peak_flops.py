"""Measures the machine's peak speed on matrix products, the reference for MFU."""

import contextlib
import platform
import time

import torch
from filelock import FileLock
from lightning.pytorch.plugins import Precision

from rwkv_pl.files import cache_folder, json_digest, read_record, write_record
from rwkv_pl.ops.linear import linear

SECONDS = 0.3
CACHE_SECONDS = 24 * 3600
LARGEST = 8192


def matmul_dtype(device: torch.device, precision: Precision) -> torch.dtype:
    """The dtype in which the model's matrix products run."""
    with precision.forward_context(), torch.no_grad():
        return linear(torch.ones(32, 32, device=device), torch.ones(32, 32, device=device)).dtype


def load_or_measure_peak(device: torch.device, dtype: torch.dtype) -> float:
    """The peak floating-point operations per second of matrix products: cached, or measured with `measure_peak`.

    The cache key has the machine, device, threads, dtype and torch version. An entry expires after a day, so that a
    measurement slowed by other jobs does not stay.
    """
    asked = {
        "machine": platform.node(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "dtype": f"{dtype}, {torch.get_float32_matmul_precision()}",
        "torch": torch.__version__,
    }
    path = cache_folder() / "peaks" / f"{json_digest(asked)[:16]}.json"
    with contextlib.ExitStack() as stack:
        writable = True
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(path.with_suffix(".lock")))  # concurrent measurements would slow each other
        except OSError:
            writable = False
        kept = read_record(path)
        if kept and time.time() - path.stat().st_mtime < CACHE_SECONDS:
            return float(kept["flops_per_second"])
        peak = measure_peak(device, dtype)
        if writable:
            with contextlib.suppress(OSError):
                write_record(path, {"flops_per_second": peak} | asked)
    return peak


def measure_peak(device: torch.device, dtype: torch.dtype, seconds: float = SECONDS) -> float:
    """Measure the floating-point operations per second of square products of growing size; return the fastest."""
    best, ends, side = 0.0, time.perf_counter() + seconds, 256
    # Random numbers: a GPU multiplies zeros and ones faster, since they take less power.
    numbers = torch.Generator(device).manual_seed(0)
    with torch.inference_mode():
        while side <= LARGEST:
            try:
                a, b = (torch.randn(side, side, device=device, generator=numbers).to(dtype) for _ in range(2))
                times = [_time_product(a, b, device) for _ in range(4)]
            except torch.OutOfMemoryError:
                break
            best = max(best, 2 * side**3 / min(times))
            side *= 2
            # Stop if the next size, with eight times the arithmetic, would not finish in time.
            if time.perf_counter() + 8 * sum(times) > ends:
                break
    return best


def _time_product(a: torch.Tensor, b: torch.Tensor, device: torch.device) -> float:
    began = time.perf_counter()
    linear(a, b)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
