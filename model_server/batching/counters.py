"""What the engine counts: plain numbers and histograms, which any exporter can render. No torch, no HTTP."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from typing import Literal, TypedDict

from model_server.protocol import Priority, Task

Rejection = Literal["busy", "not_ready", "closing", "not_served"]

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
SIZES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)


class HistogramValues(TypedDict):
    """`counts[i]` values lie in (bounds[i-1], bounds[i]], the last of them beyond all bounds; not cumulative."""

    bounds: list[float]
    counts: list[int]
    sum: float


class Histogram:
    """Counts of values between fixed bounds, and their sum."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def values(self) -> HistogramValues:
        return {"bounds": list(self.bounds), "counts": list(self.counts), "sum": self.sum}


class CacheValues(TypedDict):
    """The cache of image features: look-ups since the start, and what it holds now."""

    hits: int
    misses: int
    evictions: int
    entries: int
    bytes: int
    limit_bytes: int


class EngineMetrics(TypedDict):
    """`Engine.metrics()`: everything since the start, but for `waiting`, `on_device`, `decoding`, `cache` sizes and
    `memory`, which are as they are now. JSON as it is."""

    waiting: int  # tiles in the queue
    waiting_by_priority: dict[Priority, int]
    on_device: int  # tiles taken from the queue and not answered yet
    decoding: int  # sequences that are being written
    requests: dict[Task, int]  # accepted
    rejections: dict[Rejection, int]
    cancellations: int  # callers that left
    deadlines_passed: int
    failures: int  # requests that the model failed on
    tiles: int  # answered
    batches: int  # passes that took tiles in
    shared_batches: int  # of these, with tiles of more than one request
    largest_batch: int
    halvings: int  # times that a batch did not fit in memory and was halved
    tokens: int  # written, one for each sequence and step
    steps: int  # decoding steps
    batch_tiles: HistogramValues  # tiles of a pass
    step_sequences: HistogramValues  # sequences of a decoding step
    queued_s: dict[Priority, HistogramValues]  # from arrival until the first tile is taken
    first_token_s: HistogramValues  # from arrival, of requests that are answered in words
    answer_s: dict[Priority, HistogramValues]  # from arrival to the whole answer
    cache: CacheValues
    memory: dict[str, int]  # the plan made at start, in bytes and places; empty before


NO_CACHE: CacheValues = {"hits": 0, "misses": 0, "evictions": 0, "entries": 0, "bytes": 0, "limit_bytes": 0}


@dataclass(frozen=True)
class Now:
    """What is not counted but looked up: see `EngineMetrics`. The defaults are those of an engine without a model."""

    waiting: dict[Priority, int]
    on_device: int = 0
    decoding: int = 0
    halvings: int = 0
    cache: CacheValues = field(default_factory=lambda: NO_CACHE)
    memory: dict[str, int] = field(default_factory=dict)


def _by_priority() -> dict[Priority, Histogram]:
    return {"interactive": Histogram(SECONDS), "bulk": Histogram(SECONDS)}


@dataclass
class Counters:
    """The engine's own count; see `EngineMetrics` for what each means."""

    requests: dict[Task, int] = field(default_factory=dict)
    rejections: dict[Rejection, int] = field(default_factory=dict)
    cancellations: int = 0
    deadlines_passed: int = 0
    failures: int = 0
    tiles: int = 0
    batches: int = 0
    shared_batches: int = 0
    largest_batch: int = 0
    tokens: int = 0
    steps: int = 0
    batch_tiles: Histogram = field(default_factory=lambda: Histogram(SIZES))
    step_sequences: Histogram = field(default_factory=lambda: Histogram(SIZES))
    queued_s: dict[Priority, Histogram] = field(default_factory=_by_priority)
    first_token_s: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    answer_s: dict[Priority, Histogram] = field(default_factory=_by_priority)

    def reject(self, why: Rejection) -> None:
        self.rejections[why] = self.rejections.get(why, 0) + 1

    def accept(self, task: Task) -> None:
        self.requests[task] = self.requests.get(task, 0) + 1

    def passed(self, tiles: int, requests: int) -> None:
        """A pass has taken in so many tiles of so many requests."""
        self.batches += 1
        self.shared_batches += requests > 1
        self.batch_tiles.add(tiles)
        self.largest_batch = max(self.largest_batch, tiles)

    def stepped(self, sequences: int) -> None:
        """A step has written a token of each of so many sequences."""
        self.steps += 1
        self.tokens += sequences
        self.step_sequences.add(sequences)

    def metrics(self, now: Now) -> EngineMetrics:
        return {
            "waiting": sum(now.waiting.values()),
            "waiting_by_priority": dict(now.waiting),
            "on_device": now.on_device,
            "decoding": now.decoding,
            "requests": dict(self.requests),
            "rejections": dict(self.rejections),
            "cancellations": self.cancellations,
            "deadlines_passed": self.deadlines_passed,
            "failures": self.failures,
            "tiles": self.tiles,
            "batches": self.batches,
            "shared_batches": self.shared_batches,
            "largest_batch": self.largest_batch,
            "halvings": now.halvings,
            "tokens": self.tokens,
            "steps": self.steps,
            "batch_tiles": self.batch_tiles.values(),
            "step_sequences": self.step_sequences.values(),
            "queued_s": {priority: h.values() for priority, h in self.queued_s.items()},
            "first_token_s": self.first_token_s.values(),
            "answer_s": {priority: h.values() for priority, h in self.answer_s.items()},
            "cache": now.cache,
            "memory": now.memory,
        }
