"""Selects the kernel for a call: set with :func:`use_kernel`, loaded once, with one warning if it is not available.

A library is one of `libraries.LIBRARIES`, given by its name.
"""

import threading
import warnings
from collections.abc import Callable
from types import TracebackType

import torch
from torch import Tensor, nn

from rwkv_pl.config import KERNELS
from rwkv_pl.ops.build import BuildError, load_cpu_library, load_cuda_library
from rwkv_pl.ops.libraries import LIBRARIES

_kernel = "auto"


_loading = threading.Lock()

# By library and device type: why it could not be loaded, or "" after it was.
_failures: dict[tuple[str, str], str] = {}

# Device types and failures. A missing compiler, for example, is the failure of all libraries.
_warned: set[tuple[str, str]] = set()

_registrations: dict[str, list[Callable[[], None]]] = {library: [] for library in LIBRARIES}


class KernelError(RuntimeError):
    """The compiled operators were required and are not available. reason: why, and the fix."""

    def __init__(self, library: str, reason: str) -> None:
        super().__init__(f"{library}: no compiled operator: {reason}; or choose use_kernel('auto')")
        self.reason = reason


class use_kernel:
    """Selects the implementation of the operators for the whole process; as a context manager, until the block ends.

    - ``"auto"``: compiled if that operator can be built for the tensor's device, else scan;
    - ``"compiled"``: the compiled operator, or a KernelError that says why it is not available;
    - ``"scan"``: parallel in time, in plain torch;
    - ``"recurrence"``: the plain loop over time, the reference for the others.

    Raises ValueError for another name.
    """

    def __init__(self, name: str) -> None:
        global _kernel
        if name not in KERNELS:
            raise ValueError(f"use_kernel: no kernel named {name!r}; choose one of {', '.join(KERNELS)}")
        self._previous, _kernel = _kernel, name

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        global _kernel
        _kernel = self._previous


def current_kernel() -> str:
    """The kernel that :func:`use_kernel` selected last."""
    return _kernel


def uses_compiled(library: str, device: str) -> bool:
    """Do calls on this device type use the library's operators? They do if `use_kernel` allows it and they load."""
    if _kernel == "auto" and not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return False
    return _kernel in ("auto", "compiled") and _is_available(library, device, required=_kernel == "compiled")


def supports_elementwise(*tensors: Tensor, io: bool = False) -> bool:
    """Do the compiled elementwise operators support these tensors: on the CPU, all float32?

    io: all bfloat16 is supported too. False, so that torch's operators are used, under torch.compile, under autocast to
    float16, in transforms of torch.func and for subclasses of Tensor.
    """
    dtype = tensors[0].dtype
    return (
        (dtype == torch.float32 or (io and dtype == torch.bfloat16))
        and not torch.compiler.is_compiling()
        and all(
            type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu" and tensor.dtype == dtype
            for tensor in tensors
        )
        and (not torch.is_autocast_enabled("cpu") or torch.get_autocast_dtype("cpu") == torch.bfloat16)
        and uses_compiled("elementwise", "cpu")
    )


# torch.compile calls this during tracing and keeps the result, so loading the operators does not break the graph.
@torch.compiler.assume_constant_result
def _is_available(library: str, device: str, required: bool) -> bool:
    """Are the library's operators available for this device type? The first call builds or loads them.

    If they are not: KernelError if they are required, else one warning.
    """
    failure = load(library, device) if device in ("cpu", "cuda") else f"not supported on {device}"
    if failure and required:
        raise KernelError(library, failure)
    if failure and (library, device) in _failures and (device, failure) not in _warned:
        _warned.add((device, failure))
        warnings.warn(f"{library} runs in plain torch, slower: {failure}", RuntimeWarning, stacklevel=2)
    return not failure


def load(library: str, device: str) -> str:
    """Load a library for a device type, and build it if needed. Returns why it failed, or ""."""
    # The CPU library declares the operators for both.
    failure = load(library, "cpu") if device == "cuda" else ""
    with _loading:
        if (library, device) not in _failures:
            try:
                if device == "cuda" and not failure:
                    load_cuda_library(LIBRARIES[library])
                elif device == "cpu":
                    load_cpu_library(LIBRARIES[library])
                    for register in _registrations[library]:
                        register()
                _failures[library, device] = failure
            except BuildError as error:
                _failures[library, device] = str(error)
        return _failures[library, device]


def load_all(device: str) -> str:
    """Load every library that has operators for a device type. Returns why the first failed that did, or ""."""
    has_device = [name for name, library in LIBRARIES.items() if device == "cpu" or library.cuda_sources]
    return next(filter(None, [load(name, device) for name in has_device]), "")


def when_loaded(library: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Decorate a function that registers gradients or fake kernels; it is called after the library is loaded."""

    def decorate(register: Callable[[], None]) -> Callable[[], None]:
        with _loading:
            _registrations[library].append(register)
            if _failures.get((library, "cpu")) == "":
                register()
        return register

    return decorate
