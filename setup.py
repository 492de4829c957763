"""Build a platform wheel if it contains compiled libraries, else a pure one. See `make wheels`."""

from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel

PREBUILT = any(Path(__file__).parent.joinpath("src", "rwkv_pl", "prebuilt").glob("*_cpu-*"))


class Wheel(bdist_wheel):
    """One wheel works for every Python: the libraries use the LibTorch stable ABI and not Python's."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = not PREBUILT

    def get_tag(self) -> tuple[str, str, str]:
        tag = super().get_tag()
        return ("py3", "none", tag[2]) if PREBUILT else tag


setup(cmdclass={"bdist_wheel": Wheel})
