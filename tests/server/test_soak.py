"""A short form of benchmarks/soak.py: callers that leave, ask nonsense and send too much harm nobody."""

from __future__ import annotations

import asyncio
from pathlib import Path

from scripts import loaded

from model_server.perceiver import Perceiver

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "soak.py"


def test_two_hundred_unruly_requests_leave_no_slot_taken_and_no_answer_lost_or_swapped(dense_weights: Path) -> None:
    soak = loaded(SCRIPT)
    perceiver = Perceiver.load(dense_weights)
    report, counted = asyncio.run(soak.soak(perceiver, 200))
    assert report.wrong == []
    assert sum(report.outcomes.values()) == 200
    assert min(report.outcomes[kind] for kind in ("answered", "cancelled", "malformed", "oversize")) > 0
    assert (perceiver.writing("interactive"), perceiver.writing("bulk")) == (0, 0)
    assert counted["cache"]["bytes"] <= counted["cache"]["limit_bytes"]
