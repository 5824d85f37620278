"""Images that callers hand over, and the handles that they are named by afterwards.

A handle is 128 random bits and of use to the caller who got it alone: the name of its file is made from both, so a
foreign handle leads to a file that is not there, just as one that was never given does. Nothing else is remembered:
handles outlive a restart, and several processes may share a folder. Files go when their lifetime is over.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from rs_tools.errors import AccessError

SCHEME = "rs-upload"
LIFETIME_S = 3600.0
MAX_FILE = 256 * 2**20
MAX_CALLER = 2**30  # of all uploads of one caller together
MAX_TOTAL = 4 * 2**30

_HANDLE = re.compile(rf"{SCHEME}://[0-9a-f]{{32}}")
_KEPT = re.compile(r"[0-9a-f]{16}-[0-9a-f]{64}")
_WRITING = ".writing-"


class UploadRefused(Exception):
    """The upload is too large, or there is no room for it; the message names the limit."""


class TooLarge(UploadRefused):
    """More than one upload may have."""


class NoRoom(UploadRefused):
    """The caller's uploads, or those of all callers, leave too little room until some have expired."""


@dataclass(frozen=True)
class UploadedImage:
    """An image that was handed over. Known to exist for its caller when it was resolved."""

    handle: str
    path: Path

    @property
    def name(self) -> str:
        return "the uploaded image"

    def __str__(self) -> str:
        return self.handle


@dataclass(frozen=True)
class Incoming:
    """An upload on its way: `file` takes its bytes, `image` is what it becomes by `UploadedFiles.keep`."""

    path: Path
    file: BinaryIO
    image: UploadedImage

    @property
    def uploaded(self) -> UploadedImage:
        """The image where it lies now, so that it can be looked at before it is kept."""
        return UploadedImage(self.image.handle, self.path)


class UploadedFiles:
    """The folder of uploads. Safe to use from many threads.

    Args:
        folder: of its own; made where it does not exist, for this user only.
        caller: tells who is calling; asked in the context of the call.
        lifetime_s: seconds that an upload is kept.
        max_file, max_caller, max_total: bytes of one upload, of one caller's, and of all together.

    Raises:
        OSError: the folder cannot be made.
    """

    def __init__(
        self,
        folder: str | Path,
        caller: Callable[[], str],
        *,
        lifetime_s: float = LIFETIME_S,
        max_file: int = MAX_FILE,
        max_caller: int = MAX_CALLER,
        max_total: int = MAX_TOTAL,
    ) -> None:
        Path(folder).expanduser().mkdir(mode=0o700, parents=True, exist_ok=True)
        self.folder = Path(folder).expanduser().resolve()
        self.lifetime_s = lifetime_s
        self._caller = caller
        self._max_file, self._max_caller, self._max_total = max_file, max_caller, max_total
        self._lock = threading.Lock()
        self._reserved: dict[Path, tuple[str, int]] = {}

    def resolve(self, image: str) -> UploadedImage:
        """The upload that a handle names.

        Raises:
            AccessError: no handle of this caller's, or no longer.
        """
        if _HANDLE.fullmatch(image):
            path = self.folder / _file_name(self._caller(), image)
            if self._alive(path):
                return UploadedImage(image, path)
        raise AccessError(
            f"There is no such upload. Handles look like {SCHEME}://..., are of use only to the caller who got them, "
            f"and last {self.lifetime_s / 60:g} minutes. Upload the image again; list_images shows what else there is."
        )

    @contextmanager
    def receive(self, size: int) -> Iterator[Incoming]:
        """A file for an upload of `size` bytes, for which there is room; gone afterwards unless `keep` took it.

        Raises:
            UploadRefused: too large, or no room for it.
            OSError: it cannot be written.
        """
        caller = self._caller()
        handle = f"{SCHEME}://{secrets.token_hex(16)}"
        descriptor, name = tempfile.mkstemp(prefix=_WRITING, dir=self.folder)
        path = Path(name)
        try:
            with open(descriptor, "wb") as file:
                self._reserve(path, caller, size)
                yield Incoming(path, file, UploadedImage(handle, self.folder / _file_name(caller, handle)))
        finally:
            with self._lock:
                self._reserved.pop(path, None)
            path.unlink(missing_ok=True)

    def keep(self, incoming: Incoming) -> UploadedImage:
        """Give a received file its name; its handle works from here on."""
        incoming.file.flush()
        os.replace(incoming.path, incoming.image.path)
        return incoming.image

    def _reserve(self, path: Path, caller: str, size: int) -> None:
        if size > self._max_file:
            raise TooLarge(f"The image has {size} bytes; an upload may have {self._max_file}.")
        owner = _owner(caller)
        with self._lock:
            kept = self._sweep()
            total = sum(kept.values()) + sum(size for _, size in self._reserved.values())
            own = sum(size for name, size in kept.items() if name.startswith(f"{owner}-"))
            own += sum(size for other, size in self._reserved.values() if other == owner)
            if own + size > self._max_caller:
                raise NoRoom(f"Your uploads have {own} bytes, and all of one caller may have {self._max_caller}.")
            if total + size > self._max_total:
                raise NoRoom(f"The uploads of all callers fill the {self._max_total} bytes there are for them.")
            self._reserved[path] = (owner, size)

    def _sweep(self) -> dict[str, int]:
        """Remove what is past its lifetime; the names and sizes of the uploads that stay."""
        kept: dict[str, int] = {}
        for entry in os.scandir(self.folder):
            path = Path(entry.path)
            if not _KEPT.fullmatch(entry.name) and (not entry.name.startswith(_WRITING) or path in self._reserved):
                continue
            if not self._alive(path):
                path.unlink(missing_ok=True)
            elif _KEPT.fullmatch(entry.name):
                kept[entry.name] = path.stat().st_size
        return kept

    def _alive(self, path: Path) -> bool:
        try:
            return path.lstat().st_mtime >= time.time() - self.lifetime_s
        except FileNotFoundError:
            return False


def _owner(caller: str) -> str:
    return hashlib.sha256(caller.encode()).hexdigest()[:16]


def _file_name(caller: str, handle: str) -> str:
    both = "\0".join((caller, handle))
    return f"{_owner(caller)}-{hashlib.sha256(both.encode()).hexdigest()}"
