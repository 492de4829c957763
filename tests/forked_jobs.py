"""Fork a sweep's jobs, because each would otherwise spend five seconds on imports.

A server is forked from the sweep before it runs anything, and forks the jobs, so no job inherits Hydra's state.
"""

import os
import pickle
import select
import socket
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import IO, Any

from brief import shorten_run_end
from forks import CAN_FORK, Strike

JOB = ["-m", "rwkv_pl.cli.train"]


class ForkedJob:
    """The part of subprocess.Popen that a sweep uses."""

    def __init__(
        self,
        server: socket.socket,
        command: Sequence[str],
        *,
        stdout: int | None,
        stderr: int | None,
        env: Mapping[str, str],
        encoding: str,
        errors: str,
        **_: Any,
    ) -> None:
        def opened(place: int, asked: int | None) -> tuple[IO[str] | None, int]:
            if asked != subprocess.PIPE:
                return None, os.dup(place)
            read, write = os.pipe()
            return os.fdopen(read, encoding=encoding, errors=errors), write

        (self.stdout, out), (self.stderr, err) = opened(1, stdout), opened(2, stderr)
        what, send_what = os.pipe()
        ended, send_end = os.pipe()
        passed = [what, out, err, send_end]
        socket.send_fds(server, [b"x"], passed)
        for descriptor in passed:
            os.close(descriptor)
        with os.fdopen(send_what, "wb") as file:
            pickle.dump((list(command), dict(env)), file)
        self._ended = os.fdopen(ended)
        self.pid = int(self._ended.readline())
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._ended], [], [], 0)[0]:
            self.returncode = int(self._ended.read())
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


def _run(what: int, out: int, err: int) -> None:
    with os.fdopen(what, "rb") as file:
        (_, _, _, *arguments), environment = pickle.load(file)
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    os.dup2(out, 1)
    os.dup2(err, 2)
    shorten_run_end()
    sys.argv = ["rwkv-train", *arguments]
    from rwkv_pl.cli.train import main

    main()


def _fork_and_report(what: int, out: int, err: int, send_end: int) -> None:
    """Fork the job; send its process ID, then its exit code."""
    if pid := os.fork():
        for descriptor in (what, out, err):
            os.close(descriptor)
        os.write(send_end, f"{pid}\n".encode())
        _, status = os.waitpid(pid, 0)
        os.write(send_end, str(os.waitstatus_to_exitcode(status)).encode())
        return
    os.close(send_end)
    _run(what, out, err)


def _serve(requests: socket.socket) -> None:
    code = 0
    try:
        while True:
            message, descriptors, _, _ = socket.recv_fds(requests, 1, 4)
            if not message:  # the sweep has ended
                break
            if os.fork() == 0:
                requests.close()
                _fork_and_report(*descriptors)
                break
            for descriptor in descriptors:
                os.close(descriptor)
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _fork_the_jobs() -> None:
    if not CAN_FORK:
        return
    ours, theirs = socket.socketpair()
    if os.fork() == 0:
        ours.close()
        _serve(theirs)
    theirs.close()
    original = subprocess.Popen

    class Popen(original):  # type: ignore[misc,valid-type]
        def __new__(cls, command: Any, *args: Any, **kwargs: Any) -> Any:
            if list(command[1:3]) == JOB:
                return ForkedJob(ours, command, **kwargs)
            return super().__new__(cls)

    subprocess.Popen = Popen  # type: ignore[misc]


# Of a sweep.
FORK_THE_JOBS = Strike("rwkv_pl.cli.train:main", 1, _fork_the_jobs)
