"""Damaged images, made from a seed, put through the tools in a process of their own.

    python tests/tools/fuzz_images.py [COUNT] [SEED]

Every image must give a result or a PerceptionError that names no path. A worker process reads one image after the
other and says what came of each; one that dies or falls silent is a failure of the image that it had in hand.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import random
import re
import resource
import selectors
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import rasterio
from PIL import Image
from rasterio.control import GroundControlPoint
from rasters import UTM, ScriptedClient, noise, rational, write

from rs_tools.errors import PerceptionError
from rs_tools.imagery.access import AccessPolicy
from rs_tools.imagery.scene import Scene
from rs_tools.tools import Tools

SILENT_S = 120  # of a worker, on a busy machine; an image takes some hundredths of a second
MEMORY = 3 * 2**30  # of a worker's address space
MOST_FAILURES = 20  # then there is enough to mend
INTERESTING = (0, 1, 2, 3, 7, 16, 127, 255, 256, 32767, 65535, 65536, 2**24, 2**31 - 1, 2**31, 2**32 - 1)


# --- images to damage


def seeds(folder: Path) -> list[Path]:
    """Small sound images of many kinds."""
    points = [GroundControlPoint(row=r, col=c, x=10 + c, y=50 - r) for r in (0, 40) for c in (0, 60)]
    place = {"crs": "EPSG:32633", "transform": UTM}
    tiled = {"tiled": True, "blockxsize": 32, "blockysize": 16}
    mask = np.full((48, 64), 255, "uint8")
    mask[:9] = 0
    rgb, wide = noise(3, 48, 64), noise(5, 48, 64, "uint16", high=4000)
    decimal = np.random.default_rng(0).normal(0.2, 0.1, (1, 48, 64)).astype("float32")
    made = [
        write(folder / "strips.tif", rgb, photometric="RGB", blockysize=7, **place),
        write(folder / "tiles.tif", rgb, photometric="RGB", compress="deflate", mask=mask, **tiled, **place),
        write(folder / "bands.tif", wide, interleave="band", compress="lzw", predictor=2, nodata=7, **place),
        write(folder / "big.tif", rgb, BIGTIFF="YES", compress="packbits"),
        write(folder / "other.tif", rgb, ENDIANNESS="BIG", compress="zstd", **tiled),
        write(folder / "decimal.tif", decimal, nodata=float("nan"), compress="deflate", predictor=3, **place),
        write(folder / "jpeg.tif", rgb, compress="jpeg", photometric="YCBCR", **tiled),
        write(folder / "palette.tif", rgb[:1] % 4, colormap={i: (i, 2 * i, 3 * i, 255) for i in range(4)}, **place),
        write(folder / "complex.tif", (decimal + 1j).astype("complex64")),
        write(folder / "points.tif", rgb, gcps=points, crs="EPSG:4326"),
        write(folder / "rational.tif", rgb, rpcs=rational()),
        write(folder / "described.tif", wide[:3], descriptions=["red", "green", "blue"], compress="lzma"),
        write(folder / "cog.tif", noise(3, 700, 600), driver="COG", compress="deflate", blocksize=128, **place),
        write(folder / "grey.png", rgb[:1], driver="PNG"),
        write(folder / "deep.png", wide[:3], driver="PNG"),
        write(folder / "alpha.png", noise(4, 48, 64), driver="PNG"),
        write(folder / "colours.png", rgb[:1] % 4, driver="PNG", colormap={i: (i, i, i, 90 * i) for i in range(4)}),
        write(folder / "grey.jpg", rgb[:1], driver="JPEG"),
        write(folder / "rgb.jpg", rgb, driver="JPEG"),
        write(folder / "slow.jpg", rgb, driver="JPEG", progressive=True),
    ]
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(rgb.transpose(1, 2, 0)).save(folder / "turned.jpg", exif=turned)
    with rasterio.open(folder / "strips.tif", "r+") as file:
        file.build_overviews([2, 4])
        file.update_tags(note="of a test")
    for beside in folder.glob("*.aux.xml"):
        beside.unlink()
    return [*made, folder / "turned.jpg"]


# --- damage


def damaged(data: bytes, suffix: str, chance: random.Random, others: list[bytes]) -> bytes:
    """`data` with one to three faults of different kinds."""
    kinds: list[Callable[[bytearray, random.Random], None]] = [_flip_head, _flip_body, _number, _cut, _move, _zero]
    structure = {".tif": _tag, ".png": _chunk, ".jpg": _segment}[suffix]
    kinds += [structure] * 4
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 3))):
        if chance.random() < 0.05:
            other = chance.choice(others)
            at = chance.randrange(len(changed) + 1)
            changed[at : at + 400] = other[at : at + chance.randrange(400)]
        else:
            chance.choice(kinds)(changed, chance)
        if len(changed) < 16:
            break
    return bytes(changed)


def _flip_head(data: bytearray, chance: random.Random) -> None:
    for _ in range(chance.randint(1, 8)):
        data[chance.randrange(min(512, len(data)))] ^= 1 << chance.randrange(8)


def _flip_body(data: bytearray, chance: random.Random) -> None:
    for _ in range(chance.randint(1, 32)):
        data[chance.randrange(len(data))] = chance.randrange(256)


def _number(data: bytearray, chance: random.Random) -> None:
    code = chance.choice(("<H", ">H", "<I", ">I", "<Q"))
    size = struct.calcsize(code)
    at = chance.randrange(max(1, min(len(data), 2048) - size)) // 2 * 2
    data[at : at + size] = struct.pack(code, chance.choice(INTERESTING) % 256**size)


def _cut(data: bytearray, chance: random.Random) -> None:
    del data[chance.randrange(len(data)) :]


def _move(data: bytearray, chance: random.Random) -> None:
    start, to = chance.randrange(len(data)), chance.randrange(len(data))
    piece = data[start : start + chance.randrange(1, 64)]
    if chance.random() < 0.5:
        del data[start : start + len(piece)]
    data[to:to] = piece


def _zero(data: bytearray, chance: random.Random) -> None:
    start = chance.randrange(len(data))
    count = min(chance.randrange(1, 200), len(data) - start)
    data[start : start + count] = chance.choice((b"\0", b"\xff")) * count


def _tag(data: bytearray, chance: random.Random) -> None:
    """Change the tag, type, count or value of an entry of a TIFF directory."""
    order = "<" if data[:2] == b"II" else ">"
    if len(data) < 16 or data[2 if order == "<" else 3] != 42:  # BigTIFF, or no TIFF any more
        return _number(data, chance)
    (at,) = struct.unpack_from(order + "I", data, 4)
    for _ in range(chance.choice((0, 0, 0, 1, 2))):  # directories of overviews and masks
        if at + 2 <= len(data):
            (entries,) = struct.unpack_from(order + "H", data, at)
            after = at + 2 + 12 * entries
            at = struct.unpack_from(order + "I", data, after)[0] if after + 4 <= len(data) else at
    if at + 2 > len(data):
        return None
    (entries,) = struct.unpack_from(order + "H", data, at)
    entry = at + 2 + 12 * chance.randrange(max(1, entries))
    if entry + 12 <= len(data):
        offset, code = chance.choice(((0, "H"), (2, "H"), (4, "I"), (8, "I"), (8, "H")))
        number = chance.choice((*INTERESTING, len(data), chance.randrange(2**16)))
        struct.pack_into(order + code, data, entry + offset, number % 256 ** struct.calcsize(code))
    return None


def _chunk(data: bytearray, chance: random.Random) -> None:
    """Change bytes of a PNG chunk and make its checksum right again."""
    chunks: list[tuple[int, int]] = []
    at = 8
    while at + 12 <= len(data):
        (size,) = struct.unpack_from(">I", data, at)
        if at + 12 + size > len(data):
            break
        chunks.append((at, size))
        at += 12 + size
    if not chunks:
        return
    at, size = chance.choice((chunks[0], chance.choice(chunks)))
    for _ in range(chance.randint(1, 3)):
        if size:
            data[at + 8 + chance.randrange(size)] = chance.choice((0, 1, 2, 3, 4, 8, 16, 127, 128, 255))
    struct.pack_into(">I", data, at + 8 + size, zlib.crc32(data[at + 4 : at + 8 + size]))


def _segment(data: bytearray, chance: random.Random) -> None:
    """Change bytes of a JPEG segment before the picture itself."""
    starts = [found.start() for found in re.finditer(rb"\xff[\xc0-\xfe]", bytes(data[:1200]))]
    if starts:
        at = chance.choice(starts) + chance.randrange(2, 20)
        if at < len(data):
            data[at] = chance.choice((0, 1, 2, 3, 4, 127, 128, 255, chance.randrange(256)))


def _made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


def cases(folder: Path, count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """`count` names and contents made from the images in `folder`, the same for the same seed."""
    chance = random.Random(seed)
    originals = [(path, path.read_bytes()) for path in sorted(folder.iterdir())]
    contents = [data for _, data in originals]
    for number in range(count):
        path, data = originals[number % len(originals)]
        yield f"{number}-{path.name}", damaged(data, path.suffix, chance, contents)


# --- the worker


async def outcome(root: Path, name: str) -> str:
    """Inspect and read an image: `result`, the class of a PerceptionError, or what is wrong."""
    policy = AccessPolicy([root])
    try:
        inspected = await Tools(policy, ScriptedClient()).inspect_image(name)
        said = inspected.model_dump_json()
        scene = Scene.open(policy, name)
        side = max(1.0, max(scene.width, scene.height) / 256)
        scene.read(scene.region([]), (max(1, int(scene.width / side)), max(1, int(scene.height / side))))
        with scene.reader() as read:
            right, bottom = min(64, scene.width), min(64, scene.height)
            read((scene.width - right, scene.height - bottom, scene.width, scene.height), (right, bottom))
        kind = "result"
    except PerceptionError as error:
        said, kind = str(error), type(error).__name__
    if str(root) in said or re.search(r"/(vsi|proc|tmp|scene)\b", said):
        return f"LEAK {said[:500]}"
    return kind


def outcome_of(root: Path, name: str) -> str:
    return asyncio.run(outcome(root, name))


def work(folder: Path, count: int, seed: int, first: int) -> None:
    """Put the images from number `first` on through the tools and print a line of JSON for each."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    root = _made(folder / "damaged")
    for number, (name, data) in enumerate(cases(folder / "sound", count, seed)):
        if number < first:
            continue
        (root / name).write_bytes(data)
        started = time.monotonic()
        if os.environ.get("FUZZ_DIES_AT") == str(number):  # for the test of the watch
            os.abort()
        try:
            kind = outcome_of(root, name)
        except BaseException:  # what escapes the tools is what is looked for
            kind = f"ESCAPED {traceback.format_exc()[-1500:]}"
        print(json.dumps({"number": number, "name": name, "kind": kind, "s": time.monotonic() - started}), flush=True)
        if kind[0].islower() or kind.endswith("Error"):
            (root / name).unlink()


# --- the process that watches it


@dataclass
class Report:
    kinds: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    slowest_s: float = 0.0
    slowest: str = ""

    def add(self, line: dict) -> None:
        kind = line["kind"]
        if kind.startswith(("LEAK", "ESCAPED")):
            self.failures.append(f"{line['name']}: {kind}")
            kind = kind.split()[0]
        self.kinds[kind] += 1
        if line["s"] > self.slowest_s:
            self.slowest_s, self.slowest = line["s"], line["name"]


def run(folder: Path, count: int, seed: int) -> Report:
    """Put `count` damaged images through workers; damaged images that failed stay in `folder`/damaged."""
    report = Report()
    done = 0
    seeds(_made(folder / "sound"))
    while done < count and len(report.failures) < MOST_FAILURES:
        command = [sys.executable, __file__, "work", str(folder), str(count), str(seed), str(done)]
        with (folder / "stderr").open("w") as errors, subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as worker:
            for line in _lines(worker):
                report.add(json.loads(line))
                done += 1
            worker.kill()
        if done < count:
            last = (folder / "stderr").read_text()[-1500:]
            report.kinds["DIED OR SILENT"] += 1
            report.failures.append(f"number {done}: the worker ended with {worker.returncode} or fell silent: {last}")
            done += 1
    return report


def _lines(worker: subprocess.Popen[str]) -> Iterator[str]:
    assert isinstance(worker.stdout, io.TextIOBase)
    with selectors.DefaultSelector() as ready:
        ready.register(worker.stdout, selectors.EVENT_READ)
        while ready.select(SILENT_S) and (line := worker.stdout.readline()):
            yield line


def main() -> None:
    if sys.argv[1:2] == ["work"]:
        work(Path(sys.argv[2]), *map(int, sys.argv[3:6]))
        return
    count, seed = (int(sys.argv[at]) if at < len(sys.argv) else usual for at, usual in ((1, 2000), (2, 0)))
    started = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    report = run(folder, count, seed)
    for failure in report.failures:
        print(failure, end="\n\n")
    print(f"{count} images (seed {seed}) in {time.monotonic() - started:.0f} s: {dict(report.kinds)}")
    print(f"slowest {report.slowest_s:.2f} s ({report.slowest}); {len(report.failures)} failures; files in {folder}")
    sys.exit(bool(report.failures))


if __name__ == "__main__":
    main()
