"""Functions of Windows that Python does not offer."""

import ctypes
import functools
import subprocess
import sys
from pathlib import Path

if sys.platform == "win32":
    import msvcrt
    from ctypes import wintypes

    _kernel32 = ctypes.WinDLL("kernel32", use_last_error=True)

    class _BasicInfo(ctypes.Structure):
        """FILE_BASIC_INFO: times in units of 100 ns."""

        _fields_ = (
            *((name, ctypes.c_int64) for name in ("creation", "access", "write", "change")),
            ("attributes", wintypes.DWORD),
        )

    class _Limits(ctypes.Structure):
        """JOBOBJECT_EXTENDED_LIMIT_INFORMATION."""

        _fields_ = (
            ("times", ctypes.c_int64 * 2),
            ("flags", wintypes.DWORD),
            ("working_set", ctypes.c_size_t * 2),
            ("active_processes", wintypes.DWORD),
            ("affinity", ctypes.c_size_t),
            ("classes", wintypes.DWORD * 2),
            ("io", ctypes.c_uint64 * 6),
            ("memory", ctypes.c_size_t * 4),
        )

    def changed_ns(path: Path) -> int:
        """When the file or its metadata last changed. Programs that set a file's other times can't set this one."""
        info = _BasicInfo()
        with path.open("rb") as file:
            handle = wintypes.HANDLE(msvcrt.get_osfhandle(file.fileno()))
            if not _kernel32.GetFileInformationByHandleEx(handle, 0, ctypes.byref(info), ctypes.sizeof(info)):
                raise ctypes.WinError(ctypes.get_last_error())
        return int(info.change) * 100

    @functools.cache
    def _job() -> wintypes.HANDLE:
        """A job object whose processes end when its last handle is closed, which is this one."""
        _kernel32.CreateJobObjectW.restype = wintypes.HANDLE
        job = wintypes.HANDLE(_kernel32.CreateJobObjectW(None, None))
        limits = _Limits(flags=0x2000)  # JOB_OBJECT_LIMIT_KILL_ON_JOB_CLOSE
        _kernel32.SetInformationJobObject(job, 9, ctypes.byref(limits), ctypes.sizeof(limits))
        return job

    def end_with_this_process(process: "subprocess.Popen[str]") -> None:
        """End the process, and all that it starts, at the latest when this process ends, even if it is killed."""
        handle = wintypes.HANDLE(int(process._handle))  # type: ignore[attr-defined]
        _kernel32.AssignProcessToJobObject(_job(), handle)
