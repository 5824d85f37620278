"""The folder of the files that answers refer to: their names, how long they are kept, and how much.

All lie in one folder that holds nothing else. A file appears whole or not at all: it is written in a folder of its own
and then renamed. Names cannot be guessed, and are lower-case hexadecimal because the host part of a URI, where some
clients put them, does not keep its case. Files go when their lifetime is over, or, oldest first, when the folder
is full; what is not named like an artifact is never touched.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from rasterio._err import CPLE_BaseError  # what escapes rasterio unwrapped; it has no public name
from rasterio.errors import RasterioError

from rs_tools.errors import ArtifactError
from rs_tools.results import MIME_TYPES, SCHEME, Artifact

LIFETIME_S = 24 * 3600.0
MAX_BYTES = 5 * 2**30
MAX_READ = 32 * 2**20  # of a file that is handed over as a whole; larger ones are opened where they lie
SIDECAR = ".aux.xml"  # GDAL's, beside a file of its own; kept and removed with it

Kind = Literal["mask", "vectors", "preview"]
_NAME = re.compile(r"(mask|vectors|preview)-[0-9a-f]{32}(\.tif|\.geojson|\.pixels\.json|\.png)")
_WRITING = ".writing-"


class ArtifactFolder:
    """Safe to use from many threads; several processes may share a folder.

    Args:
        folder: made where it does not exist, for this user only.
        lifetime_s: seconds that a file is kept.
        max_bytes: of all files together.

    Raises:
        ArtifactError: the folder cannot be made.
    """

    def __init__(self, folder: str | Path, lifetime_s: float = LIFETIME_S, max_bytes: int = MAX_BYTES) -> None:
        try:
            Path(folder).expanduser().mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ArtifactError(f"The artifact folder cannot be made: {error.strerror}. Name another one.") from error
        self.folder = Path(folder).expanduser().resolve()
        self.lifetime_s = lifetime_s
        self.max_bytes = max_bytes
        self._lock = threading.Lock()
        self._active: set[str] = set()

    @contextmanager
    def writing(self, kind: Kind, suffix: str) -> Iterator[tuple[Path, Callable[[], Artifact]]]:
        """A path to write to and the function that makes an artifact of it; afterwards nothing else remains."""
        with reported(kind):
            self.sweep()
            folder = Path(tempfile.mkdtemp(prefix=_WRITING, dir=self.folder))
        self._active.add(folder.name)
        temporary = folder / f"file{suffix}"
        try:
            yield temporary, lambda: self._keep(temporary, kind, suffix)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            self._active.discard(folder.name)

    def resolve(self, uri: str) -> Path:
        """The path of an `rs-artifact://NAME` URI.

        Raises:
            ArtifactError: not such a URI, or no such file (any more).
        """
        name = uri.removeprefix(f"{SCHEME}://").removesuffix("/")
        if not uri.startswith(f"{SCHEME}://") or not _NAME.fullmatch(name):
            raise ArtifactError(f"{uri[:120]!r} is not an artifact; artifacts are named {SCHEME}://NAME in answers.")
        path = self.folder / name
        status = _status(path)
        if status is None or self._expired(status):
            hours = f"{self.lifetime_s / 3600:.3g}"
            raise ArtifactError(f"There is no artifact {name}: files are kept {hours} hours. Ask the tool again.")
        return path

    def read(self, uri: str) -> bytes:
        """The content of an `rs-artifact://NAME` URI.

        Raises:
            ArtifactError: as `resolve`, or the file has more than `MAX_READ` bytes.
        """
        path = self.resolve(uri)
        size = path.stat().st_size
        if size > MAX_READ:
            raise ArtifactError(
                f"{path.name} has {size / 1e6:.1f} MB; {MAX_READ / 1e6:.1f} MB are handed over. Open {path} itself."
            )
        return path.read_bytes()

    def sweep(self) -> None:
        """Remove what is past its lifetime: artifacts, and what a writer that died left behind."""
        with self._lock:
            for path, status in self._artifacts():
                if self._expired(status):
                    _remove(path)
            for entry in os.scandir(self.folder):
                if entry.name.startswith(_WRITING) and entry.name not in self._active:
                    newest = _newest(Path(entry.path))
                    if newest is not None and newest < time.time() - self.lifetime_s:
                        shutil.rmtree(entry.path, ignore_errors=True)

    def _keep(self, temporary: Path, kind: Kind, suffix: str) -> Artifact:
        name = f"{kind}-{secrets.token_hex(16)}{suffix}"
        path, sidecar = self.folder / name, Path(f"{temporary}{SIDECAR}")
        size = temporary.stat().st_size + (sidecar.stat().st_size if sidecar.exists() else 0)
        if size > self.max_bytes:
            raise ArtifactError(
                f"The {kind} file has {size / 1e6:.1f} MB; at most {self.max_bytes / 1e6:.1f} MB are kept. "
                "Ask about a smaller region."
            )
        with self._lock:
            self._make_room(size)
            if sidecar.exists():
                os.replace(sidecar, f"{path}{SIDECAR}")
            os.replace(temporary, path)
        return Artifact(name=name, kind=kind, uri=f"{SCHEME}://{name}", path=str(path), mime_type=MIME_TYPES[suffix])

    def _make_room(self, size: int) -> None:
        kept = sorted(self._artifacts(), key=lambda one: one[1].st_mtime_ns)
        total = sum(_bytes(path, status) for path, status in kept)
        for path, status in kept:
            if total + size <= self.max_bytes:
                return
            total -= _bytes(path, status)
            _remove(path)

    def _artifacts(self) -> list[tuple[Path, os.stat_result]]:
        named = [Path(entry.path) for entry in os.scandir(self.folder) if _NAME.fullmatch(entry.name)]
        return [(path, status) for path in named if (status := _status(path)) is not None]

    def _expired(self, status: os.stat_result) -> bool:
        return status.st_mtime < time.time() - self.lifetime_s


@contextmanager
def reported(kind: Kind) -> Iterator[None]:
    """Failures to write as errors for the caller."""
    try:
        yield
    except (OSError, RasterioError, CPLE_BaseError) as error:
        reason = getattr(error, "strerror", None) or "the raster driver failed"
        raise ArtifactError(f"The {kind} file cannot be written: {reason}. Is there room on the disk?") from error


def _status(path: Path) -> os.stat_result | None:
    """Of a plain file; None where there is none (another process may have removed it) or where it is a link."""
    try:
        status = path.lstat()
    except OSError:
        return None
    return status if stat.S_ISREG(status.st_mode) else None


def _bytes(path: Path, status: os.stat_result) -> int:
    sidecar = _status(Path(f"{path}{SIDECAR}"))
    return status.st_size + (sidecar.st_size if sidecar else 0)


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
    Path(f"{path}{SIDECAR}").unlink(missing_ok=True)


def _newest(folder: Path) -> float | None:
    """When anything in a folder was last written; None where it is gone."""
    try:
        return max([folder.stat().st_mtime, *(entry.stat().st_mtime for entry in os.scandir(folder))])
    except OSError:
        return None
