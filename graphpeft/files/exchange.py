"""Exchange the names of two folders in one step: a kill leaves either state, and never an empty place.

Operating systems can do this, but Python has no call for it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from pathlib import Path

EXCHANGE = 2
"""RENAME_EXCHANGE of Linux's renameat2 and RENAME_SWAP of macOS's renamex_np have the same value."""
HERE = -100
"""Linux's AT_FDCWD: paths are relative to the working directory."""
UNABLE = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP}


def swap_dirs(one: Path, other: Path) -> bool:
    """Exchange two folders of one file system. Returns false, and does nothing, if the system or file system cannot.

    Raises `OSError` if it can but fails.
    """
    a, b = os.fsencode(one), os.fsencode(other)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "darwin":
            failed = libc.renamex_np(a, b, EXCHANGE)
        else:
            failed = libc.renameat2(HERE, a, HERE, b, EXCHANGE)
    except (AttributeError, OSError, TypeError):  # no such call, or no such library
        return False
    if failed:
        code = ctypes.get_errno()
        if code not in UNABLE:
            raise OSError(code, os.strerror(code), str(one))
    return not failed
