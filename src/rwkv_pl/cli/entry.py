"""The frame of every command: its environment, and errors in one line.

Only Hydra and the standard library are imported here, so that a mistake is reported before anything heavy is loaded.
"""

import contextlib
import errno
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from rwkv_pl.environment import safe_import_path, shorten_openmp_spin, silence_torch_warnings
from rwkv_pl.errors import RunError, UserError
from rwkv_pl.files import describe_os_error, with_path
from rwkv_pl.terminal import FAILED, exit_command, print_error

STDOUT = "standard output"


def cli_entry_point(main: Callable[[], None]) -> Callable[[], None]:
    """Make a command from `main`: an error is one line. Exit codes: 2 for bad input, 1 for others, 130 for Ctrl-C."""

    def command() -> None:
        # Hydra then raises its errors instead of printing them over several lines.
        os.environ.setdefault("HYDRA_FULL_ERROR", "1")
        shorten_openmp_spin()
        silence_torch_warnings()
        if isinstance(sys.stdout, io.TextIOWrapper):
            with contextlib.suppress(OSError):  # it flushes too
                sys.stdout.reconfigure(errors="replace")  # an encoding without a character prints ? for it
        try:
            import hydra_plugins.rwkv_pl  # noqa: F401  an editable install finds it through a relative entry of sys.path

            with safe_import_path():
                try:
                    main()
                except SystemExit as exit:
                    _flush_stdout()
                    if isinstance(exit.code, int):
                        exit_command(exit.code)
                    raise
                _flush_stdout()
        except RunError as error:
            exit_command(print_error(error, FAILED))
        except (UserError, HydraException, OmegaConfBaseException) as error:
            exit_command(print_error(error))
        except OSError as error:
            if _reader_has_gone(error):  # as with `| head`
                _discard_unwritable_stdout()
                sys.exit(FAILED)
            # For example a full disk or a removed folder. Files that were written before are complete.
            _discard_unwritable_stdout()
            sys.exit(print_error(describe_os_error(error), FAILED))
        except KeyboardInterrupt as error:
            sys.exit(print_error(error, 130) if error.args else 130)

    return command


def _reader_has_gone(error: OSError) -> bool:
    # Windows reports an invalid argument. That of a path has the path.
    invalid = sys.platform == "win32" and error.errno == errno.EINVAL and error.filename in (None, STDOUT)
    return isinstance(error, BrokenPipeError) or invalid


def _flush_stdout() -> None:
    if sys.stdout:
        with with_path(STDOUT):
            sys.stdout.flush()


def _discard_unwritable_stdout() -> None:
    """Send what stdout can't write to the null device: Python writes it again at exit."""
    try:
        _flush_stdout()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def default_sigint(handler: Any = signal.SIG_DFL) -> Iterator[None]:
    """Make Ctrl-C end the process at once. In an import, KeyboardInterrupt can be swallowed or cause a later error.

    handler: a signal handler that ends the process too.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
