"""How every command starts and ends: an environment that imports nothing of a stranger's, errors as one line.

Only Hydra and the standard library are imported here, so that a mistake is reported before anything heavy is loaded.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from rwkv_pl.errors import RunError, UserError
from rwkv_pl.files import describe_os_error
from rwkv_pl.terminal import FAILED, print_error


def cli_entry_point(main: Callable[[], None]) -> Callable[[], None]:
    """A command that ends with one line and exit code 2 on bad input, 1 when the system refuses something."""

    def command() -> None:
        # Hydra then raises what it would print over several lines.
        os.environ.setdefault("HYDRA_FULL_ERROR", "1")
        if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
            # Threads of OpenMP spin while they wait for each other, by default so long that other work on the same
            # cores slows a training ten times and more. Read when torch is loaded.
            os.environ["GOMP_SPINCOUNT"] = "10000"
        try:
            with safe_import_path():
                main()
        except RunError as error:
            sys.exit(print_error(error, FAILED))
        except (UserError, HydraException, OmegaConfBaseException) as error:
            sys.exit(print_error(error))
        except BrokenPipeError:
            # As of `| head`. What Python would flush at its end goes nowhere.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(FAILED)
        except OSError as error:
            # A full disk, a folder that went away: what was written before is whole.
            sys.exit(print_error(describe_os_error(error), FAILED))
        except KeyboardInterrupt:
            sys.exit(130)

    return command


# Folders that the environment names. A relative one counts from where the command was typed.
FOLDER_VARIABLES = ("RWKV_PL_CACHE", "RWKV_PL_CONFIG")


@contextlib.contextmanager
def safe_import_path() -> Iterator[None]:
    """Python processes started inside, by whatever library, import nothing from the folder in which they start.

    That folder may be a stranger's: a resumed sweep's jobs start where the sweep's multirun.yaml says. Relative and
    empty entries of PYTHONPATH keep the meaning that they have for this process.

    This process looks for no plug-ins there either: an editable install leaves a relative name on sys.path, below which
    torch and Lightning would find entry points.
    """
    import hydra_plugins.rwkv_pl  # noqa: F401  an editable install finds it by that name

    path = list(sys.path)
    sys.path[:] = [entry for entry in path if Path(entry).is_absolute()]
    before = {name: os.environ.get(name) for name in ("PYTHONSAFEPATH", "PYTHONPATH", *FOLDER_VARIABLES)}
    os.environ["PYTHONSAFEPATH"] = "1"
    for name in ("PYTHONPATH", *FOLDER_VARIABLES):
        if before[name]:
            entries = str(before[name]).split(os.pathsep) if name == "PYTHONPATH" else [str(before[name])]
            os.environ[name] = os.pathsep.join(str(Path(entry).absolute()) for entry in entries)
    try:
        yield
    finally:
        sys.path[:] = path
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextlib.contextmanager
def default_sigint() -> Iterator[None]:
    """Ctrl-C ends the process at once: an import may swallow what Python raises for it, or fail of it later."""
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
