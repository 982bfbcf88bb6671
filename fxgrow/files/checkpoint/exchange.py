"""Two ways to rename that Python lacks: swap two names, and take a name only if it is free.

Linux and macOS have both as system calls, which a file system may not support (NFS does not).
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path

_SWAP = 2  # RENAME_EXCHANGE of Linux, RENAME_SWAP of macOS
_NEW = 4 if sys.platform == "darwin" else 1  # RENAME_EXCL, RENAME_NOREPLACE
_CURRENT_DIRECTORY = -100  # AT_FDCWD of Linux
_UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)


def exchange(one: Path, other: Path) -> bool:
    """Let two files or directories swap their names in one step.

    Args:
        one: a file or a directory.
        other: another one on the same file system.

    Returns:
        Whether the system can do that; if not, nothing has changed.

    Raises:
        OSError: it can, and failed; nothing has changed.
    """
    return _rename(one, other, _SWAP)


def rename_new(path: Path, to: Path) -> None:
    """Rename a file or a directory unless the new name is taken.

    Args:
        path: a file or a directory.
        to: its new name on the same file system.

    Raises:
        FileExistsError: the new name is taken.
        OSError: it cannot be renamed.
    """
    if _rename(path, to, _NEW):
        return
    if os.path.lexists(to):  # just before is the best that this system can do
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path), None, str(to))
    os.rename(path, to)


def _rename(path: Path, to: Path, flags: int) -> bool:
    """Call the system; return False if it does not know these flags."""
    call = _system_call()
    if call is None:
        return False
    if call(os.fsencode(path), os.fsencode(to), flags) == 0:
        return True
    number = ctypes.get_errno()
    if number in _UNSUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(path), None, str(to))


@functools.cache
def _system_call() -> Callable[[bytes, bytes, int], int] | None:
    """Return the system's call that takes two paths and flags, or None where there is none."""
    if sys.platform == "win32":
        return None
    library = ctypes.CDLL(None, use_errno=True)
    if sys.platform == "darwin":
        swap = getattr(library, "renamex_np", None)
        if swap is not None:
            swap.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_uint)
        return swap
    rename = getattr(library, "renameat2", None)  # glibc has it since 2018
    if rename is None:
        return None
    text, number = ctypes.c_char_p, ctypes.c_int
    rename.argtypes = (number, text, number, text, ctypes.c_uint)

    def call(path: bytes, to: bytes, flags: int) -> int:
        found: int = rename(_CURRENT_DIRECTORY, path, _CURRENT_DIRECTORY, to, flags)
        return found

    return call
