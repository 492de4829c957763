"""Finds the compilers for the compiled operators, and says how to install a missing one."""

import importlib.metadata
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "ZIG_TARGETS",
    "Compiler",
    "compiler_advice",
    "describe_missing_compiler",
    "describe_nvcc_problem",
    "find_compiler",
    "find_nvcc",
    "find_zig",
    "host_platform",
    "system_compiler_advice",
]

# By a wheel's platform tag: the target for zig. glibc 2.28 and macOS 14 are the oldest that torch's wheels support.
ZIG_TARGETS = {
    "manylinux_2_28_x86_64": "x86_64-linux-gnu.2.28",
    "manylinux_2_28_aarch64": "aarch64-linux-gnu.2.28",
    "win_amd64": "x86_64-windows-gnu",
    "macosx_14_0_arm64": "aarch64-macos.14.0",
}


@dataclass(frozen=True)
class Compiler:
    """A compiler: its command in shell syntax, the program's path, and its version in one line.

    The version of nvcc is its CUDA version, such as 13.0.
    """

    command: str
    path: str
    version: str

    @property
    def title(self) -> str:
        return f"nvcc of CUDA {self.version}" if self.command == "nvcc" else self.version

    @property
    def is_zig(self) -> bool:
        """Is it zig, which can build for this machine?"""
        return Path(self.path).stem == "zig" and host_platform() is not None


def find_compiler() -> Compiler | None:
    """Find the C++ compiler: ``CXX`` if set, else the system's, else zig from the package ziglang, else None."""
    if os.environ.get("CXX"):
        candidates = [os.environ["CXX"]]
    else:
        candidates = ["cl"] if sys.platform == "win32" else ["c++", "g++", "clang++"]
    for command in candidates:
        try:
            words = shlex.split(command, posix=sys.platform != "win32")
        except ValueError:  # an unclosed quote
            words = []
        path = shutil.which(words[0]) if words else None
        if path is not None:
            return Compiler(command, path, _read_version([path, *words[1:]]))
    if os.environ.get("CXX"):
        return None
    return (_find_visual_studio() if sys.platform == "win32" else None) or find_zig()


def find_zig() -> Compiler | None:
    """Find zig in the package ziglang, if it is installed and can build for this machine."""
    spec = importlib.util.find_spec("ziglang") if host_platform() else None
    if spec is None or spec.origin is None:
        return None
    # Not `python -m ziglang`, which searches the current folder for modules.
    program = Path(spec.origin).with_name("zig.exe" if sys.platform == "win32" else "zig")
    return Compiler(shlex.join([str(program), "c++"]), str(program), f"zig {importlib.metadata.version('ziglang')}")


def host_platform() -> str | None:
    """The key of ZIG_TARGETS for this machine, or None."""
    systems = {"linux": "manylinux_2_28", "win32": "win", "darwin": "macosx_14_0"}
    name = f"{systems.get(sys.platform)}_{platform.machine().lower()}"
    is_musl = sys.platform == "linux" and platform.libc_ver()[0] != "glibc"
    return name if name in ZIG_TARGETS and not is_musl else None


def describe_missing_compiler() -> str:
    """Why there is no C++ compiler, in one clause."""
    return f"CXX={os.environ['CXX']} was not found" if os.environ.get("CXX") else "none found"


def compiler_advice() -> str:
    """How to get a C++ compiler on this system, in one clause."""
    if os.environ.get("CXX"):
        return "set CXX to a compiler, or unset it"
    if sys.platform == "win32":
        return "install a wheel of `make wheels`, or the Build Tools for Visual Studio with the C++ workload"
    return ("run `pip install ziglang`, or " if host_platform() else "") + system_compiler_advice()


def system_compiler_advice() -> str:
    """How to get the compiler that is usual on this system, in one clause; for Linux and macOS."""
    if sys.platform == "darwin":
        return "run `xcode-select --install`"
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


def find_nvcc(cuda: str) -> Compiler | None:
    """Find nvcc in ``CUDA_HOME``, on PATH, in this environment (``pip install rwkv_pl[cuda]``) or in /usr/local/cuda.

    Returns the first whose major version matches `cuda`, torch's CUDA version; else the first at all, or None.
    """
    found = None
    program = "nvcc.exe" if sys.platform == "win32" else "nvcc"
    folders = [Path(os.environ[name], "bin") for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    folders += [Path(folder) for folder in os.environ.get("PATH", "").split(os.pathsep) if folder]
    folders += [Path(folder, "nvidia", "cu13", "bin") for folder in sys.path if folder]
    folders.append(Path("/usr/local/cuda/bin"))
    for path in (folder / program for folder in folders):
        if os.access(path, os.X_OK):
            release = re.search(r"release (\d+\.\d+)", _read_version([str(path)], from_end=True))
            if release and _major_version(release[1]) == _major_version(cuda):
                return Compiler("nvcc", str(path), release[1])
            if release and found is None:
                found = Compiler("nvcc", str(path), release[1])
    return found


def describe_nvcc_problem(nvcc: Compiler | None, cuda: str) -> str:
    """Why this nvcc cannot build for a torch with CUDA version `cuda`, and the fix; "" if it can."""
    advice = f"install the CUDA toolkit {cuda} and put its nvcc on PATH"
    if _major_version(cuda) == 13:
        advice = 'run `pip install "rwkv_pl[cuda]"`'
    if nvcc is None:
        return f"no nvcc; {advice}"
    if _major_version(nvcc.version) != _major_version(cuda):
        fault = "too old" if _major_version(nvcc.version) < _major_version(cuda) else "too new"
        return f"{nvcc.path} is {fault}: its CUDA is {nvcc.version}, torch's is {cuda}; {advice}"
    return ""


def _major_version(cuda: str) -> int:
    return int(cuda.split(".")[0])


def _read_version(command: list[str], from_end: bool = False) -> str:
    # cl has no --version; without arguments it prints its version, then an error.
    argument = [] if sys.platform == "win32" else ["--version"]
    try:
        run = subprocess.run([*command, *argument], capture_output=True, text=True, errors="replace", timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"version unknown ({error})"
    lines = (run.stdout or run.stderr).splitlines() or ["version unknown"]
    return " ".join(lines[-2:]) if from_end else lines[0]


def _find_visual_studio() -> Compiler | None:
    # cl is on PATH only in a developer prompt. torch finds it through vswhere too.
    programs = os.environ.get("ProgramFiles(x86)", r"C:\Program Files (x86)")  # noqa: SIM112
    vswhere = Path(programs, "Microsoft Visual Studio", "Installer", "vswhere.exe")
    if not vswhere.exists():
        return None
    tools = "Microsoft.VisualStudio.Component.VC.Tools.x86.x64"
    query = [str(vswhere), "-latest", "-products", "*", "-requires", tools, "-property", "installationVersion"]
    version = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return Compiler("cl", "cl", version) if version else None
