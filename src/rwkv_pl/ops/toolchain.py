"""What is installed to build the compiled operators with, and what to do where something is missing."""

import os
import platform
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Compiler", "compiler_advice", "find_compiler"]


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler: the command as a shell would take it, the program's path, and its version in one line."""

    command: str
    path: str
    version: str


def find_compiler() -> Compiler | None:
    """The C++ compiler: ``CXX`` where set, else the system's; None where there is none that runs."""
    if os.environ.get("CXX"):
        candidates = [os.environ["CXX"]]
    else:
        candidates = ["cl"] if sys.platform == "win32" else ["c++", "g++", "clang++"]
    for command in candidates:
        words = shlex.split(command, posix=sys.platform != "win32")
        path = shutil.which(words[0]) if words else None
        if path is not None:
            return Compiler(command, path, _version([path, *words[1:]]))
    return _visual_studio() if sys.platform == "win32" and not os.environ.get("CXX") else None


def compiler_advice() -> str:
    """How to get a C++ compiler on this system, in one clause."""
    if sys.platform == "darwin":
        return "run `xcode-select --install`"
    if sys.platform == "win32":
        return "install the Build Tools for Visual Studio with the C++ workload"
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        release = {}
    family = {release.get("ID", ""), *release.get("ID_LIKE", "").split()}
    if family & {"debian", "ubuntu"}:
        return "run `apt install g++`"
    if family & {"fedora", "rhel", "centos"}:
        return "run `dnf install gcc-c++`"
    return "install g++ or clang++ with the system's package manager"


def _version(command: list[str]) -> str:
    # cl knows no --version; it says its version before it complains.
    argument = [] if sys.platform == "win32" else ["--version"]
    try:
        run = subprocess.run([*command, *argument], capture_output=True, text=True, errors="replace", timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"version unknown ({error})"
    return next(iter((run.stdout or run.stderr).splitlines()), "version unknown")


def _visual_studio() -> Compiler | None:
    # cl is on PATH only in a developer prompt; torch finds it by way of the same program.
    programs = os.environ.get("ProgramFiles(x86)", r"C:\Program Files (x86)")  # noqa: SIM112
    vswhere = Path(programs, "Microsoft Visual Studio", "Installer", "vswhere.exe")
    if not vswhere.exists():
        return None
    tools = "Microsoft.VisualStudio.Component.VC.Tools.x86.x64"
    query = [str(vswhere), "-latest", "-products", "*", "-requires", tools, "-property", "installationVersion"]
    version = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return Compiler("cl", "cl", version) if version else None
