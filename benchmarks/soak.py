"""The engine for a long time, with callers as they are: some leave, some ask nonsense, some send too much.

    python benchmarks/soak.py                                     # 10,000 requests to the embedded model
    python benchmarks/soak.py --requests 500 --weights debug      # a minute, on a tiny random checkpoint
    python benchmarks/soak.py --plot soak.png --out soak.json

Requests go the way they come from the wire: packed, unpacked, checked, answered. Of them 20 % are cancelled at a random
moment, 10 % are malformed, 5 % are larger than a request may be; the rest are captions, answers, classes and, where
the model has them, boxes, about a set of images whose answers were taken one by one before. It fails when an answer is
not that of its own image and question, when one is lost, when a slot stays taken, or when memory grows: the mean of
the last quarter against that of the second, beyond `--growth`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the server does, before torch is loaded

import numpy as np
from PIL import Image, ImageDraw

from model_server.engine import Engine, EngineBusy
from model_server.perceiver import DEFAULT_WEIGHTS, Perceiver
from model_server.protocol import (
    MAX_TILE_SIDE,
    PerceiveRequest,
    PerceiveResponse,
    Priority,
    WireError,
    decode_request,
    encode_request,
)

CANCELLED, MALFORMED, OVERSIZE = 0.20, 0.10, 0.05
CALLERS = 24
IMAGES = 12
PATIENCE_S = 300.0  # an answer that takes longer is lost
SAMPLES = 200
TOLERANCE = 2e-3

ASKED = (
    PerceiveRequest(task="caption"),
    PerceiveRequest(task="vqa", text="Is there a road in the image?"),
    PerceiveRequest(task="vqa", text="How many buildings are there?"),
    PerceiveRequest(task="classify"),
    PerceiveRequest(task="ground", text="ship", gsd_m=1.0),
)


@dataclass
class Report:
    """What happened, and what was wrong with it."""

    requests: int = 0
    seconds: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    memory_mib: list[float] = field(default_factory=list)
    answered: list[int] = field(default_factory=list)  # requests ended when each sample of memory was taken

    @property
    def growth_mib(self) -> float:
        """Mean of the last quarter less that of the second; the first one fills caches and slots."""
        quarter = len(self.memory_mib) // 4
        if not quarter:
            return 0.0
        return float(np.mean(self.memory_mib[-quarter:]) - np.mean(self.memory_mib[quarter : 2 * quarter]))


def pictures(count: int, side: int = 64) -> list[np.ndarray]:
    """Different images: noise and blocks of colours of their own."""
    made = []
    for i in range(count):
        rng = np.random.default_rng(i)
        coarse = rng.integers(0, 256, (2 + i % 5, 2 + i % 7, 3), dtype=np.uint8)
        made.append(np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.NEAREST)))
    return made


def same(answer: PerceiveResponse, expected: PerceiveResponse) -> bool:
    """Words alike, numbers alike up to the rounding of batches of other sizes."""
    if [c.caption for c in answer.captions] != [c.caption for c in expected.captions]:
        return False
    if [v.answer for v in answer.vqa] != [v.answer for v in expected.vqa]:
        return False
    got, wanted = numbers(answer), numbers(expected)
    return len(got) == len(wanted) and bool(np.allclose(got, wanted, atol=TOLERANCE))


def numbers(answer: PerceiveResponse) -> list[float]:
    words = [*answer.captions, *answer.vqa]
    scores = [*answer.classes, *answer.objects]
    return [*(said.confidence for said in words), *(score for found in scores for score in found.scores[:50])]


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


class Soak:
    """Callers of one engine, and what they saw."""

    def __init__(self, engine: Engine, asked: Sequence[PerceiveRequest], seed: int = 0) -> None:
        self.engine, self.asked = engine, asked
        self.images = pictures(IMAGES)
        self.random = random.Random(seed)
        self.report = Report()
        self.expected: dict[tuple[int, int], PerceiveResponse] = {}

    async def learn(self) -> None:
        """The answers that each question about each image gets alone."""
        for i, image in enumerate(self.images):
            for q, request in enumerate(self.asked):
                self.expected[i, q] = await self.engine.perceive(request, [image])

    async def run(self, requests: int, callers: int = CALLERS) -> Report:
        started, turns = time.perf_counter(), iter(range(requests))
        every = max(requests // SAMPLES, 1)

        async def caller() -> None:
            for turn in turns:
                await self._one()
                self.report.requests += 1
                if turn % every == 0:
                    self.report.memory_mib.append(resident_mib())
                    self.report.answered.append(self.report.requests)

        await asyncio.gather(*(caller() for _ in range(callers)))
        self.report.seconds = time.perf_counter() - started
        left = self.engine.metrics()
        for what in ("waiting", "on_device", "decoding"):
            if left[what]:
                self.report.wrong.append(f"{left[what]} {what} when all callers had gone")
        return self.report

    async def _one(self) -> None:
        draw = self.random.random()
        if draw < MALFORMED:
            self._refused("malformed", self._malformed())
        elif draw < MALFORMED + OVERSIZE:
            tile = np.zeros((1, MAX_TILE_SIDE + 1, 3), np.uint8)
            self._refused("oversize", encode_request(self.asked[0], [tile]))
        else:
            await self._ask(leaves=draw < MALFORMED + OVERSIZE + CANCELLED)

    def _malformed(self) -> bytes:
        body = encode_request(self.asked[0], [self.images[0]])
        wrong: list[Callable[[], bytes]] = [
            lambda: body[: len(body) // 2],
            lambda: body.replace(b"caption", b"cap_ion"),
            lambda: b"",
            lambda: encode_request(PerceiveRequest(task="detect_change"), [self.images[0]]),
        ]
        return self.random.choice(wrong)()

    def _refused(self, kind: str, body: bytes) -> None:
        try:
            decode_request(body)
        except WireError:
            self.report.outcomes[kind] += 1
        else:
            self.report.wrong.append(f"a {kind} request was taken")

    async def _ask(self, leaves: bool) -> None:
        i, q = self.random.randrange(len(self.images)), self.random.randrange(len(self.asked))
        priority: Priority = "bulk" if self.random.random() < 0.5 else "interactive"
        request, tiles = decode_request(encode_request(self.asked[q], [self.images[i]]))
        working = asyncio.create_task(self.engine.perceive(request, tiles, priority=priority))
        try:
            patience = self.random.random() * 0.2 if leaves else PATIENCE_S
            answer = await asyncio.wait_for(working, patience)
        except TimeoutError:
            self.report.outcomes["cancelled"] += 1
            if not leaves:
                self.report.wrong.append(f"{request.task} about image {i} got no answer in {PATIENCE_S:.0f} s")
        except EngineBusy:
            self.report.outcomes["busy"] += 1
        else:
            self.report.outcomes["answered"] += 1
            if not same(answer, self.expected[i, q]):
                self.report.wrong.append(f"{request.task} {request.text!r} about image {i} was answered by {answer}")


def plot(report: Report, path: Path) -> None:
    """Memory over requests, as a PNG."""
    width, height, margin = 800, 400, 50
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    most, last = 1.1 * max(report.memory_mib), max(report.answered[-1], 1)
    inner_w, inner_h = width - 2 * margin, height - 2 * margin
    draw.rectangle((margin, margin, width - margin, height - margin), outline="black")
    points = [
        (margin + inner_w * n / last, height - margin - inner_h * m / most)
        for n, m in sorted(zip(report.answered, report.memory_mib, strict=True))
    ]
    draw.line(points, fill=(20, 90, 180), width=2)
    for mark in range(5):
        y = height - margin - inner_h * mark / 4
        draw.text((5, y - 6), f"{most * mark / 4:.0f}", fill="black")
        draw.text((margin + inner_w * mark / 4 - 15, height - margin + 8), f"{last * mark / 4:.0f}", fill="black")
    draw.text((margin, 15), f"resident memory in MiB over {report.requests} requests", fill="black")
    image.save(path)


async def soak(perceiver: Perceiver, requests: int) -> tuple[Report, dict[str, object]]:
    engine = Engine(lambda: perceiver)
    await engine.start()
    run = Soak(engine, [request for request in ASKED if request.task in perceiver.tasks])
    await run.learn()
    report = await run.run(requests)
    counted = dict(engine.metrics())
    await engine.close()
    return report, counted


def load(weights: str | None, folder: Path) -> Perceiver:
    if weights != "debug":
        return Perceiver.load(Path(weights) if weights else DEFAULT_WEIGHTS)
    from model_server.checkpoints.debug import write_debug_checkpoint

    write_debug_checkpoint(folder, dense=True)
    return Perceiver.load(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000, help="how many (default 10,000)")
    parser.add_argument("--weights", help="checkpoint folder, or `debug` (default: the embedded model)")
    parser.add_argument("--growth", type=float, default=32, help="MiB that memory may grow by (default 32)")
    parser.add_argument("--plot", type=Path, help="draw memory over requests as a PNG")
    parser.add_argument("--out", type=Path, help="write the report as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report, counted = asyncio.run(soak(load(options.weights, Path(folder) / "debug"), options.requests))
    share = {name: f"{count} ({count / report.requests:.0%})" for name, count in sorted(report.outcomes.items())}
    print(f"{report.requests} requests in {report.seconds:.0f} s: {share}")
    print(f"resident memory {report.memory_mib[0]:.0f} MiB at first, {report.memory_mib[-1]:.0f} at last, "
          f"last quarter against the second {report.growth_mib:+.1f} MiB")  # fmt: skip
    if report.growth_mib > options.growth:
        report.wrong.append(f"memory grew by {report.growth_mib:.0f} MiB")
    print(f"{len(report.wrong)} things went wrong", *report.wrong[:20], sep="\n  ")
    if options.plot:
        plot(report, options.plot)
    if options.out:
        written = {**vars(report), "growth_mib": report.growth_mib}
        options.out.write_text(json.dumps({"report": written, "engine": counted}, indent=1) + "\n")
    raise SystemExit(bool(report.wrong))


if __name__ == "__main__":
    main()
