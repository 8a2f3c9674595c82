"""A file that lies in memory, for libraries that read paths only."""

from __future__ import annotations

import os
import tempfile


def memory_file(content: bytes) -> tuple[int, str]:
    """(handle, path) of a file that exists while the handle is open, in memory where the system can."""
    if hasattr(os, "memfd_create"):
        handle = os.memfd_create("video", os.MFD_CLOEXEC)
    else:
        handle, path = tempfile.mkstemp()
        os.unlink(path)
    view = memoryview(content)
    while view:
        view = view[os.write(handle, view) :]
    os.lseek(handle, 0, os.SEEK_SET)
    return handle, f"/proc/self/fd/{handle}" if os.path.isdir("/proc/self/fd") else f"/dev/fd/{handle}"
