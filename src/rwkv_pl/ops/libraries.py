"""The libraries of compiled operators. Each is built and loaded when one of its operators is first used.

So a user of one version of RWKV does not wait for the compiler of another. All sources are in the package rwkv_pl.cuda.
"""

from dataclasses import dataclass

__all__ = ["LIBRARIES", "Library"]


@dataclass(frozen=True)
class Library:
    """The sources of one library.

    title: what it contains, for messages. cpu_sources: .cpp files, which are compiled, and their headers. cuda_sources:
    the .cu file, which is compiled, and its headers; empty if the operators run only on a CPU.
    """

    name: str
    title: str
    cpu_sources: tuple[str, ...]
    cuda_sources: tuple[str, ...] = ()


_ALL = (
    Library(
        "elementwise",
        "elementwise operators",
        (
            "norm_token_shift_cpu.cpp", "elementwise_cpu.cpp", "cross_entropy_cpu.cpp",
            "cpu_lanes.h", "cpu_numbers.h", "scalar.h", "tensor.h",
        ),
    ),
    Library(
        "wkv4",
        "WKV-4 kernel",
        (
            "wkv4_cpu.cpp", "rwkv4_step_cpu.cpp",
            "cpu_lanes.h", "cpu_numbers.h", "rwkv_step.h", "scalar.h", "tensor.h", "wkv4_math.h",
        ),
        (
            "wkv4_cuda.cu", "wkv4_launch.cuh", "wkv4_scan.cuh", "wkv4_walk.cuh", "wkv4_gpu.h", "wkv4_math.h",
            "cuda_tensor.h", "launch.cuh", "scalar.h", "tensor.h",
        ),
    ),
    Library(
        "wkv7",
        "WKV-7 kernel",
        (
            "wkv7_cpu.cpp", "rwkv7_elementwise_cpu.cpp", "rwkv7_step_cpu.cpp",
            "cpu_lanes.h", "cpu_numbers.h", "rwkv_step.h", "scalar.h", "tensor.h", "wkv7_math.h",
        ),
        ("wkv7_cuda.cu", "wkv7_walk.cuh", "wkv7_math.h", "cuda_tensor.h", "launch.cuh", "scalar.h", "tensor.h"),
    ),
)  # fmt: skip
LIBRARIES = {library.name: library for library in _ALL}
