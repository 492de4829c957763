"""Restores the state of the process after a run that was called from Python, as if the run had had its own process."""

import contextlib
import gc
import logging
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.core.utils import JobRuntime
from hydra.version import VersionBase
from omegaconf.basecontainer import BaseContainer

from rwkv_pl.errors import StoppedBySignal

# Hydra's own state. An application that uses Hydra may call the run.
HYDRA_STATE: tuple[type, ...] = (GlobalHydra, HydraConfig, JobRuntime, VersionBase)

# The filters that importing torch and Lightning added. They are removed from the caller's, and apply again in each run.
_filters_of_imports: list[Any] = []


@contextlib.contextmanager
def restored_process() -> Iterator[None]:
    """Restore what Python, Hydra and the imports of a run change: signal handlers, environment, hooks and so on."""
    with _restored_signals(), _restored_interpreter(), _restored_environment(), _restored_hydra():
        yield


@contextlib.contextmanager
def restored_libraries() -> Iterator[None]:
    """Restore logging, torch and the kernel choice, and start with torch's defaults. Enter it after the imports."""
    _apply_filters_of_imports()
    with _restored_logging(), _restored_random_numbers(), _restored_torch():
        yield


@contextlib.contextmanager
def raise_on_signals(exit_codes: dict[int, int]) -> Iterator[None]:
    """Make signals raise StoppedBySignal, which Lightning passes on; at KeyboardInterrupt it would exit.

    Only the main thread can set handlers; in another thread the signals stay the caller's. Ignored ones stay ignored.
    """

    def stop(number: int, frame: Any) -> None:
        raise StoppedBySignal(number, exit_codes[number])

    with _restored_signals():
        if _is_main_thread():
            for number in exit_codes:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    signal.signal(number, stop)
        yield


@contextlib.contextmanager
def deferred_sigint() -> Iterator[None]:
    """Raise KeyboardInterrupt only after the block: an import that it ends cannot be repeated in this process."""
    handler = signal.getsignal(signal.SIGINT)
    if not _is_main_thread() or handler in (signal.SIG_IGN, None):
        yield
        return
    received = []
    signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if received:
        raise KeyboardInterrupt


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextlib.contextmanager
def _restored_signals() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in signal.valid_signals()}
    try:
        yield
    finally:
        if _is_main_thread():
            for number, handler in before.items():
                # None is a handler that was not set from Python.
                if handler is not None and signal.getsignal(number) is not handler:
                    signal.signal(number, handler)


@contextlib.contextmanager
def _restored_interpreter() -> Iterator[None]:
    argv, arguments, path, entries, folder = sys.argv, list(sys.argv), sys.path, list(sys.path), Path.cwd()
    hooks = sys.excepthook, threading.excepthook, warnings.formatwarning
    streams = sys.stdout, sys.stderr
    drawn = random.getstate()  # imports of a run draw random numbers
    with warnings.catch_warnings():
        try:
            yield
        finally:
            sys.argv, sys.path = argv, path
            argv[:], path[:] = arguments, entries
            sys.excepthook, threading.excepthook, warnings.formatwarning = hooks
            sys.stdout, sys.stderr = streams
            random.setstate(drawn)
            if Path.cwd() != folder:
                os.chdir(folder)


@contextlib.contextmanager
def _restored_environment() -> Iterator[None]:
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        for name, value in before.items():
            if os.environ.get(name) != value:
                os.environ[name] = value


@contextlib.contextmanager
def _restored_hydra() -> Iterator[None]:
    instances: dict[Any, Any] = Singleton._instances
    before = {kind: instances.pop(kind) for kind in HYDRA_STATE if kind in instances}
    resolvers = dict(BaseContainer._resolvers)
    try:
        yield
    finally:
        for kind in HYDRA_STATE:
            instances.pop(kind, None)
        instances.update(before)
        BaseContainer._resolvers.update(resolvers)  # Hydra registers `now` and others


def _apply_filters_of_imports() -> None:
    missing = [entry for entry in _filters_of_imports if entry not in warnings.filters]
    warnings.filters[:0] = missing  # type: ignore[index]


def keep_filters_of_imports(before: list[Any]) -> None:
    """Remember which filters the imports have added to those before them."""
    _filters_of_imports.extend(entry for entry in warnings.filters if entry not in before + _filters_of_imports)


@contextlib.contextmanager
def _restored_logging() -> Iterator[None]:
    """Restore the levels and handlers of all loggers.

    dictConfig closes the handlers that logging knows, so the caller's are unknown to it meanwhile.
    """
    root = logging.getLogger()
    loggers = [root, *(each for each in root.manager.loggerDict.values() if isinstance(each, logging.Logger))]
    before = [(each, each.level, each.propagate, each.disabled, list(each.handlers)) for each in loggers]
    known, by_name = list(logging._handlerList), dict(logging._handlers)  # type: ignore[attr-defined]
    logging._handlerList.clear()  # type: ignore[attr-defined]
    logging._handlers.clear()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for logger, level, propagate, disabled, handlers in before:
            logger.propagate, logger.disabled, logger.handlers[:] = propagate, disabled, handlers
            logger.setLevel(level)
        logging._handlerList[:0] = known  # type: ignore[attr-defined]
        logging._handlers.update(by_name)  # type: ignore[attr-defined]


@contextlib.contextmanager
def _restored_random_numbers() -> Iterator[None]:
    import numpy as np
    import torch

    of_python, of_numpy, of_torch = random.getstate(), np.random.get_state(), torch.get_rng_state()
    of_cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)
        torch.set_rng_state(of_torch)
        if of_cuda is not None:
            torch.cuda.set_rng_state_all(of_cuda)
        elif torch.cuda.is_initialized():
            torch.cuda.manual_seed_all(torch.initial_seed())  # the state that the caller's first use would have found


@contextlib.contextmanager
def _restored_torch() -> Iterator[None]:
    """Restore torch's global settings and the kernel choice. The run starts with the defaults that change its numbers.

    The number of threads stays the caller's, as with OMP_NUM_THREADS for the command.
    """
    import torch
    from torch.backends import cudnn, mkldnn

    from rwkv_pl.ops.backend import current_kernel, use_kernel

    products = torch.backends.cuda.matmul, mkldnn.matmul  # type: ignore[attr-defined]
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # the caller has set fp32_precision, torch's newer setting
        precision = "highest"
    precisions = [each.fp32_precision for each in products]
    dtype, device, threads = torch.get_default_dtype(), torch.get_default_device(), torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    of_cudnn, kernel, had_group = (cudnn.benchmark, cudnn.deterministic), current_kernel(), _has_process_group()
    if precision != "highest" or "tf32" in precisions or "bf16" in precisions:
        torch.set_float32_matmul_precision("highest")
    torch.set_default_dtype(torch.float32)
    if device.type != "cpu":
        torch.set_default_device(None)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        if torch.get_float32_matmul_precision() != precision:
            torch.set_float32_matmul_precision(precision)
        for each, value in zip(products, precisions, strict=True):
            if each.fp32_precision != value:
                each.fp32_precision = value
        torch.set_default_dtype(dtype)
        if device.type != "cpu":
            torch.set_default_device(device)
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        cudnn.benchmark, cudnn.deterministic = of_cudnn
        use_kernel(kernel)
        # With more processes, the group stays, as after any use of Lightning's Trainer: the other ranks may need it.
        if _has_process_group() and not had_group and torch.distributed.get_world_size() == 1:
            torch.distributed.destroy_process_group()
        gc.collect()  # the Trainer and its model refer to each other
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def _has_process_group() -> bool:
    import torch

    return torch.distributed.is_available() and torch.distributed.is_initialized()
