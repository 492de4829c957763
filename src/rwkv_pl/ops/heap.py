"""The C library's heap."""

import contextlib
import ctypes
import mmap

from rwkv_pl.limits import free_memory


def keep_freed_memory() -> None:
    """Lets a training step reuse the memory of the step before, in huge pages if Linux has them.

    glibc returns large freed blocks to the system, which clears them again page by page: up to a third of a classic
    step on a CPU. With pages of 4 KB, address translation takes some 4% more. It is a setting of the whole process, so
    the command makes it, not the library. A second call does nothing, nor do other systems.
    """
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX, M_MMAP_MAX_DEFAULT = -1, -3, -4, 65536
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(M_TRIM_THRESHOLD, -1)
        # The heap will grow into this; untouched, it takes no memory.
        size = free_memory() // 2
        libc.malloc.restype = ctypes.c_void_p
        libc.mallopt(M_MMAP_MAX, 0)
        heap = libc.malloc(ctypes.c_size_t(size))
        libc.mallopt(M_MMAP_MAX, M_MMAP_MAX_DEFAULT)
        if heap:
            begin = -(-heap // mmap.PAGESIZE) * mmap.PAGESIZE
            libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(heap + size - begin), mmap.MADV_HUGEPAGE)
            libc.free(ctypes.c_void_p(heap))
