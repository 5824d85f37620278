"""Which files may be read.

An image name is resolved through symbolic links and `..`, compared with the allowed folders, and then opened folder by
folder from the allowed one without following any link, so that what is opened is what was checked, even if links change
in between. (A hard link inside an allowed folder is a file inside it.) `formats` turns the opened file into a raster;
`remote` does the same for images behind https addresses, which are off unless hosts are allowed, and `uploads` keeps
what callers handed over, each for that caller alone.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from rasterio.io import DatasetReader

from rs_tools.errors import AccessError, ImageError
from rs_tools.imagery.formats import SIDECARS, ByteSource, opened
from rs_tools.imagery.remote import RemoteFiles, RemoteImage
from rs_tools.imagery.uploads import SCHEME as UPLOAD_SCHEME
from rs_tools.imagery.uploads import UploadedFiles, UploadedImage

EXTENSIONS = frozenset({".tif", ".tiff", ".png", ".jpg", ".jpeg", ".jp2", ".j2k", ".webp"})

Source = Path | RemoteImage | UploadedImage


class Stamp(NamedTuple):
    """Tells one state of a file from another."""

    modified_ns: int
    size: int
    identity: str  # device and inode, or the version that a web server gives


class AccessPolicy:
    """The folders, and the hosts on the web, that images may be read from.

    Args:
        roots: existing folders. Everything below them may be read; links out of them are refused.
        hosts: names of hosts whose https addresses may be read, `HOST` or `HOST:PORT`; none by default.
        uploads: what callers handed over, where they can.

    Attributes:
        remote: reads from those hosts.
        uploads: as given.

    Raises:
        AccessError: a root is not an existing folder, or a host is not a plain host name.
    """

    def __init__(
        self, roots: Iterable[str | Path], hosts: Iterable[str] = (), uploads: UploadedFiles | None = None
    ) -> None:
        self.roots = tuple(_folder(root) for root in roots)
        self.remote = RemoteFiles(hosts)
        self.uploads = uploads

    def resolve(self, image: str) -> Source:
        """The real path of an image that may be read, or the state of an https address, or an upload of the caller's.

        A relative name is looked up in each root.

        Raises:
            AccessError: not a plain path, outside the roots, no such file, or an address that is not allowed. The
                message names the roots only.
            ImageError: the server of an address does not answer as it must.
        """
        if self.uploads is not None and image.startswith(f"{UPLOAD_SCHEME}://"):
            return self.uploads.resolve(image)
        if "://" in image:
            return self.remote.resolve(image)
        _refuse_special(image)
        for candidate in self._candidates(image):
            if self._allows(candidate) and _is_file(candidate):
                return candidate
        if any(self._allows(candidate) for candidate in self._candidates(image)):
            raise AccessError(f"There is no image file {_shown(image)}. {self._hint()}")
        raise AccessError(f"{_shown(image)} is outside the allowed folders. {self._hint()}")

    def images(self, folder: str = "") -> Iterator[Path]:
        """Files with an image's extension below `folder` (empty: below every root), sorted within each folder.

        Links to folders are not followed; links to files count where their target lies inside the roots.

        Raises:
            AccessError: no such folder inside the roots.
        """
        for top in self._folders(folder):
            for where, folders, names in os.walk(top):
                folders.sort()
                for name in sorted(names):
                    path = Path(where, name)
                    if path.suffix.lower() in EXTENSIONS and self._allows(_real(path)) and _is_file(path):
                        yield path

    @contextmanager
    def open(self, source: Source) -> Iterator[DatasetReader]:
        """Open a resolved image as a raster. Failures to read inside the `with` block are reported as ImageError too.

        Raises:
            AccessError: the file, or a sidecar file of it, lies outside the roots.
            ImageError: not a readable raster, or beyond a limit; names the driver and the reason.
        """
        with self.file(source) as file, self.dataset(source, file) as dataset:
            yield dataset

    @contextmanager
    def file(self, source: Source) -> Iterator[ByteSource]:
        """The bytes of a resolved image.

        Raises:
            AccessError: the file lies outside the roots.
            ImageError: it cannot be opened.
        """
        if isinstance(source, RemoteImage):
            yield self.remote.file(source)
            return
        if isinstance(source, UploadedImage):
            with _plain_file(source.path.parent, source.path, source.name) as file:
                yield file
            return
        with self._local(source) as file:
            yield file

    @contextmanager
    def dataset(self, source: Source, file: ByteSource) -> Iterator[DatasetReader]:
        """As `open`, for a file that `file` opened. Uploads, and images behind an address, have no sidecar files."""
        with ExitStack() as stack:
            sidecars: dict[str, ByteSource] = {}
            if isinstance(source, Path):
                for ending in SIDECARS:
                    if _is_file(beside := source.with_name(source.name + ending)):
                        sidecars[ending] = stack.enter_context(self._local(_real(beside)))
            yield stack.enter_context(opened(file, sidecars))

    @contextmanager
    def _local(self, path: Path) -> Iterator[LocalFile]:
        root = next((root for root in self.roots if path.is_relative_to(root)), None)
        if root is None:
            raise AccessError(f"The image draws on a file outside the allowed folders. {self._hint()}")
        with _plain_file(root, path, path.name) as file:
            yield file

    def _candidates(self, image: str) -> Iterator[Path]:
        for root in self.roots:
            yield _real(root / image)  # an absolute name replaces the root

    def _allows(self, real: Path) -> bool:
        return any(real.is_relative_to(root) for root in self.roots)

    def _folders(self, folder: str) -> list[Path]:
        if not folder:
            return list(self.roots)
        _refuse_special(folder)
        for candidate in self._candidates(folder):
            if self._allows(candidate) and _is_folder(candidate):
                return [candidate]
        raise AccessError(f"{_shown(folder)} is not a folder inside the allowed folders. {self._hint()}")

    def _hint(self) -> str:
        allowed = ", ".join(str(root) for root in self.roots) or "none"
        return f"Allowed folders: {allowed}. Use list_images to see what they hold."


@dataclass(frozen=True)
class LocalFile:
    """An open file below a root."""

    name: str
    size: int
    stamp: Stamp
    descriptor: int

    def read_at(self, offset: int, count: int) -> bytes:
        return os.pread(self.descriptor, count, offset)


def in_unicode(path: Path) -> bool:
    """Whether a path can stand in an answer: of a name in another encoding Python makes half characters."""
    return not any("\ud800" <= sign <= "\udfff" for sign in str(path))


def stamp_of(source: Source) -> Stamp:
    """The present state of an image.

    Raises:
        ImageError: its file is gone.
    """
    if isinstance(source, RemoteImage):
        return Stamp(0, source.size, source.version)
    path = source.path if isinstance(source, UploadedImage) else source
    try:
        return _stamp(path.stat())
    except OSError as error:
        raise ImageError(f"{source.name} cannot be read: {error.strerror}.") from error


def _stamp(status: os.stat_result) -> Stamp:
    return Stamp(status.st_mtime_ns, status.st_size, f"{status.st_dev}:{status.st_ino}")


@contextmanager
def _plain_file(root: Path, path: Path, name: str) -> Iterator[LocalFile]:
    """A file below `root`, opened without following any link."""
    try:
        descriptor = _open_below(root, path.relative_to(root).parts)
    except OSError as error:
        raise ImageError(f"{name} cannot be read: {error.strerror}.") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ImageError(f"{name} is not a plain file.")
        yield LocalFile(name, status.st_size, _stamp(status), descriptor)
    finally:
        os.close(descriptor)


def _open_below(root: Path, parts: tuple[str, ...]) -> int:
    """A descriptor of the file that `parts` lead to from `root`, none of them a link."""
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
    folder = os.open(root, flags | os.O_DIRECTORY)
    try:
        for part in parts[:-1]:
            below = os.open(part, flags | os.O_DIRECTORY, dir_fd=folder)
            os.close(folder)
            folder = below
        # O_NONBLOCK: a pipe that nobody writes to must not stop the process; it is refused as no plain file.
        return os.open(parts[-1] if parts else ".", flags | os.O_NONBLOCK, dir_fd=folder)
    finally:
        os.close(folder)


def refuse_address(name: str | Path) -> None:
    """Raise AccessError for an address where a script or a terminal is to name a file of its own."""
    if re.match(r"[a-z][a-z0-9+.-]+:/", str(name), re.IGNORECASE):  # a path has lost the second slash
        raise AccessError(f"{_shown(str(name))} is an address; files are read here: download it and give its path.")


def _folder(root: str | Path) -> Path:
    path = Path(root).expanduser().resolve()
    if not path.is_dir():
        raise AccessError(f"The allowed folder {_shown(str(root))} does not exist or is not a folder.")
    return path


def _refuse_special(name: str) -> None:
    if not name.strip() or "\0" in name:
        raise AccessError("An image is named by a path; this one is empty or holds a null byte.")
    if name.lower().startswith("/vsi"):
        raise AccessError("GDAL's virtual paths (/vsi...) are refused; give the path of a plain file.")
    suffix = Path(name).suffix.lower()
    if suffix in {".zip", ".gz", ".tgz", ".tar", ".7z", ".rar", ".kmz"}:
        raise AccessError(f"Archives ({suffix}) are not read; unpack it and give the path of an image in it.")


def _real(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:  # a loop of links
        raise AccessError(f"{_shown(path.name)} cannot be followed: its links form a loop.") from error


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name longer than the system allows is not the name of a file
        return False


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # as with files
        return False


def _shown(name: str) -> str:
    return repr(name if len(name) <= 120 else name[:117] + "...")
