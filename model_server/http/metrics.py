"""The server's counters in Prometheus' text format 0.0.4."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Literal, TypeVar

from model_server.batching.counters import EngineMetrics, HistogramValues
from model_server.protocol import Priority

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_PREFIX = "rs_"

_Key = TypeVar("_Key", bound=str)
Sample = tuple[Mapping[str, str | int], float]


def render(engine: EngineMetrics, calls: Counter[tuple[str, int]], in_work: int, uptime_s: float) -> str:
    """All metrics of a server.

    Args:
        engine: what the engine counts.
        calls: ended HTTP calls by path and status.
        in_work: HTTP calls that ask the model, right now.
        uptime_s: since the start.
    """
    e = engine
    return "".join(
        [
            _family("http_calls_total", "counter", "HTTP calls that ended, by path and status.",
                    [({"path": path, "status": status}, n) for (path, status), n in sorted(calls.items())]),
            _family("http_calls_in_work", "gauge", "HTTP calls that ask the model, right now.", [({}, in_work)]),
            _family("requests_total", "counter", "Requests that the engine accepted, by task.",
                    _labelled("task", e["requests"])),
            _family("rejections_total", "counter", "Requests that the engine refused, by reason.",
                    _labelled("reason", e["rejections"])),
            _family("cancellations_total", "counter", "Requests whose caller left.", [({}, e["cancellations"])]),
            _family("deadlines_passed_total", "counter", "Requests not answered in time.",
                    [({}, e["deadlines_passed"])]),
            _family("failures_total", "counter", "Requests that the model failed on.", [({}, e["failures"])]),
            _family("queue_tiles", "gauge", "Tiles that wait, by priority.",
                    _labelled("priority", e["waiting_by_priority"])),
            _family("device_tiles", "gauge", "Tiles taken from the queue and not answered yet.",
                    [({}, e["on_device"])]),
            _family("decoding_sequences", "gauge", "Sequences that are being written.", [({}, e["decoding"])]),
            _family("tiles_total", "counter", "Tiles answered.", [({}, e["tiles"])]),
            _family("batches_total", "counter", "Passes that took tiles in.", [({}, e["batches"])]),
            _family("shared_batches_total", "counter", "Passes with tiles of more than one request.",
                    [({}, e["shared_batches"])]),
            _family("batch_halvings_total", "counter", "Times that a batch did not fit in memory and was halved.",
                    [({}, e["halvings"])]),
            _histogram("batch_tiles", "Tiles of a pass.", [({}, e["batch_tiles"])]),
            _histogram("step_sequences", "Sequences of a decoding step.", [({}, e["step_sequences"])]),
            _family("tokens_total", "counter", "Tokens written; their rate is tokens per second.", [({}, e["tokens"])]),
            _family("steps_total", "counter", "Decoding steps.", [({}, e["steps"])]),
            _histogram("queue_seconds", "From arrival until the first tile is taken, by priority.",
                       _by_priority(e["queued_s"])),
            _histogram("first_token_seconds", "From arrival to the first token, of requests answered in words.",
                       [({}, e["first_token_s"])]),
            _histogram("answer_seconds", "From arrival to the whole answer, by priority.", _by_priority(e["answer_s"])),
            _family("cache_lookups_total", "counter", "Look-ups in the cache of image features, by outcome.",
                    _labelled("outcome", {"hit": e["cache"]["hits"], "miss": e["cache"]["misses"]})),
            _family("cache_evictions_total", "counter", "Images that left the cache.", [({}, e["cache"]["evictions"])]),
            _family("cache_entries", "gauge", "Images in the cache.", [({}, e["cache"]["entries"])]),
            _family("cache_bytes", "gauge", "Bytes of the cache, and their limit.",
                    _labelled("kind", {"used": e["cache"]["bytes"], "limit": e["cache"]["limit_bytes"]})),
            _family("memory_plan", "gauge", "The plan made at the start, in bytes and places.",
                    _labelled("part", e["memory"])),
            _family("resident_memory_bytes", "gauge", "Memory of this process.", _resident()),
            _family("uptime_seconds", "gauge", "Seconds since the start.", [({}, uptime_s)]),
        ]
    )  # fmt: skip


def _family(name: str, kind: Literal["counter", "gauge"], text: str, samples: Iterable[Sample]) -> str:
    return _head(name, kind, text) + "".join(_line(name, labels, value) for labels, value in samples)


def _histogram(name: str, text: str, samples: Iterable[tuple[Mapping[str, str], HistogramValues]]) -> str:
    """Prometheus counts cumulatively: a bucket holds all values up to its bound."""
    lines = [_head(name, "histogram", text)]
    for labels, values in samples:
        bounds = [*map(_number, values["bounds"]), "+Inf"]
        cumulative = list(accumulate(values["counts"]))
        for bound, count in zip(bounds, cumulative, strict=True):
            lines.append(_line(f"{name}_bucket", {**labels, "le": bound}, count))
        lines.append(_line(f"{name}_sum", labels, values["sum"]))
        lines.append(_line(f"{name}_count", labels, cumulative[-1]))
    return "".join(lines)


def _head(name: str, kind: str, text: str) -> str:
    return f"# HELP {_PREFIX}{name} {text}\n# TYPE {_PREFIX}{name} {kind}\n"


def _line(name: str, labels: Mapping[str, str | int], value: float) -> str:
    inside = ",".join(f'{key}="{_escaped(str(label))}"' for key, label in labels.items())
    return f"{_PREFIX}{name}{{{inside}}} {_number(value)}\n" if inside else f"{_PREFIX}{name} {_number(value)}\n"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(float(value))


def _labelled(label: str, values: Mapping[_Key, int]) -> list[Sample]:
    return [({label: key}, value) for key, value in values.items()]


def _by_priority(values: Mapping[Priority, HistogramValues]) -> list[tuple[Mapping[str, str], HistogramValues]]:
    return [({"priority": priority}, one) for priority, one in values.items()]


def _resident() -> list[Sample]:
    """Pages in memory of this process; none where the system has no /proc."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return []
    import resource

    return [({}, pages * resource.getpagesize())]
