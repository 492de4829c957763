"""Settings of the C library's heap."""

import ctypes
import functools
import mmap

from rwkv_pl.limits import free_memory


@functools.cache
def tune_allocator() -> bool:
    """Let a training step on a CPU reuse the memory of the step before, in huge pages if Linux has them.

    By default glibc returns large freed blocks to the system, which clears them page by page for the next step: up to a
    third of the time of a classic step. With 4 KB pages, address translation takes about 4% more.

    The commands and LitRWKV call it. In a loop of your own, call it before the first step; it also works later, for the
    steps after it. It changes the whole process, whose freed memory then stays with it until it ends. A second call
    does nothing.

    Returns whether it took effect: False if the process does not use glibc's allocator, as on macOS, on Windows, on
    Alpine, or with jemalloc.
    """
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX, M_MMAP_MAX_DEFAULT = -1, -3, -4, 65536
    try:
        libc = ctypes.CDLL("libc.so.6")
        set_option = libc.mallopt
        # Another allocator, loaded before, replaces malloc for the process, but not in this library.
        used, own = (ctypes.cast(library.malloc, ctypes.c_void_p).value for library in (ctypes.CDLL(None), libc))
    except (OSError, AttributeError, TypeError):  # the C library is not glibc; Windows cannot open None
        return False
    if used != own or not (set_option(M_MMAP_THRESHOLD, 32 << 20) and set_option(M_TRIM_THRESHOLD, -1)):
        return False
    # The heap will grow into this block. Untouched pages take no memory.
    size = free_memory() // 2
    libc.malloc.restype = ctypes.c_void_p
    set_option(M_MMAP_MAX, 0)
    heap = libc.malloc(ctypes.c_size_t(size))
    set_option(M_MMAP_MAX, M_MMAP_MAX_DEFAULT)
    if heap:
        begin = -(-heap // mmap.PAGESIZE) * mmap.PAGESIZE
        libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(heap + size - begin), mmap.MADV_HUGEPAGE)
        libc.free(ctypes.c_void_p(heap))
    return True
