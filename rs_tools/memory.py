"""Freed memory given back to the system while a large scene is worked on.

glibc gives every thread an arena of its own and keeps what is freed in it for that thread alone. The blocks and windows
of a scene, freed by one thread, would stay beside those of the next, and the process grow with each step of a call
though little of its memory is in use.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from pathlib import Path

GROWTH = 96 * 2**20
_STATM = Path("/proc/self/statm")
_lock = threading.Lock()
_lowest = 0  # resident bytes, since memory was given back last


def give_back(growth: int = GROWTH) -> None:
    """Give back what is free where the process has grown by so many bytes since the last time.

    Only then, as a page that is used again must be zeroed again. Without growth, or without glibc, it takes some
    microseconds.
    """
    global _lowest
    if _TRIM is None or not _lock.acquire(blocking=False):
        return  # another thread is at it
    try:
        resident = _resident()
        _lowest = min(_lowest or resident, resident)
        if resident > _lowest + growth:
            _TRIM(0)
            _lowest = _resident()
    finally:
        _lock.release()


def _resident() -> int:
    """Bytes of this process in memory."""
    return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _trim() -> Callable[[int], int] | None:
    """glibc's `malloc_trim`; None in a process without it."""
    try:
        return ctypes.CDLL(None).malloc_trim if _STATM.exists() else None
    except (AttributeError, TypeError, OSError):
        return None


_TRIM = _trim()
