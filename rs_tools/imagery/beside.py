"""Small text files beside an image that tell of its place: world files are read, others are told of and not used.

A world file (.tfw, .jgw, .pgw, .wld, ...) holds six numbers, A D B E C F: x = A column + B row + C and
y = D column + E row + F in map units, counted from the middle of the upper left pixel. It names no coordinate reference
system. It is read here and not by GDAL, which would look for files by itself: at most `MAX_WORLD_BYTES`, through the
access policy, no link followed. One that is not what it should be is told and not used.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from affine import Affine

from rs_tools.errors import AccessError, ImageError
from rs_tools.imagery.access import AccessPolicy, Source
from rs_tools.imagery.formats import SIDECARS

MAX_WORLD_BYTES = 1024
_NUMBER = re.compile(rb"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_LARGEST = 1e15  # map units
_SINGULAR = 1e-9  # of the determinant against the square of the longest step
_RATIONAL = ("_rpc.txt", "_RPC.TXT", ".rpc", ".RPB", "_RPB.TXT")


@dataclass(frozen=True)
class Beside:
    """What lies beside an image.

    Attributes:
        world: from pixels, counted from the top-left corner, to map units; None where no world file gives it.
        name: of the file that gives it, or empty.
        refused: world files that are there and not used, each with the reason.
        rational: name of a file of rational polynomial coefficients, or empty.
        projection: name of a .prj file, or empty.
    """

    world: Affine | None = None
    name: str = ""
    refused: tuple[str, ...] = ()
    rational: str = ""
    projection: str = ""


def look_beside(policy: AccessPolicy, source: Source) -> Beside:
    """What lies beside an image; nothing does beside one behind an address."""
    if not isinstance(source, Path):
        return Beside()
    rational = next((path.name for path in _beside(source, _RATIONAL)), "")
    projection = next((path.name for path in _beside(source, [".prj"])), "")
    refused: list[str] = []
    for path in _beside(source, _endings(source)):
        try:
            with policy.file(path) as file:
                if file.size > MAX_WORLD_BYTES:
                    raise ValueError(f"it is larger than the {MAX_WORLD_BYTES:,} bytes that a world file has at most")
                world = parse_world(file.read_at(0, MAX_WORLD_BYTES))
            return Beside(world, path.name, tuple(refused), rational, projection)
        except (AccessError, ImageError, OSError):  # a link is one of these
            refused.append(f"{path.name} beside the image is not used: it is no plain file that can be read.")
        except ValueError as error:
            refused.append(f"{path.name} beside the image is not used: {error}.")
    return Beside(None, "", tuple(refused), rational, projection)


def states_beside(source: Source) -> tuple[tuple[str, int, int], ...]:
    """Name, time of change and size of each file beside an image that says something of it."""
    if not isinstance(source, Path):
        return ()
    read = (source.with_name(source.name + ending) for ending in SIDECARS)
    told = _beside(source, [*_RATIONAL, ".prj", *_endings(source)])
    found = []
    for path in (*read, *told):
        try:
            status = path.lstat()
        except OSError:  # there is none
            continue
        found.append((path.name, status.st_mtime_ns, status.st_size))
    return tuple(found)


def parse_world(text: bytes) -> Affine:
    """The transform of a world file's text, from the top-left corner of the upper left pixel.

    Raises:
        ValueError: not six finite numbers, or they put all pixels in one line or point.
    """
    words = text.split()
    if len(words) != 6 or not all(_NUMBER.fullmatch(word) for word in words):
        raise ValueError("it does not hold six numbers")
    a, d, b, e, c, f = (float(word) for word in words)
    if not all(abs(number) < _LARGEST for number in (a, d, b, e, c, f)):
        raise ValueError("its numbers are not finite or beyond all maps")
    longest = max(map(abs, (a, b, d, e)))
    if longest == 0 or abs((a / longest) * (e / longest) - (b / longest) * (d / longest)) < _SINGULAR:
        raise ValueError("its numbers put all pixels in one line or point")
    return Affine(a, b, c - a / 2 - b / 2, d, e, f - d / 2 - e / 2)


def _endings(image: Path) -> list[str]:
    """What may follow an image's stem in the name of its world file: .tfw, .tifw, .wld of a .tif."""
    ending = image.suffix.removeprefix(".").lower()
    lower = [f".{ending[:1]}{ending[-1:]}w", f".{ending}w", ".wld"] if ending else [".wld"]
    return [spelled for one in lower for spelled in (one, one.upper())]


def _beside(image: Path, endings: Iterable[str]) -> Iterator[Path]:
    """The files beside an image that there are; links count, to be refused."""
    for ending in endings:
        path = image.with_name(image.stem + ending)
        try:
            path.lstat()
        except OSError:  # there is none, or the name is longer than the system allows
            continue
        yield path
