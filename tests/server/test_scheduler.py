"""Whose turn it is, without a device."""

from __future__ import annotations

import numpy as np

from model_server.batching.scheduler import Job, Scheduler, Shares
from model_server.protocol import PerceiveRequest, Priority, Task
from model_server.query import Query

ROOM: dict[Task, int] = {"caption": 99, "vqa": 99, "classify": 99}
TILE = np.zeros((2, 2, 3), np.uint8)


def job(tiles: int, task: Task = "caption", caller: str = "") -> Job:
    request = PerceiveRequest(task=task, text="what?")
    return Job(request, [Query(task, TILE, text="what?")] * tiles, "interactive", caller)


def order(scheduler: Scheduler, names: dict[Job, str], most: int, room: dict[Task, int] = ROOM) -> str:
    return "".join(names[taken] for taken, _ in scheduler.take("interactive", room, most))


def test_ten_callers_with_one_tile_wait_for_one_tile_each_of_a_caller_with_five_thousand() -> None:
    scheduler = Scheduler()
    large = job(5000)
    names = {large: "L"} | {job(1): str(i) for i in range(10)}
    for one in names:
        scheduler.add(one)
    assert order(scheduler, names, 16) == "L0123456789LLLLL"
    assert scheduler.waiting("interactive") == 5000 - 6


def test_the_requests_of_one_named_caller_take_turns_among_themselves() -> None:
    scheduler = Scheduler()
    names = {job(3, caller="x"): "a", job(3, caller="x"): "b", job(2, caller="y"): "c"}
    for one in names:
        scheduler.add(one)
    assert order(scheduler, names, 9) == "acbcabab"


def test_a_task_without_room_holds_up_no_other() -> None:
    scheduler = Scheduler()
    names = {job(4): "c", job(2, "classify"): "k"}
    for one in names:
        scheduler.add(one)
    assert order(scheduler, names, 9, {"caption": 1, "classify": 9}) == "ckk"
    assert not scheduler.has_work("interactive", {"caption": 0, "classify": 9})
    assert scheduler.has_work("interactive", {"caption": 1, "classify": 0})


def test_what_is_put_back_goes_first_again_in_its_order() -> None:
    scheduler = Scheduler()
    names = {job(3): "a", job(1): "b", job(2): "c"}
    for one in names:
        scheduler.add(one)
    taken = scheduler.take("interactive", ROOM, 9)
    assert [index for _, index in taken] == [0, 0, 0, 1, 1, 2]  # a b c a c a
    scheduler.put_back(taken[2:])
    assert scheduler.take("interactive", ROOM, 9)[:2] == taken[2:4]
    assert scheduler.waiting("interactive") == 0


def test_a_removed_job_is_gone_and_a_second_removal_is_harmless() -> None:
    scheduler = Scheduler()
    gone, kept = job(2), job(1)
    scheduler.add(gone)
    scheduler.add(kept)
    scheduler.remove(gone)
    scheduler.remove(gone)
    assert scheduler.take("interactive", ROOM, 9) == [(kept, 0)]


def test_bulk_work_has_its_share_of_the_time_and_a_short_interactive_request_is_not_interrupted() -> None:
    shares = Shares(bulk=0.2)
    both: tuple[Priority, Priority] = ("interactive", "bulk")
    chosen: list[Priority] = []
    for _ in range(400):
        turn = shares.choose(both)
        chosen.append(turn)
        shares.spend(turn, 0.02 if turn == "interactive" else 0.1)
    assert chosen[:20] == ["interactive"] * 20
    spent = chosen.count("bulk") * 0.1 / (chosen.count("bulk") * 0.1 + chosen.count("interactive") * 0.02)
    assert 0.15 < spent <= 0.2


def test_time_spent_before_both_wanted_the_device_gives_bulk_no_claim() -> None:
    shares = Shares()
    assert shares.choose(["interactive"]) == "interactive"
    shares.spend("interactive", 100)
    assert shares.choose(["interactive", "bulk"]) == "interactive"
    assert shares.choose(["bulk"]) == "bulk"
