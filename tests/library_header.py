"""What a compiled library says of itself: the system, the processor, and what it is linked with."""

import re
import struct
from pathlib import Path


def read_machine(library: bytes) -> tuple[str, int]:
    """The format and the processor's number from a library's header."""
    if library.startswith(b"\x7fELF"):
        return "ELF", struct.unpack_from("<H", library, 18)[0]
    if library.startswith(b"MZ"):
        (header,) = struct.unpack_from("<I", library, 60)
        assert library[header : header + 4] == b"PE\0\0"
        return "PE", struct.unpack_from("<H", library, header + 4)[0]
    magic, processor = struct.unpack_from("<II", library)
    assert magic == 0xFEEDFACF
    return "Mach-O", processor


EXPECTED = {
    "manylinux_2_28_x86_64": ("ELF", 62, b"\0libtorch_cpu.so\0"),
    "manylinux_2_28_aarch64": ("ELF", 183, b"\0libtorch_cpu.so\0"),
    "win_amd64": ("PE", 0x8664, b"torch_cpu.dll\0"),
    "macosx_14_0_arm64": ("Mach-O", 0x0100000C, b"@rpath/libtorch_cpu.dylib\0"),
}


def assert_library_fits(path: Path, platform_tag: str) -> None:
    """The header names the system and the processor, and the library links torch by its name there."""
    assert path.suffix == (".pyd" if platform_tag == "win_amd64" else ".so")
    library = path.read_bytes()
    kind, processor, link = EXPECTED[platform_tag]
    assert read_machine(library) == (kind, processor) and link in library
    versions = [int(minor) for minor in re.findall(rb"\0GLIBC_2\.(\d+)", library)]
    assert max(versions, default=0) <= 28 and bool(versions) == (kind == "ELF")
