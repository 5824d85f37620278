"""The engine over a real model that writes token by token: who joins when changes nobody's answer, who leaves frees
its place at once, and what fails is done again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Hashable, Sequence
from pathlib import Path

import numpy as np
import pytest

from model_server.engine import Engine
from model_server.perceiver import Perceiver
from model_server.protocol import PerceiveRequest, PerceiveResponse, Priority, TileAnswer

CAPTION = PerceiveRequest(task="caption")
ASKED = [
    CAPTION,
    PerceiveRequest(task="vqa", text="Is there a ship?"),
    PerceiveRequest(task="classify"),
    PerceiveRequest(task="caption", detail="full"),
    PerceiveRequest(task="vqa", text="How many of the large buildings stand near the river in this image?"),
    PerceiveRequest(task="ground", text="ship"),
    PerceiveRequest(task="classify", labels=["forest", "city"]),
    PerceiveRequest(task="segment", labels=["water", "road"]),
]


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (48, 64, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def model(dense_weights: Path) -> Perceiver:
    return Perceiver.load(dense_weights)


@pytest.fixture
async def engine(model: Perceiver) -> AsyncIterator[Engine]:
    model.free_memory()
    engine = Engine(lambda: model)
    await engine.start()
    async with asyncio.timeout(300):
        yield engine
        await engine.close()
    for priority in ("interactive", "bulk"):
        assert model.writing(priority) == 0, "a slot is stuck"


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - the worker thread gives no event to wait for
        await asyncio.sleep(0.001)


def assert_same(answer: PerceiveResponse, expected: PerceiveResponse) -> None:
    """Words alike, numbers alike up to rounding."""
    assert [c.caption for c in answer.captions] == [c.caption for c in expected.captions]
    assert [v.answer for v in answer.vqa] == [v.answer for v in expected.vqa]
    for field in ("captions", "vqa"):
        assert [a.confidence for a in getattr(answer, field)] == pytest.approx(
            [a.confidence for a in getattr(expected, field)], abs=1e-4
        )
    for got, wanted in zip(answer.classes, expected.classes, strict=True):
        assert got.scores == pytest.approx(wanted.scores, abs=1e-4)
    for got, wanted in zip(answer.objects, expected.objects, strict=True):
        assert got.scores == pytest.approx(wanted.scores, abs=1e-3)
    for got, wanted in zip(answer.masks, expected.masks, strict=True):
        assert np.abs(got.probabilities.astype(int) - wanted.probabilities).max() <= 1


async def test_thirty_callers_of_all_tasks_get_the_answers_that_each_gets_alone(
    engine: Engine, model: Perceiver
) -> None:
    asked = [(ASKED[i % len(ASKED)], picture(i % 7)) for i in range(30)]
    alone = []
    for request, image in asked:
        model.free_memory()
        alone.append(await engine.perceive(request, [image]))
    model.free_memory()
    hits = model.cache.hits
    steps, written = engine.stats.steps, engine.stats.step_sequences.sum
    together = await asyncio.gather(
        *(
            engine.perceive(request, [image], priority="bulk" if i % 3 else "interactive")
            for i, (request, image) in enumerate(asked)
        )
    )
    for answer, expected in zip(together, alone, strict=True):
        assert_same(answer, expected)
    assert model.cache.hits > hits
    counted = engine.metrics()
    assert counted["step_sequences"]["sum"] - written > counted["steps"] - steps, "no step wrote for more than one"
    assert (counted["decoding"], counted["on_device"], counted["waiting"]) == (0, 0, 0)


async def test_more_tiles_than_there_are_slots_are_all_answered_in_their_order(
    engine: Engine, model: Perceiver
) -> None:
    room = model.room("caption", "bulk")
    tiles = [picture(i % 3) for i in range(2 * room + 1)]
    answer = await engine.perceive(CAPTION, tiles, priority="bulk")
    assert [c.caption for c in answer.captions] == [answer.captions[i % 3].caption for i in range(len(tiles))]


async def test_a_short_answer_does_not_wait_for_a_long_one(engine: Engine) -> None:
    ended: list[str] = []

    async def ask(request: PerceiveRequest, name: str) -> None:
        await engine.perceive(request, [picture(3)])
        ended.append(name)

    long = asyncio.create_task(ask(CAPTION, "long"))
    await until(lambda: engine.metrics()["decoding"] == 1)
    await ask(PerceiveRequest(task="classify"), "short")
    await long
    assert ended == ["short", "long"]


async def test_a_caller_that_leaves_frees_its_slot_before_the_answer_is_written(
    engine: Engine, model: Perceiver
) -> None:
    leaving = asyncio.create_task(engine.perceive(CAPTION, [picture(i) for i in range(4)]))
    await until(lambda: engine.metrics()["decoding"] > 0)
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    steps = engine.stats.steps
    await until(lambda: model.writing() == 0)
    assert engine.stats.steps <= steps + 2
    assert engine.metrics()["cancellations"] == 1
    assert len((await engine.perceive(CAPTION, [picture(1)])).captions) == 1


async def test_a_step_that_fails_costs_nobody_its_answer(
    engine: Engine, model: Perceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = [await engine.perceive(CAPTION, [picture(i)]) for i in range(3)]
    step, calls = model.step, 0

    def fail_once(priority: Priority = "interactive") -> Sequence[tuple[Hashable, TileAnswer]]:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise ZeroDivisionError("an unlucky step")
        return step(priority)

    monkeypatch.setattr(model, "step", fail_once)
    answers = await asyncio.gather(*(engine.perceive(CAPTION, [picture(i)]) for i in range(3)))
    for answer, expected in zip(answers, alone, strict=True):
        assert_same(answer, expected)
    assert engine.metrics()["failures"] == 0


async def test_the_plan_of_memory_and_the_cache_are_in_the_metrics(engine: Engine, model: Perceiver) -> None:
    await engine.perceive(CAPTION, [picture(50)])
    counted = engine.metrics()
    assert counted["memory"]["sequences"] == model.plan.sequences
    assert counted["memory"]["slots"] <= counted["memory"]["free"]
    assert 0 < counted["cache"]["bytes"] <= counted["cache"]["limit_bytes"] == counted["memory"]["cache"]
