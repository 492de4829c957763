"""`rwkv_pl.train`: what the command rwkv-train does, in this process."""

import contextlib
import os
import signal
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from rwkv_pl.environment import safe_import_path, shorten_openmp_spin
from rwkv_pl.errors import RunError, StoppedBySignal, UserError, one_line
from rwkv_pl.files import describe_os_error
from rwkv_pl.overrides import parse_overrides, suggest_list
from rwkv_pl.runs import restore
from rwkv_pl.runs.launch import launch
from rwkv_pl.runs.run import Run
from rwkv_pl.terminal import (
    BAD_INPUT,
    SIGNAL_CODES,
    STOPPED_AT_START,
    called_from_python,
    ignore_unwritable_screen,
    print_loading,
)
from rwkv_pl.texts import take_as_typed
from rwkv_pl.user_files import absolute_config_dir

# Flags of the command, and what to do instead.
MULTIRUN_FLAGS = ("-m", "--multirun")
CONFIG_DIR_FLAGS = ("-cd", "--config-dir")

_running = threading.Lock()


def train(*overrides: str, config_dir: str | Path | None = None) -> Run:
    """Train a model in this process, as the command rwkv-train does, and return the run.

        run = rwkv_pl.train("experiment=quickstart", "trainer.max_steps=50")

    It prints the same lines, writes the same files and ends in the same bits. Afterwards the process is as before:
    signal handlers, environment, logging, random numbers and torch's settings. Only imported modules stay, and the
    settings of glibc's heap, which let later work reuse freed memory.

    Args:
        overrides: settings as "key=value", as for the command. "resume=FOLDER" and "resume=latest" resume a run.
        config_dir: a folder with your own files for the config's groups.

    Raises:
        UserError: a wrong setting or input, in one line; nothing was written.
        RunError: the training failed, in one line with the call that resumes it.
        KeyboardInterrupt: Ctrl-C, or "interrupt" in a notebook. The checkpoint is saved after the micro-batch, and the
            message has the call that resumes the run. A second one does not wait and saves nothing.
        SystemExit: SIGTERM or SIGHUP (a closed terminal). The checkpoint is saved, then the handler that was set before
            the call is called, if it is a function; if it returns, SystemExit has the command's exit code.

    In a thread that is not the main one, signals are not handled: Python delivers them to the main thread.
    """
    if not _running.acquire(blocking=False):
        raise UserError("rwkv_pl.train is running in this process already: wait until it ends")
    # Raised after the handlers of these exceptions: a traceback would keep the model and its memory alive.
    failure: BaseException | None = None
    stop: StoppedBySignal | None = None
    try:
        parsed, folder = _parse(overrides), _check_config_dir(config_dir)
        with called_from_python(overrides), restore.restored_process():
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # an import sets it, but only once in a process
            shorten_openmp_spin()
            ignore_unwritable_screen()
            with safe_import_path():
                return Run(launch(parsed, folder, _load_training()))
    except StoppedBySignal as error:
        stop = StoppedBySignal(error.number, error.code, error.message)  # type: ignore[arg-type]
    except KeyboardInterrupt as error:
        failure = KeyboardInterrupt(*(error.args or [STOPPED_AT_START]))
    except UserError as error:
        failure = error
    except (HydraException, OmegaConfBaseException) as error:
        failure = UserError(one_line(error))
    except OSError as error:
        failure = RunError(one_line(describe_os_error(error)))
    except SystemExit as error:
        failure = _describe_exit(error)
    finally:
        _running.release()
    if stop:
        failure = _end_after_signal(stop)
    assert failure is not None
    failure.__cause__ = failure.__context__ = None
    raise failure.with_traceback(None)


def _parse(overrides: Sequence[Any]) -> list[Override]:
    """Parse the settings. Raises UserError for anything but a setting with one value."""
    for text in overrides:
        if not isinstance(text, str):
            hint = "unpack it, train(*settings)" if isinstance(text, list | tuple) else 'write "key=value"'
            raise UserError(f"train takes settings as text, got {text!r}, a {type(text).__name__}: {hint}")
        flag = text.partition("=")[0]
        if flag in MULTIRUN_FLAGS:
            raise UserError(f"{flag} starts a sweep, a process for each run: use the command rwkv-train {flag}")
        if flag in CONFIG_DIR_FLAGS:
            raise UserError(f"{flag} is a flag of the command: write train(..., config_dir=FOLDER)")
        if flag.startswith("-"):
            raise UserError(f'{flag} is a flag of the command: type rwkv-train {flag}; train takes only "key=value"')
    parsed = parse_overrides(take_as_typed(overrides), sweep=True)
    for override in parsed:
        if override.is_sweep_override():
            raise UserError(
                f"{override.input_line} has several values: to run them all, use the command rwkv-train -m"
                f"{suggest_list(override)}"
            )
    return parsed


def _check_config_dir(config_dir: str | Path | None) -> str | None:
    if config_dir is None:
        return None
    if not isinstance(config_dir, str | Path):
        raise UserError(f"config_dir must be a folder's path, got {config_dir!r}")
    return absolute_config_dir(config_dir, "config_dir")


@contextlib.contextmanager
def _load_training() -> Iterator[ModuleType]:
    print_loading()
    warnings.filterwarnings("ignore", message="IProgress not found")  # of tqdm, in a notebook without ipywidgets
    filters = list(warnings.filters)
    with restore.deferred_sigint():
        from rwkv_pl.runs import train
    restore.keep_filters_of_imports(filters)
    with restore.restored_libraries(), restore.raise_on_signals(SIGNAL_CODES):
        yield train


def _end_after_signal(stop: StoppedBySignal) -> BaseException:
    """The exception for a signal that stopped the run, once everything is restored."""
    message = stop.message or STOPPED_AT_START
    if stop.number == signal.SIGINT:
        return KeyboardInterrupt(message)
    if callable(signal.getsignal(stop.number)):
        signal.raise_signal(stop.number)
    return SystemExit(stop.code)


def _describe_exit(error: SystemExit) -> BaseException:
    """The exception for an exit of Lightning or of `ranks`."""
    if isinstance(error.__context__, KeyboardInterrupt | UserError):
        return error.__context__
    if error.code == BAD_INPUT:
        return UserError("rank 0 refused the run: see its message")
    return RunError(f"the run ended with exit code {error.code}")
