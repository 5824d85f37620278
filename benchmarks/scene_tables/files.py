"""Scenes of any size in files of a megabyte: TIFFs whose blocks all point at the same compressed block of a real image.

That is hundreds of megapixels that have to be decoded.
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import rasterio
from affine import Affine

IMAGE = Path(__file__).parents[2] / "examples" / "data" / "yellowstone_road.jpg"
BLOCK = 512
SWEPT = 3000  # pixels a side of the scene in which one setting is swept


def write_scene(path: Path, side: int) -> None:
    """A tiled deflate RGB TIFF of side x side pixels, its blocks all the same bytes."""
    with rasterio.open(IMAGE) as file:
        values = file.read([1, 2, 3])
    whole = np.tile(values, (1, -(-BLOCK // values.shape[1]), -(-BLOCK // values.shape[2])))[:, :BLOCK, :BLOCK]
    block = zlib.compress(np.ascontiguousarray(whole.transpose(1, 2, 0)).tobytes(), 6)
    count = (-(-side // BLOCK)) ** 2
    # (tag, type, values): 3 is uint16, 4 uint32. 256/257 size, 258 bits, 259 deflate, 262 RGB, 277 samples, 284
    # interleaved, 322/323 block size, 324 offsets, 325 byte counts.
    entries: list[tuple[int, int, list[int]]] = [
        (256, 4, [side]), (257, 4, [side]), (258, 3, [8, 8, 8]), (259, 3, [8]), (262, 3, [2]), (277, 3, [3]),
        (284, 3, [1]), (322, 4, [BLOCK]), (323, 4, [BLOCK]), (324, 4, [8] * count), (325, 4, [len(block)] * count),
    ]  # fmt: skip
    directory_at = 8 + len(block) + len(block) % 2
    free = directory_at + 2 + 12 * len(entries) + 4
    directory, beyond = struct.pack("<H", len(entries)), b""
    for tag, kind, numbers in entries:
        data = struct.pack(f"<{len(numbers)}{'H' if kind == 3 else 'I'}", *numbers)
        if len(data) > 4:
            inline, beyond = struct.pack("<I", free + len(beyond)), beyond + data + b"\0" * (len(data) % 2)
        else:
            inline = data.ljust(4, b"\0")
        directory += struct.pack("<HHI", tag, kind, len(numbers)) + inline
    padding = b"\0" * (len(block) % 2)
    path.write_bytes(struct.pack("<2sHI", b"II", 42, directory_at) + block + padding + directory + b"\0" * 4 + beyond)



def place(path: Path) -> None:
    """Put a scene somewhere on Earth, ten metres a pixel."""
    with rasterio.open(path, "r+") as file:
        file.crs, file.transform = "EPSG:32633", Affine(10, 0, 300_000, 0, -10, 5_000_000)


def swept_scene(folder: Path) -> Path:
    path = folder / "swept.tif"
    write_scene(path, SWEPT)
    return path
