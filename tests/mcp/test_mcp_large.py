"""A scene of many looks over MCP: progress in looks, and a cancelled call that stops."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from mcp import Client, MCPError
from mcp_processes import Connect, text_of

import mcp_server
from model_server.protocol import ModelInfo, PerceiveRequest, PerceiveResponse, TileVqa
from rs_tools.errors import NotServed
from rs_tools.imagery.access import AccessPolicy
from rs_tools.looking import BATCH
from rs_tools.mcp import progress as mcp_progress
from rs_tools.mcp.progress import Progress

SIDE = 2000
QUESTION = "How many ships are there?"
TILES = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one scene of 64 looks."""
    folder = tmp_path_factory.mktemp("large")
    values = np.random.default_rng(0).integers(1, 255, (3, SIDE, SIDE), dtype="uint8")
    profile: dict[str, Any] = {"driver": "GTiff", "dtype": "uint8", "count": 3, "width": SIDE, "height": SIDE}
    with rasterio.open(folder / "large.tif", "w", photometric="RGB", tiled=True, **profile) as file:
        file.write(values)
    return folder


class GatedModel:
    """Counts what it is asked; from the second batch on it answers only when the gate is open."""

    def __init__(self) -> None:
        self.batches = 0
        self.gate = asyncio.Event()
        self.waiting = asyncio.Event()
        self.cancelled = asyncio.Event()

    async def perceive(self, request: PerceiveRequest, tiles: list[np.ndarray]) -> PerceiveResponse:
        if request.task == "ground":
            raise NotServed("this model has no part for boxes")
        self.batches += 1
        if self.batches > 1:
            self.waiting.set()
            try:
                await self.gate.wait()
            except asyncio.CancelledError:
                self.cancelled.set()
                raise
        none = TileVqa(answer="0", kind="count", confidence=0.8, abstained=False, alternatives=[])
        info = ModelInfo(model="gated", weights_digest="0", attention_backend="none", precision="none", device="none")
        return PerceiveResponse(vqa=[none] * len(tiles), model=info, task_token="[VQA]", expert="image", elapsed_s=0)

    async def aclose(self) -> None:
        pass


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> GatedModel:
    model = GatedModel()
    monkeypatch.setattr(mcp_server, "ModelClient", lambda *_: model)
    return model


async def test_progress_is_in_looks_with_their_total_and_only_grows(
    folder: Path, model: GatedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mcp_progress, "EVERY_S", 0.02)
    heard: list[tuple[float, float | None, str]] = []

    async def hear(progress: float, total: float | None, message: str | None) -> None:
        heard.append((progress, total, message or ""))
        if message and message.startswith(f"{BATCH} of {TILES}") and sum(p > BATCH for p, _, _ in heard) == 3:
            model.gate.set()

    async with Client(mcp_server.build_server(AccessPolicy([folder]))) as client:
        async with asyncio.timeout(300):
            arguments = {"image": "large.tif", "question": QUESTION}
            answer = await client.call_tool("vqa", arguments, progress_callback=hear)
    assert not answer.is_error, text_of(answer)
    assert model.batches == TILES // BATCH
    values = [progress for progress, _, _ in heard]
    assert values == sorted(set(values))
    assert max(values) < TILES
    assert {total for _, total, _ in heard} <= {None, TILES}
    during = [message for progress, _, message in heard if BATCH < progress < BATCH + 1]
    assert len(during) >= 3
    assert all(re.fullmatch(rf"{BATCH} of {TILES} looks done, \d+ s", message) for message in during)


def test_progress_grows_within_its_total_also_between_looks_and_when_a_call_looks_twice() -> None:
    progress = Progress()
    heard = [progress.report() for _ in range(3)]
    for total, steps in ((64, range(0, 65, 16)), (3, range(4)), (1, (0, 1))):  # three times in one call
        for done in steps:
            progress(done, total, f"{done} of {total} looks done")
            heard += [progress.report() for _ in range(100)]
    values = [value for value, _, _ in heard]
    assert values == sorted(set(values))
    assert all(total is None or value < total for value, total, _ in heard)
    assert [total for _, total, _ in heard[::50]][-1] == 64 + 3 + 1
    assert heard[0][2] == "opening the image"
    assert heard[-1][2] == "all 1 looks done, making the answer"


async def test_a_client_that_waits_no_longer_ends_the_work(folder: Path, model: GatedModel) -> None:
    async with Client(mcp_server.build_server(AccessPolicy([folder]))) as client:
        arguments = {"image": "large.tif", "question": QUESTION}
        for patience_s in (3, 60):  # a loaded machine may not come to the second batch within the first of them
            with pytest.raises(MCPError, match=r"(?i)timed out"):
                await client.call_tool("vqa", arguments, read_timeout_seconds=patience_s)
            if model.waiting.is_set():
                break
        async with asyncio.timeout(300):
            await model.cancelled.wait()
    assert model.batches == 2


async def test_a_cancelled_call_asks_no_further_batch_and_the_server_goes_on(folder: Path, model: GatedModel) -> None:
    async with Client(mcp_server.build_server(AccessPolicy([folder]))) as client:
        call = asyncio.create_task(client.call_tool("vqa", {"image": "large.tif", "question": QUESTION}))
        async with asyncio.timeout(300):
            await model.waiting.wait()
            call.cancel()
            await model.cancelled.wait()
            model.gate.set()
            assert not (await client.call_tool("list_images", {})).is_error
    assert model.batches == 2


async def test_a_call_beyond_its_deadline_is_an_error_with_what_was_found(folder: Path, model: GatedModel) -> None:
    async with Client(mcp_server.build_server(AccessPolicy([folder]), deadline_s=3)) as client:
        refused = await client.call_tool("vqa", {"image": "large.tif", "question": QUESTION})
    assert refused.is_error
    assert re.search(rf"The 3 s for one call are over after \d+ of {TILES} looks", text_of(refused))
    assert "smaller region" in text_of(refused)


async def test_a_large_scene_is_answered_by_real_processes_over_both_transports(connect: Connect) -> None:
    """The bundled road scene has more pixels than one look for a count."""
    async with connect() as client:
        answer = await client.call_tool("vqa", {"image": "yellowstone_road.jpg", "question": QUESTION})
    assert not answer.is_error, text_of(answer)
    assert answer.structured_content is not None
    grid = answer.structured_content["provenance"]["tile_grid"]
    assert grid["columns"] * grid["rows"] > 1
    assert grid["decimation"] == 1
