"""A short form of benchmarks/soak.py: callers that leave, ask nonsense and send too much harm nobody."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from pathlib import Path

from model_server.perceiver import Perceiver

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "soak.py"


def test_two_hundred_unruly_requests_leave_no_slot_taken_and_no_answer_lost_or_swapped(dense_weights: Path) -> None:
    spec = importlib.util.spec_from_file_location("soak", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    soak = importlib.util.module_from_spec(spec)
    sys.modules["soak"] = soak  # dataclasses look their module up
    spec.loader.exec_module(soak)
    perceiver = Perceiver.load(dense_weights)
    report, counted = asyncio.run(soak.soak(perceiver, 200))
    assert report.wrong == []
    assert sum(report.outcomes.values()) == 200
    assert min(report.outcomes[kind] for kind in ("answered", "cancelled", "malformed", "oversize")) > 0
    assert (perceiver.writing("interactive"), perceiver.writing("bulk")) == (0, 0)
    assert counted["cache"]["bytes"] <= counted["cache"]["limit_bytes"]
