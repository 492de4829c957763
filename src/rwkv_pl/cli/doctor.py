"""rwkv-doctor: what the compiled WKV kernel needs, what of it is here, and which kernel runs in the end."""

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from rwkv_pl.cli.entry import cli_entry_point
from rwkv_pl.files import cache_folder
from rwkv_pl.limits import limit_threads, usable_cores
from rwkv_pl.terminal import console


@dataclass
class Finding:
    """cure: what to do, where something is amiss."""

    name: str
    found: str
    cure: str = ""


# Of output and gradients, relative to the recurrence in float64: what float32 can hold, and five times over.
MAX_ERROR = 5e-6


@cli_entry_point
def main() -> None:
    """The command. Exit codes: 0 every device has its compiled kernel, 1 one of them has not."""
    parser = argparse.ArgumentParser(
        prog="rwkv-doctor",
        description="Looks at what the compiled WKV kernel is built with, builds it, and tries it out.",
        epilog="exit code 0: kernel=auto uses the compiled kernel on every device; 1: on one of them it does not",
    )
    parser.parse_args()
    if sys.stderr.isatty():
        print("loading torch ...", file=sys.stderr, flush=True)

    import torch
    from rich.markup import escape
    from rich.table import Table

    table = Table(header_style="bold", show_lines=False)
    for title in ("", "found", "cure"):
        table.add_column(title, overflow="fold")
    for finding in check_build_tools():
        table.add_row(
            finding.name, escape(finding.found), escape(finding.cure or "-"), style="red" if finding.cure else None
        )
    console().print(table)

    limit_threads()
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for device in devices:
        print(_describe_products(device))
    verdicts = [_verify_kernel(device) for device in devices]
    sys.exit(0 if all(verdicts) else 1)


def check_build_tools() -> Iterator[Finding]:
    """One for each thing that a build takes."""
    import torch

    from rwkv_pl.ops.build import PREBUILT, cpu_level
    from rwkv_pl.ops.toolchain import (
        compiler_advice,
        describe_missing_compiler,
        describe_nvcc_problem,
        find_compiler,
        find_nvcc,
    )

    yield Finding("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    cuda = torch.version.cuda
    yield Finding("torch", f"{torch.__version__}, " + (f"CUDA {cuda}" if cuda else "no CUDA"))
    cores = usable_cores()
    share = "" if cores == os.cpu_count() else f", {cores} of {os.cpu_count()} cores by affinity and quota"
    yield Finding("processor", f"{platform.processor() or platform.machine()}, level {cpu_level()}{share}")
    prebuilt = sorted(path.name.rpartition("-")[0] for path in PREBUILT.glob("*.so"))
    if prebuilt:
        yield Finding("built ahead", ", ".join(prebuilt))
    compiler = find_compiler()
    if compiler:
        yield Finding("C++ compiler", f"{compiler.version} ({compiler.path})")
    else:
        yield Finding("C++ compiler", describe_missing_compiler(), "" if prebuilt else compiler_advice())
    try:
        import ninja

        yield Finding("ninja", f"{ninja.__version__} ({ninja.BIN_DIR})")
    except ImportError:
        yield Finding("ninja", "none", "run `pip install ninja`")
    yield _check_cache()
    if not torch.cuda.is_available():
        yield Finding("GPU", "none that torch sees" if cuda else "not looked for: this torch has no CUDA")
    for device in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(device)
        memory = properties.total_memory / 2**30
        yield Finding(f"GPU {device}", f"{properties.name}, sm_{properties.major}{properties.minor}, {memory:.0f} GiB")
    nvcc = find_nvcc(cuda or "13")
    # Of no consequence where torch has no CUDA.
    problem, _, cure = describe_nvcc_problem(nvcc, cuda).partition("; ") if cuda else ("", "", "")
    yield Finding("nvcc", problem or (f"CUDA {nvcc.version} ({nvcc.path})" if nvcc else "none"), cure)


def _check_cache() -> Finding:
    from filelock import FileLock, Timeout

    folder = cache_folder() / "kernels"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with FileLock(folder / "lock", timeout=0):
            left = list(folder.glob("building-*"))
        libraries = [path for path in folder.iterdir() if path.suffix in (".so", ".pyd")]
    except Timeout:
        return Finding("cache", f"{folder}, in which another process builds at present")
    except OSError as error:
        return Finding("cache", f"{folder}: {error.strerror}", "set RWKV_PL_CACHE to a folder of your own")
    size = sum(path.stat().st_size for path in libraries) / 1e6
    stale = f"; {len(left)} builds that were broken off, which the next one clears away" if left else ""
    return Finding("cache", f"{folder}: {len(libraries)} libraries, {size:.1f} MB{stale}")


def _verify_kernel(device: str) -> bool:
    """Builds the kernel of a device, judges and times it, and says in a line what kernel=auto will use there."""
    from rwkv_pl.ops.backend import use_kernel

    try:
        with use_kernel("compiled"):
            started = time.perf_counter()
            _compute_results(device, steps=4)
            ready = time.perf_counter() - started
            error = _measure_error(device)
            compiled = _measure_milliseconds(device, calls=20)
    except RuntimeError as failure:
        reason = (
            str(failure).removeprefix("wkv4: no compiled operator: ").removesuffix("; or choose use_kernel('auto')")
        )
        print(f"{device}: kernel=auto uses the scan in plain torch: {reason}")
        return False
    if not error <= MAX_ERROR:
        print(f"{device}: the compiled kernel errs by {error:.1e}, more than {MAX_ERROR:.0e}: use kernel=scan")
        return False
    with use_kernel("scan"):
        scan = _measure_milliseconds(device, calls=3)
    print(
        f"{device}: kernel=auto uses the compiled kernel: there in {ready:.1f} s, relative error {error:.1e}, "
        f"{compiled:.2f} ms where the scan takes {scan:.0f} (1 x 1,024 x 512, forward and backward)"
    )
    return True


def _describe_products(device: str) -> str:
    """How fast matrix products are in either precision, in a line."""
    import torch

    from rwkv_pl.training.memory import format_si
    from rwkv_pl.training.precision import describe_speedup, measure_product_rates

    rates = measure_product_rates(torch.device(device), tokens=1024, n_embd=512)
    float32, bf16 = rates[torch.float32], rates[torch.bfloat16]
    per_thread = " a thread" if device == "cpu" else ""
    speeds = f"{format_si(float32, 'FLOP/s')} in float32 and {format_si(bf16, 'FLOP/s')} in bf16{per_thread}"
    return (
        f"{device}: matrix products make {speeds}: in bf16-mixed they are {describe_speedup(bf16 / float32)} in 32-true"
    )


def _compute_results(device: str, steps: int, dtype: str = "float32", channels: int = 512) -> list[Any]:
    """Output and gradients for inputs of ordinary size."""
    import torch

    from rwkv_pl.ops.wkv4 import wkv4

    generator = torch.Generator().manual_seed(0)
    shapes = [(channels,), (channels,), (1, steps, channels), (1, steps, channels), (1, steps, channels)]
    made = [torch.randn(shape, generator=generator).to(device, getattr(torch, dtype)) for shape in shapes]
    leaves = [x.requires_grad_() for x in made[:4]]
    output, _ = wkv4(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, made[4])]


def _measure_error(device: str) -> float:
    from rwkv_pl.ops.backend import use_kernel

    got = _compute_results(device, steps=300, channels=65)
    with use_kernel("recurrence"):
        reference = _compute_results("cpu", steps=300, channels=65, dtype="float64")
    return max(float((x.cpu().double() - y).norm() / y.norm()) for x, y in zip(got, reference, strict=True))


def _measure_milliseconds(device: str, calls: int) -> float:
    import torch

    wait: Callable[[], None] = torch.cuda.synchronize if device == "cuda" else lambda: None
    taken = []
    for _ in range(calls):
        wait()
        started = time.perf_counter()
        _compute_results(device, steps=1024)
        wait()
        taken.append(1e3 * (time.perf_counter() - started))
    return statistics.median(taken)


if __name__ == "__main__":
    main()
