"""What a forked process cannot go on with, made anew in it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Generic, TypeVar

_T = TypeVar("_T")


class OfProcess(Generic[_T]):
    """Something that every process has for itself, as it holds an event loop, connections or locks."""

    def __init__(self, make: Callable[[], _T]) -> None:
        self._make = make
        self._made = os.getpid(), make()

    def get(self) -> _T:
        """That of this process."""
        if self._made[0] != os.getpid():
            self._made = os.getpid(), self._make()
        return self._made[1]
