"""Arrays that wait for their turn: in memory while they are few, in a file without a name when they are many."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from rs_tools.errors import ArtifactError

HELD_BYTES = 48 * 2**20


class _Filed(NamedTuple):
    offset: int
    shape: tuple[int, ...]


class Shelf:
    """Keeps uint8 arrays by number, and gives rows of them; one thread at a time. Use it in a `with` block.

    Args:
        folder: where the file goes, should there be one; None: the system's folder for such files.
        held_bytes: kept in memory; what comes beyond goes to the file, in which places are used again.

    Attributes:
        file_bytes: of the file.
    """

    def __init__(self, folder: Path | None = None, held_bytes: int = HELD_BYTES) -> None:
        self._folder = folder
        self._room = held_bytes
        self._kept: dict[int, np.ndarray | _Filed] = {}
        self._file: IO[bytes] | None = None
        self.file_bytes = 0
        self._free: dict[int, list[int]] = defaultdict(list)  # offsets by number of bytes

    def __enter__(self) -> Shelf:
        return self

    def __exit__(self, *_: object) -> None:
        self._kept.clear()
        if self._file is not None:
            self._file.close()

    def __iter__(self) -> Iterator[int]:
        return iter(list(self._kept))

    def put(self, number: int, array: np.ndarray) -> None:
        """Keep an array [n, ...] under a number that is not in use.

        Raises:
            ArtifactError: the file cannot be written.
        """
        if array.nbytes <= self._room:
            self._room -= array.nbytes
            self._kept[number] = array
            return
        try:
            self._kept[number] = self._filed(array)
        except OSError as error:
            raise _unwritten(error) from error

    def rows(self, number: int, rows: slice) -> np.ndarray:
        """Rows of the array of this number; not to be written to.

        Raises:
            ArtifactError: the file cannot be read.
        """
        kept = self._kept[number]
        if isinstance(kept, np.ndarray):
            return kept[rows]
        assert self._file is not None
        row = int(np.prod(kept.shape[1:]))
        try:
            self._file.seek(kept.offset + rows.start * row)
            content = self._file.read((rows.stop - rows.start) * row)
        except OSError as error:
            raise _unwritten(error) from error
        return np.frombuffer(content, np.uint8).reshape(-1, *kept.shape[1:])

    def drop(self, number: int) -> None:
        kept = self._kept.pop(number)
        if isinstance(kept, np.ndarray):
            self._room += kept.nbytes
        else:
            self._free[int(np.prod(kept.shape))].append(kept.offset)

    def _filed(self, array: np.ndarray) -> _Filed:
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 - closed with the shelf
        free = self._free[array.nbytes]
        offset = free.pop() if free else self.file_bytes
        self.file_bytes = max(self.file_bytes, offset + array.nbytes)
        self._file.seek(offset)
        self._file.write(np.ascontiguousarray(array).data)
        return _Filed(offset, array.shape)


def _unwritten(error: OSError) -> ArtifactError:
    return ArtifactError(f"The mask cannot be kept on the disk: {error.strerror}. Is there room on it?")
