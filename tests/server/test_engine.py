"""How the engine shares one device between callers. The perceiver is scripted: the order of events is the test."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import httpx
import numpy as np
import pytest
from scripted import GUILTY, ScriptedPerceiver, tile

from model_server.app import bind, serve
from model_server.batching.dispatcher import Dispatcher
from model_server.engine import DeadlinePassed, Engine, EngineBusy, EngineClosing, EngineNotReady, QueryFailed
from model_server.http.api import create_app
from model_server.perceiver import Perceiver
from model_server.protocol import PerceiveRequest, PerceiveResponse, TaskNotServed, encode_request

CAPTION = PerceiveRequest(task="caption")


@pytest.fixture(autouse=True)
async def bounded():
    async with asyncio.timeout(300):
        yield


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - the worker thread gives no event to wait for
        await asyncio.sleep(0.001)


async def hold_device(engine: Engine, perceiver: ScriptedPerceiver) -> asyncio.Task[PerceiveResponse]:
    """A first request is on the device and stays there until the gate opens."""
    perceiver.gate.clear()
    first = asyncio.create_task(engine.perceive(CAPTION, [tile(0)]))
    await until(lambda: perceiver.batches == [[0]])
    return first


def captions(response: PerceiveResponse) -> list[str]:
    return [answer.caption for answer in response.captions]


async def test_requests_of_several_callers_share_a_batch_whatever_their_tasks(
    engine: Engine, perceiver: ScriptedPerceiver
) -> None:
    first = await hold_device(engine, perceiver)
    caption = asyncio.create_task(engine.perceive(CAPTION, [tile(1)]))
    vqa = asyncio.create_task(engine.perceive(PerceiveRequest(task="vqa", text="which?"), [tile(2)]))
    classify = asyncio.create_task(engine.perceive(PerceiveRequest(task="classify", labels=["a", "b"]), [tile(51)]))
    await until(lambda: engine.waiting == 3)
    perceiver.gate.set()

    await first
    assert captions(await caption) == ["colour 1"]
    assert (await vqa).vqa[0].answer == "which? 2"
    assert (await classify).classes[0].scores == [0.2, 0.2]
    assert perceiver.batches == [[0], [1, 2, 51]]
    assert (engine.stats.batches, engine.stats.shared_batches, engine.stats.largest_batch) == (2, 1, 3)


async def test_a_pair_is_one_item_with_one_answer(engine: Engine) -> None:
    change = PerceiveRequest(task="detect_change", gsd_m=2)
    answer = await engine.perceive(change, [tile(10), tile(15), tile(20), tile(27), tile(30), tile(39)])
    assert [int(c.probabilities[0, 0]) for c in answer.changes] == [5, 7, 9]
    assert [c.scale for c in answer.changes] == [2, 2, 2]
    assert engine.stats.tiles == 6


async def test_every_field_of_a_dense_request_reaches_the_model(engine: Engine) -> None:
    ground = await engine.perceive(PerceiveRequest(task="ground", text="ship", gsd_m=0.5), [tile(3)])
    assert (ground.objects[0].boxes, ground.objects[0].scale) == ([(0, 0, 3, 3)], 0.5)
    segment = PerceiveRequest(task="segment", labels=["road", "sea"], modality="sar")
    (masks,) = (await engine.perceive(segment, [tile(9)])).masks
    assert (masks.labels, masks.known, masks.probabilities.shape) == (["road", "sea"], [True, True], (2, 4, 4))


async def test_large_dense_tiles_take_more_places_of_a_batch_so_that_short_questions_do_not_wait_long(
    engine: Engine, perceiver: ScriptedPerceiver
) -> None:
    first = await hold_device(engine, perceiver)
    ground = PerceiveRequest(task="ground", text="ship")
    large = asyncio.create_task(engine.perceive(ground, [np.full((512, 512, 3), i, np.uint8) for i in (1, 2, 3)]))
    short = asyncio.create_task(engine.perceive(CAPTION, [tile(9)]))
    await until(lambda: engine.waiting == 4)
    perceiver.gate.set()
    await asyncio.gather(first, large, short)
    assert perceiver.batches == [[0], [1], [9], [2], [3]]  # of four places, so large a tile takes all


async def test_small_dense_tiles_share_a_batch_with_short_questions(
    engine: Engine, perceiver: ScriptedPerceiver
) -> None:
    first = await hold_device(engine, perceiver)
    ground = PerceiveRequest(task="ground", text="ship")
    boxes = asyncio.create_task(engine.perceive(ground, [tile(1), tile(2)]))
    short = asyncio.create_task(engine.perceive(CAPTION, [tile(9)]))
    await until(lambda: engine.waiting == 3)
    perceiver.gate.set()
    await asyncio.gather(first, boxes, short)
    assert perceiver.batches == [[0], [1, 9, 2]]


async def test_a_task_that_the_model_has_no_part_for_is_refused_and_the_others_are_served(
    engine: Engine, perceiver: ScriptedPerceiver
) -> None:
    perceiver.tasks = ("caption", "vqa", "classify")
    with pytest.raises(TaskNotServed, match="no part for ground, it serves caption, vqa, classify"):
        await engine.perceive(PerceiveRequest(task="ground", text="ship"), [tile(1)])
    assert captions(await engine.perceive(CAPTION, [tile(4)])) == ["colour 4"]
    assert perceiver.batches == [[4]]


async def test_every_caller_gets_the_answers_to_its_own_tiles_in_their_order(engine: Engine) -> None:
    asked = [[10 * caller + i + 20 for i in range(caller % 5 + 1)] for caller in range(10)]
    answers = await asyncio.gather(*(engine.perceive(CAPTION, [tile(c) for c in colours]) for colours in asked))
    assert [captions(answer) for answer in answers] == [[f"colour {c}" for c in colours] for colours in asked]
    assert engine.stats.largest_batch == 4


async def test_a_large_scene_does_not_hold_up_a_short_question(engine: Engine, perceiver: ScriptedPerceiver) -> None:
    first = await hold_device(engine, perceiver)
    large = asyncio.create_task(engine.perceive(CAPTION, [tile(100 + i) for i in range(20)]))
    await until(lambda: engine.waiting == 20)
    short = asyncio.create_task(engine.perceive(CAPTION, [tile(1)]))
    await until(lambda: engine.waiting == 21)
    perceiver.gate.set()
    await asyncio.gather(first, large, short)
    assert 1 in perceiver.batches[1]


async def test_a_request_that_the_model_fails_on_fails_alone(engine: Engine, perceiver: ScriptedPerceiver) -> None:
    first = await hold_device(engine, perceiver)
    innocent = asyncio.create_task(engine.perceive(CAPTION, [tile(1), tile(2)]))
    guilty = asyncio.create_task(engine.perceive(CAPTION, [tile(3), tile(GUILTY)]))
    await until(lambda: engine.waiting == 4)
    perceiver.gate.set()
    await first
    assert captions(await innocent) == ["colour 1", "colour 2"]
    with pytest.raises(QueryFailed, match="unlucky tile"):
        await guilty
    assert captions(await engine.perceive(CAPTION, [tile(4)])) == ["colour 4"]


async def test_the_rest_of_a_failed_request_is_not_computed(engine: Engine, perceiver: ScriptedPerceiver) -> None:
    with pytest.raises(QueryFailed):
        await engine.perceive(CAPTION, [tile(GUILTY)] + [tile(1)] * 20)
    assert engine.waiting == 0
    assert captions(await engine.perceive(CAPTION, [tile(2)])) == ["colour 2"]
    assert perceiver.batches == [[GUILTY, 1, 1, 1], [GUILTY], [1], [1], [1], [2]]


async def test_a_full_queue_refuses_and_says_when_to_come_back(engine: Engine, perceiver: ScriptedPerceiver) -> None:
    first = await hold_device(engine, perceiver)
    waiting = asyncio.create_task(engine.perceive(CAPTION, [tile(1)] * 30))
    await until(lambda: engine.waiting == 30)
    with pytest.raises(EngineBusy) as refusal:
        await engine.perceive(CAPTION, [tile(2)] * 3)
    assert refusal.value.retry_after_s >= 1
    fits = asyncio.create_task(engine.perceive(CAPTION, [tile(3)] * 2))
    await until(lambda: engine.waiting == 32)
    perceiver.gate.set()
    await asyncio.gather(first, waiting, fits)


async def test_a_cancelled_request_leaves_the_queue(engine: Engine, perceiver: ScriptedPerceiver) -> None:
    first = await hold_device(engine, perceiver)
    cancelled = asyncio.create_task(engine.perceive(CAPTION, [tile(66)] * 9))
    other = asyncio.create_task(engine.perceive(CAPTION, [tile(1)]))
    await until(lambda: engine.waiting == 10)
    cancelled.cancel()
    await until(lambda: engine.waiting == 1)
    perceiver.gate.set()
    await asyncio.gather(first, other)
    assert perceiver.batches == [[0], [1]]


async def test_a_request_cancelled_on_the_device_harms_nobody_in_its_batch(
    engine: Engine, perceiver: ScriptedPerceiver
) -> None:
    first = await hold_device(engine, perceiver)
    other = asyncio.create_task(engine.perceive(CAPTION, [tile(1)]))
    await until(lambda: engine.waiting == 1)
    first.cancel()
    perceiver.gate.set()
    assert captions(await other) == ["colour 1"]
    with pytest.raises(asyncio.CancelledError):
        await first


async def test_closing_answers_who_waits_and_refuses_who_comes(engine: Engine, perceiver: ScriptedPerceiver) -> None:
    first = await hold_device(engine, perceiver)
    waiting = asyncio.create_task(engine.perceive(CAPTION, [tile(1)] * 9))
    await until(lambda: engine.waiting == 9)
    closing = asyncio.create_task(engine.close())
    await until(lambda: not engine.ready)
    with pytest.raises(EngineClosing, match="closing"):
        await engine.perceive(CAPTION, [tile(2)])
    perceiver.gate.set()
    await closing
    assert captions(await first) == ["colour 0"]
    assert captions(await waiting) == ["colour 1"] * 9


async def test_interactive_requests_go_before_bulk_ones_that_came_first(
    engine: Engine, perceiver: ScriptedPerceiver
) -> None:
    first = await hold_device(engine, perceiver)
    bulk = asyncio.create_task(engine.perceive(CAPTION, [tile(100 + i) for i in range(6)], priority="bulk"))
    await until(lambda: engine.waiting == 6)
    asked = PerceiveRequest(task="caption", priority="interactive")
    interactive = asyncio.create_task(engine.perceive(asked, [tile(1), tile(2)]))
    await until(lambda: engine.waiting == 8)
    assert engine.metrics()["waiting_by_priority"] == {"interactive": 2, "bulk": 6}
    perceiver.gate.set()
    await asyncio.gather(first, bulk, interactive)
    assert perceiver.batches == [[0], [1, 2], [100, 101], [102, 103], [104, 105]]


async def test_bulk_work_goes_on_while_interactive_requests_never_cease(engine: Engine) -> None:
    async def ask_for_ever() -> None:
        while True:
            await engine.perceive(CAPTION, [tile(1)])

    asking = [asyncio.create_task(ask_for_ever()) for _ in range(8)]
    await until(lambda: engine.stats.tiles > 20)
    answer = await engine.perceive(CAPTION, [tile(7)] * 6, priority="bulk")
    assert captions(answer) == ["colour 7"] * 6
    for task in asking:
        task.cancel()
    await asyncio.gather(*asking, return_exceptions=True)


async def test_all_requests_of_one_caller_share_one_turn(engine: Engine, perceiver: ScriptedPerceiver) -> None:
    first = await hold_device(engine, perceiver)
    many = [asyncio.create_task(engine.perceive(CAPTION, [tile(100 + i)], caller="scene")) for i in range(9)]
    await until(lambda: engine.waiting == 9)
    few = [asyncio.create_task(engine.perceive(CAPTION, [tile(1 + i)], caller=f"caller {i}")) for i in range(3)]
    await until(lambda: engine.waiting == 12)
    perceiver.gate.set()
    await asyncio.gather(first, *many, *few)
    assert perceiver.batches[1] == [100, 1, 2, 3]


async def test_one_caller_cannot_fill_the_queue(engine: Engine, perceiver: ScriptedPerceiver) -> None:
    first = await hold_device(engine, perceiver)
    greedy = asyncio.create_task(engine.perceive(CAPTION, [tile(1)] * 16, caller="scene"))
    await until(lambda: engine.waiting == 16)
    with pytest.raises(EngineBusy):
        await engine.perceive(CAPTION, [tile(1)], caller="scene")
    other = asyncio.create_task(engine.perceive(CAPTION, [tile(2)], caller="other"))
    await until(lambda: engine.waiting == 17)
    assert engine.metrics()["rejections"] == {"busy": 1}
    perceiver.gate.set()
    await asyncio.gather(first, greedy, other)


async def test_a_request_whose_deadline_passes_ends_and_leaves_the_queue(
    engine: Engine, perceiver: ScriptedPerceiver
) -> None:
    first = await hold_device(engine, perceiver)
    with pytest.raises(DeadlinePassed, match="0 of 2 tiles") as passed:
        await engine.perceive(PerceiveRequest(task="caption", deadline_s=0.05), [tile(66)] * 2)
    assert (passed.value.done, passed.value.items) == (0, 2)
    perceiver.gate.set()
    await first
    assert captions(await engine.perceive(CAPTION, [tile(4)], deadline_s=10)) == ["colour 4"]
    assert perceiver.batches == [[0], [4]]
    assert engine.metrics()["deadlines_passed"] == 1


async def test_a_batch_that_does_not_fit_in_memory_goes_in_halves_and_so_do_later_ones(
    engine: Engine, perceiver: ScriptedPerceiver
) -> None:
    perceiver.memory = 1
    first = await hold_device(engine, perceiver)
    waiting = [asyncio.create_task(engine.perceive(CAPTION, [tile(1 + i)])) for i in range(4)]
    await until(lambda: engine.waiting == 4)
    perceiver.gate.set()
    await first
    assert [captions(await answer) for answer in waiting] == [[f"colour {i}"] for i in (1, 2, 3, 4)]
    assert perceiver.batches == [[0], [1, 2, 3, 4], [1, 2], [1], [2], [3, 4], [3], [4]]
    again = asyncio.gather(*(engine.perceive(CAPTION, [tile(5)]) for _ in range(3)))
    await again
    assert perceiver.batches[8:] == [[5], [5], [5]]
    assert engine.metrics()["halvings"] == 3


async def test_a_tile_that_does_not_fit_in_memory_alone_is_refused_with_that_reason(
    engine: Engine, perceiver: ScriptedPerceiver
) -> None:
    perceiver.memory = 0
    with pytest.raises(QueryFailed, match="does not fit in memory, even alone"):
        await engine.perceive(CAPTION, [tile(1)])
    perceiver.memory = 9
    assert captions(await engine.perceive(CAPTION, [tile(4)])) == ["colour 4"]


async def test_a_fault_of_the_engine_itself_leaves_nobody_waiting(
    loader: Callable[[], Perceiver], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(loader)
    await engine.start()

    def fail(*_: object) -> None:
        raise ZeroDivisionError("a fault of ours")

    monkeypatch.setattr(Dispatcher, "_begin", fail)
    with pytest.raises(EngineClosing, match="the engine has failed"):
        await engine.perceive(CAPTION, [tile(1)])
    assert not engine.ready
    await engine.close()


async def test_a_server_whose_engine_has_failed_ends_so_that_another_can_be_started(
    loader: Callable[[], Perceiver], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("a fault of ours")

    monkeypatch.setattr(Dispatcher, "_begin", fail)
    engine, sock = Engine(loader), bind("127.0.0.1", 0)
    serving = asyncio.create_task(serve(engine, create_app(engine), sock))
    await until(lambda: engine.ready)
    url = f"http://127.0.0.1:{sock.getsockname()[1]}/v1/perceive"
    async with httpx.AsyncClient(trust_env=False) as client:
        headers = {"Content-Type": "application/octet-stream"}
        response = await client.post(url, content=encode_request(CAPTION, [tile(1)]), headers=headers)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "not_ready")
    assert await asyncio.wait_for(serving, 30) == 1


async def test_what_happened_is_counted(engine: Engine) -> None:
    await engine.perceive(CAPTION, [tile(1), tile(2)])
    await engine.perceive(PerceiveRequest(task="classify", labels=["a"]), [tile(3)], priority="bulk")
    with pytest.raises(QueryFailed):
        await engine.perceive(CAPTION, [tile(GUILTY)])
    counted = engine.metrics()
    assert (counted["requests"], counted["tiles"], counted["failures"]) == ({"caption": 2, "classify": 1}, 3, 1)
    assert (counted["batches"], counted["largest_batch"], counted["on_device"]) == (3, 2, 0)
    assert (sum(counted["first_token_s"]["counts"]), sum(counted["answer_s"]["bulk"]["counts"])) == (2, 1)


async def test_nothing_is_answered_before_the_model_is_loaded(loader: Callable[[], Perceiver]) -> None:
    engine = Engine(loader)
    with pytest.raises(EngineNotReady, match="loading"):
        await engine.perceive(CAPTION, [tile(1)])
    await engine.start()
    assert captions(await engine.perceive(CAPTION, [tile(1)])) == ["colour 1"]
    await engine.close()


async def test_a_model_that_cannot_be_loaded_says_why() -> None:
    def load() -> Perceiver:
        raise FileNotFoundError("no weights here")

    engine = Engine(load)
    with pytest.raises(FileNotFoundError, match="no weights here"):
        await engine.start()
    assert not engine.ready
    await engine.close()
