"""Images behind https addresses, read by byte ranges.

Off unless hosts are allowed. Every address that a request is about to go to, redirects included, must be https, on an
allowed host, and that host's name must lead to public addresses only. The connection then goes to an address that was
checked: the name is not looked up a second time. No proxy, cookie or credential takes part. The bytes come in blocks
that are kept for a while, so that a picture's header and overviews are fetched once.
"""

from __future__ import annotations

import ipaddress
import socket
import ssl
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, NamedTuple

from rs_tools.errors import AccessError, ImageError

if TYPE_CHECKING:
    import httpcore
    import httpx

BLOCK = 64 * 2**10
MAX_REQUEST = 8 * 2**20
MAX_FILE = 64 * 2**30
MAX_FETCHED = 2**30  # for one opening of a file: a single look, or one pass over its tiles
CACHE_BLOCKS = 1024
MAX_REDIRECTS = 5
FRESH_S = 60.0  # how long a file's state is taken to be what it was
REQUEST_S = 60.0  # for one request from beginning to end
_TIMEOUT_S = {"connect": 10.0, "read": 20.0, "write": 10.0, "pool": 20.0}
# Forms of IPv6 that carry an IPv4 address inside: mapped, compatible, NAT64, 6to4 and Teredo.
_CARRIERS = tuple(
    map(
        ipaddress.IPv6Network,
        ("::ffff:0:0/96", "::/96", "64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32"),
    )
)


@dataclass(frozen=True)
class RemoteImage:
    """The state of a file behind an address when it was last looked at.

    Attributes:
        url: the address as it was given.
        location: where its redirects lead.
        size: bytes.
        version: the server's entity tag, else its date of change; empty where it gives neither.
    """

    url: str
    location: str
    size: int
    version: str

    @property
    def name(self) -> str:
        """The last part of the address's path."""
        return PurePosixPath(self.url.partition("?")[0]).name

    @property
    def stem(self) -> str:
        return PurePosixPath(self.name).stem

    def __str__(self) -> str:
        return self.url


class _Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


class RemoteFiles:
    """Reads files of the allowed hosts.

    Args:
        hosts: `HOST` or `HOST:PORT`; none turns reading addresses off.
        resolve: gives the addresses of a host and port.
        dial: opens connections to addresses.
        trust: certificates to trust; None means the usual ones.

    Raises:
        AccessError: a host is not a plain host name.
    """

    def __init__(
        self,
        hosts: Iterable[str],
        resolve: Callable[[str, int], Sequence[str]] | None = None,
        dial: httpcore.NetworkBackend | None = None,
        trust: ssl.SSLContext | None = None,
    ) -> None:
        self.hosts = frozenset(map(_host, hosts))
        self._resolve, self._dial, self._trust = resolve or _addresses, dial, trust
        self._lock = threading.Lock()
        self._seen: OrderedDict[str, tuple[float, RemoteImage]] = OrderedDict()
        self._blocks: OrderedDict[tuple[RemoteImage, int], bytes] = OrderedDict()

    def resolve(self, url: str) -> RemoteImage:
        """The present state of the file behind an address; asked at most once in `FRESH_S`.

        Raises:
            AccessError: the address is not allowed, or there is no such file.
            ImageError: the server does not answer, or not as it must, or the file is too large.
        """
        with self._lock:
            asked, image = self._seen.get(url, (0.0, None))
        if image is not None and time.monotonic() - asked < FRESH_S:
            return image
        image, first = self._probe(url)
        with self._lock:
            self._seen[url] = time.monotonic(), image
            self._seen.move_to_end(url)
            while len(self._seen) > CACHE_BLOCKS:
                self._seen.popitem(last=False)
        self._keep(image, 0, first)
        return image

    def file(self, image: RemoteImage) -> RemoteFile:
        return RemoteFile(image, self)

    def block(self, image: RemoteImage, index: int) -> bytes | None:
        """A block that is still there."""
        with self._lock:
            block = self._blocks.get((image, index))
            if block is not None:
                self._blocks.move_to_end((image, index))
            return block

    def fetch(self, image: RemoteImage, first: int, last: int) -> list[bytes]:
        """Blocks `first` to `last` in one request; they are kept for a while.

        Raises:
            AccessError, ImageError: they cannot be had, or the file has changed.
        """
        start, end = first * BLOCK, min((last + 1) * BLOCK, image.size)
        url = self._checked(image.location)
        answer = self._get(url, start, end)
        if answer.status == 200:  # the range was ignored, which the first request found that it is not
            raise ImageError(f"{image.name} changed on its server while it was in use; ask again.")
        self._check_status(answer, image.name)
        if _state(answer, image.name) != (image.size, image.version):
            with self._lock:
                self._seen.pop(image.url, None)
            raise ImageError(f"{image.name} changed on its server while it was in use; ask again.")
        return self._keep(image, first, _whole(answer, image.name, end - start))

    def _keep(self, image: RemoteImage, first: int, data: bytes) -> list[bytes]:
        blocks = [data[start : start + BLOCK] for start in range(0, len(data), BLOCK)]
        with self._lock:
            for index, block in enumerate(blocks, first):
                self._blocks[image, index] = block
            while len(self._blocks) > CACHE_BLOCKS:
                self._blocks.popitem(last=False)
        return blocks

    def _probe(self, given: str) -> tuple[RemoteImage, bytes]:
        """The state of a file, following redirects, and its first block."""
        url = self._checked(given)
        name = RemoteImage(given, given, 0, "").name or given
        for _ in range(MAX_REDIRECTS + 1):
            answer = self._get(url, 0, BLOCK)
            if answer.status not in (301, 302, 303, 307, 308):
                break
            url = self._checked(str(url.join(answer.headers.get("location", ""))))
        else:
            raise AccessError(f"{name} is behind more than {MAX_REDIRECTS} redirects.")
        if answer.status == 200:
            raise ImageError(
                f"The server of {name} does not send parts of files (range requests); download the image into an "
                "allowed folder and give its path."
            )
        self._check_status(answer, name)
        size, version = _state(answer, name)
        if size > MAX_FILE:
            raise ImageError(f"{name} has {size / 2**30:.1f} GiB; at most {MAX_FILE // 2**30} are read from the web.")
        return RemoteImage(given, str(url), size, version), _whole(answer, name, min(size, BLOCK))

    def _checked(self, text: str) -> httpx.URL:
        """An address that may be asked.

        Raises:
            AccessError: it may not.
        """
        import httpx

        if text.lower().startswith("file:"):
            raise AccessError("Addresses of files (file://...) are not read; give the path alone.")
        if not self.hosts:
            raise AccessError(
                "URLs are not read here; download the image into an allowed folder and give its path. (Whoever runs "
                "the server can allow hosts: --allow-url HOST.)"
            )
        try:
            url = httpx.URL(text)
        except httpx.InvalidURL as error:
            raise AccessError(f"The address is not a URL: {error}.") from error
        if url.scheme != "https":
            raise AccessError(f"Only https addresses are read, not {url.scheme or 'relative'} ones. {self._hint()}")
        if url.userinfo:
            raise AccessError("Addresses with a user name or password are refused.")
        if _netloc(url.host, url.port) not in self.hosts:
            raise AccessError(f"The host {_netloc(url.host, url.port)[:100]!r} is not allowed. {self._hint()}")
        return url.copy_with(fragment=None)

    def _hint(self) -> str:
        return f"Allowed hosts: {', '.join(sorted(self.hosts))}."

    def _check_status(self, answer: _Answer, name: str) -> None:
        if answer.status in (401, 403, 404, 410):
            raise AccessError(f"The server does not give {name}: it answers {answer.status}. Check the address.")
        if answer.status == 416:
            raise ImageError(f"{name} is an empty file.")
        if answer.status != 206:
            raise ImageError(f"The server of {name} answers {answer.status}; try again later.")

    def _get(self, url: httpx.URL, start: int, end: int) -> _Answer:
        """One range request, tried a second time where a kept connection turns out to be closed."""
        import httpcore

        for last in (False, True):
            try:
                return self._get_once(url, start, end)
            except (httpcore.NetworkError, httpcore.RemoteProtocolError, ssl.SSLError) as error:
                if last:
                    raise ImageError(f"The server {url.host} cannot be reached: {error}.") from error
            except httpcore.TimeoutException as error:
                raise ImageError(f"The server {url.host} did not answer in time; try again later.") from error
            except httpcore.ProtocolError as error:
                raise ImageError(f"The server {url.host} is not understood: {error}.") from error
        raise AssertionError("unreachable")

    def _get_once(self, url: httpx.URL, start: int, end: int) -> _Answer:
        import httpcore

        target = httpcore.URL(scheme=b"https", host=url.raw_host, port=url.port, target=url.raw_path)
        headers = [
            ("Host", url.netloc.decode("ascii")),
            ("Range", f"bytes={start}-{end - 1}"),
            ("Accept-Encoding", "identity"),
            ("User-Agent", "rs-perception"),
        ]
        deadline = time.monotonic() + REQUEST_S
        with self._pool.stream("GET", target, headers=headers, extensions={"timeout": _TIMEOUT_S}) as response:
            found = {key.decode("latin-1").lower(): value.decode("latin-1") for key, value in response.headers}
            if response.status != 206:  # nothing in such a body is of use
                return _Answer(response.status, found, b"")
            body = bytearray()
            for chunk in response.iter_stream():
                body += chunk
                if len(body) > end - start:
                    raise ImageError(f"The server {url.host} sends more than it was asked for.")
                if time.monotonic() > deadline:
                    raise ImageError(f"The server {url.host} is too slow: {REQUEST_S:.0f} s were not enough.")
            return _Answer(response.status, found, bytes(body))

    @cached_property
    def _pool(self) -> httpcore.ConnectionPool:
        import httpcore

        return httpcore.ConnectionPool(
            ssl_context=self._trust or httpcore.default_ssl_context(),
            max_connections=8,
            keepalive_expiry=15,
            network_backend=_public_only(self._resolve, self._dial or httpcore.SyncBackend()),
        )


class RemoteFile:
    """The bytes of a file behind an address.

    Args:
        image: its state; a file that has another when it is read is refused.
        files: what reads it.
    """

    def __init__(self, image: RemoteImage, files: RemoteFiles) -> None:
        self._image, self._files = image, files
        self._fetched = 0

    @property
    def name(self) -> str:
        return self._image.name

    @property
    def size(self) -> int:
        return self._image.size

    def read_at(self, offset: int, count: int) -> bytes:
        end = min(offset + count, self.size)
        if offset >= end:
            return b""
        first, last = offset // BLOCK, (end - 1) // BLOCK
        data = b"".join(self._blocks(first, last))
        return data[offset - first * BLOCK : end - first * BLOCK]

    def _blocks(self, first: int, last: int) -> list[bytes]:
        blocks: list[bytes] = []
        while first + len(blocks) <= last:
            index = first + len(blocks)
            if (kept := self._files.block(self._image, index)) is not None:
                blocks.append(kept)
                continue
            end = index
            while end < last and end - index + 1 < MAX_REQUEST // BLOCK:
                if self._files.block(self._image, end + 1) is not None:
                    break
                end += 1
            self._spend((end - index + 1) * BLOCK)
            blocks += self._files.fetch(self._image, index, end)
        return blocks

    def _spend(self, count: int) -> None:
        self._fetched += count
        if self._fetched > MAX_FETCHED:
            raise ImageError(
                f"{self.name}: more than {MAX_FETCHED // 2**20} MiB would have to be fetched for this. Ask about a "
                "smaller region, or download the image into an allowed folder and give its path."
            )


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet.

    Private, loopback, link-local, shared (CGNAT), multicast, reserved and documentation addresses are not, nor are
    IPv6 addresses that carry an IPv4 address inside.
    """
    try:
        found = ipaddress.ip_address(address)
    except ValueError:  # a scope (fe80::1%eth0) or no address at all
        return False
    if isinstance(found, ipaddress.IPv6Address) and any(found in network for network in _CARRIERS):
        return False
    return found.is_global and not (found.is_multicast or found.is_reserved or found.is_unspecified)


def _public_only(
    resolve: Callable[[str, int], Sequence[str]], dial: httpcore.NetworkBackend
) -> httpcore.NetworkBackend:
    """Connections to hosts all of whose addresses are public; they go to an address that was checked."""
    import httpcore

    class PublicOnly(httpcore.NetworkBackend):
        def connect_tcp(
            self,
            host: str,
            port: int,
            timeout: float | None = None,
            local_address: str | None = None,
            socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
        ) -> httpcore.NetworkStream:
            found = resolve(host, port)
            if not found or not all(map(is_public, found)):
                raise AccessError(f"The host {host!r} has no address, or one that is not public; it is not asked.")
            for address in found[:-1]:
                try:
                    return dial.connect_tcp(address, port, timeout, local_address, socket_options)
                except (httpcore.ConnectError, httpcore.ConnectTimeout):
                    continue
            return dial.connect_tcp(found[-1], port, timeout, local_address, socket_options)

        def connect_unix_socket(
            self,
            path: str,
            timeout: float | None = None,
            socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
        ) -> httpcore.NetworkStream:
            raise AccessError("Sockets of this machine are not images.")

        def sleep(self, seconds: float) -> None:
            time.sleep(seconds)

    return PublicOnly()


def _addresses(host: str, port: int) -> list[str]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def _host(text: str) -> str:
    import httpx

    try:
        url = httpx.URL(f"https://{text}")
    except httpx.InvalidURL as error:
        raise AccessError(f"{text!r} is not a host: {error}.") from error
    if not url.host or url.userinfo or any(character in text for character in "/?#*@%\\ \t\n"):
        raise AccessError(f"{text!r} is not a host; give its name alone, such as data.example.org.")
    return _netloc(url.host, url.port)


def _netloc(host: str, port: int | None) -> str:
    return host.lower() if port in (None, 443) else f"{host.lower()}:{port}"


def _state(answer: _Answer, name: str) -> tuple[int, str]:
    """Size and version of the whole file, from the answer to a range request."""
    unit, _, extent = answer.headers.get("content-range", "").partition(" ")
    total = extent.rpartition("/")[2]
    if unit != "bytes" or not (total.isascii() and total.isdigit()) or len(total) > 18:
        raise ImageError(f"The server of {name} does not say how large the file is.")
    return int(total), answer.headers.get("etag") or answer.headers.get("last-modified", "")


def _whole(answer: _Answer, name: str, count: int) -> bytes:
    if len(answer.body) != count:
        raise ImageError(f"The server of {name} sent {len(answer.body)} bytes in place of {count}; try again later.")
    return answer.body
