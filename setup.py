"""Build a platform wheel if it contains compiled libraries, else a pure one. See `make wheel`."""

import platform
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel

PREBUILT = any(Path(__file__).parent.joinpath("src", "rwkv_pl", "prebuilt").glob("*.so"))


class Wheel(bdist_wheel):
    """One wheel works for every Python: the libraries use the LibTorch stable ABI and not Python's."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = not PREBUILT

    def get_tag(self) -> tuple[str, str, str]:
        if not PREBUILT:
            return super().get_tag()
        where = super().get_tag()[2]
        library, version = platform.libc_ver()
        if library == "glibc":
            where = where.replace("linux", "manylinux_" + "_".join(version.split(".")[:2]), 1)
        return "py3", "none", where


setup(cmdclass={"bdist_wheel": Wheel})
