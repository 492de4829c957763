"""rwkv-doctor: checks the build tools, then builds, verifies and times the compiled operators."""

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rwkv_pl.cli.entry import cli_entry_point
from rwkv_pl.files import cache_folder
from rwkv_pl.limits import limit_threads, usable_cores
from rwkv_pl.terminal import console


@dataclass
class Finding:
    """One row of the table. fix: what to do, if something is wrong."""

    name: str
    found: str
    fix: str = ""


@cli_entry_point
def main() -> None:
    """The command. Exit codes: 0 if every device has its compiled operators, else 1."""
    parser = argparse.ArgumentParser(
        prog="rwkv-doctor",
        description="Checks the build tools and suggests fixes, then builds, verifies and times the operators.",
        epilog="exit code 0: kernel=auto uses the compiled operators on every device; 1: not on every device",
    )
    parser.parse_args()
    if sys.stderr.isatty():
        print("loading torch ...", file=sys.stderr, flush=True)

    import torch
    from rich.markup import escape
    from rich.table import Table

    from rwkv_pl.ops.build import forget_failures
    from rwkv_pl.ops.libraries import LIBRARIES

    table = Table(header_style="bold", show_lines=False)
    for title in ("", "found", "fix"):
        table.add_column(title, overflow="fold")
    for finding in check_build_tools():
        table.add_row(
            finding.name, escape(finding.found), escape(finding.fix or "-"), style="red" if finding.fix else None
        )
    console().print(table)

    limit_threads()
    forget_failures()
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for device in devices:
        print(_describe_products(device))
    verdicts = [
        _verify_library(library.name, device)
        for device in devices
        for library in LIBRARIES.values()
        if device == "cpu" or library.cuda_sources
    ]
    sys.exit(0 if all(verdicts) else 1)


def check_build_tools() -> Iterator[Finding]:
    """Yield a finding for each tool and device that a build needs."""
    import torch

    from rwkv_pl.ops.build import PREBUILT, SUFFIX, cpu_level
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
    total = os.cpu_count() or cores  # None if unknown
    share = "" if cores == total else f", {cores} of {total} cores by affinity and quota"
    yield Finding("processor", f"{platform.processor() or platform.machine()}, level {cpu_level()}{share}")
    prebuilt = sorted(path.name.rpartition("-")[0] for path in PREBUILT.glob(f"*{SUFFIX}"))
    if prebuilt:
        yield Finding("built ahead", ", ".join(prebuilt))
    compiler = find_compiler()
    if compiler:
        yield Finding("C++ compiler", f"{compiler.version} ({compiler.path})")
    else:
        yield Finding("C++ compiler", describe_missing_compiler(), "" if prebuilt else compiler_advice())
    try:
        import ninja

        yield Finding("ninja", ninja.__version__ + (f" ({ninja.BIN_DIR})" if ninja.BIN_DIR else ""))
    except ImportError:
        yield Finding("ninja", "none", "run `pip install ninja`")
    yield _check_cache()
    if not torch.cuda.is_available():
        yield Finding("GPU", "none found by torch" if cuda else "not checked: this torch has no CUDA")
    for device in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(device)
        memory = properties.total_memory / 2**30
        yield Finding(f"GPU {device}", f"{properties.name}, sm_{properties.major}{properties.minor}, {memory:.0f} GiB")
    nvcc = find_nvcc(cuda or "13")
    # A torch without CUDA needs no nvcc.
    problem, _, fix = describe_nvcc_problem(nvcc, cuda).partition("; ") if cuda else ("", "", "")
    yield Finding("nvcc", problem or (f"CUDA {nvcc.version} ({nvcc.path})" if nvcc else "none"), fix)


def _check_cache() -> Finding:
    from filelock import FileLock, Timeout

    folder = cache_folder() / "kernels"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with FileLock(folder / "lock", timeout=0):
            left = list(folder.glob("building-*"))
        libraries = [path for path in folder.iterdir() if path.suffix in (".so", ".pyd")]
    except Timeout:
        return Finding("cache", f"{folder}, another process is building there now")
    except OSError as error:
        return Finding("cache", f"{folder}: {error.strerror}", "set RWKV_PL_CACHE to a writable folder")
    size = sum(path.stat().st_size for path in libraries) / 1e6
    stale = f"; {len(left)} interrupted builds, which the next build removes" if left else ""
    return Finding(
        "cache", f"{folder}: {len(libraries)} librar{'y' if len(libraries) == 1 else 'ies'}, {size:.1f} MB{stale}"
    )


def _verify_library(library: str, device: str) -> bool:
    """Build, verify and time a library's operators on a device, and print what kernel=auto will use there."""
    from rwkv_pl.ops.backend import KernelError, use_kernel
    from rwkv_pl.ops.build import RETRY_ADVICE
    from rwkv_pl.ops.self_tests import MAX_ERROR, measure_error

    try:
        with use_kernel("compiled"):
            started = time.perf_counter()
            measure_error(library, device, steps=4)
            ready = time.perf_counter() - started
            error = measure_error(library, device)
            compiled = _measure_milliseconds(library, device, calls=20)
    except RuntimeError as failure:
        reason = failure.reason.removesuffix(RETRY_ADVICE) if isinstance(failure, KernelError) else str(failure)
        print(f"{device}: {library}: kernel=auto uses plain torch: {reason}")
        return False
    if not error <= MAX_ERROR:
        print(
            f"{device}: {library}: the compiled operators have a relative error of {error:.1e}, above {MAX_ERROR:.0e}: "
            "use kernel=scan"
        )
        return False
    with use_kernel("scan"):
        scan = _measure_milliseconds(library, device, calls=3)
    print(
        f"{device}: {library}: kernel=auto uses the compiled operators: ready in {ready:.1f} s, "
        f"relative error {error:.1e}, {compiled:.2f} ms, plain torch {scan:.1f} ms "
        "(1 x 1,024 x 512, forward and backward)"
    )
    return True


def _describe_products(device: str) -> str:
    """Describe the speed of matrix products in float32 and bfloat16, in one line."""
    import torch

    from rwkv_pl.training.memory import format_si
    from rwkv_pl.training.precision import describe_speedup, measure_product_rates

    rates = measure_product_rates(torch.device(device), tokens=1024, n_embd=512)
    float32, bf16 = rates[torch.float32], rates[torch.bfloat16]
    per_thread = " a thread" if device == "cpu" else ""
    speeds = f"{format_si(float32, 'FLOP/s')} in float32 and {format_si(bf16, 'FLOP/s')} in bf16{per_thread}"
    speedup = describe_speedup(bf16 / float32)
    return f"{device}: matrix products run at {speeds}: in bf16-mixed they are {speedup} in 32-true"


def _measure_milliseconds(library: str, device: str, calls: int) -> float:
    import torch

    from rwkv_pl.ops.self_tests import SELF_TESTS

    wait: Callable[[], None] = torch.cuda.synchronize if device == "cuda" else lambda: None
    taken = []
    for _ in range(calls):
        wait()
        started = time.perf_counter()
        SELF_TESTS[library](1024, device, torch.float32)
        wait()
        taken.append(1e3 * (time.perf_counter() - started))
    return statistics.median(taken)


if __name__ == "__main__":
    main()
