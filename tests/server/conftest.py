from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import cast

import pytest
import uvicorn
from scripted import ScriptedPerceiver

from model_server.app import bind
from model_server.engine import Engine
from model_server.http.api import create_app
from model_server.perceiver import Perceiver


@pytest.fixture
def perceiver() -> ScriptedPerceiver:
    return ScriptedPerceiver()


@pytest.fixture
def loader(perceiver: ScriptedPerceiver) -> Callable[[], Perceiver]:
    return lambda: cast(Perceiver, perceiver)


@pytest.fixture
async def engine(loader: Callable[[], Perceiver], perceiver: ScriptedPerceiver) -> AsyncIterator[Engine]:
    engine = Engine(loader, max_batch=4, max_waiting=32)
    await engine.start()
    yield engine
    perceiver.gate.set()
    await engine.close()


@pytest.fixture
async def scripted_url(engine: Engine) -> AsyncIterator[str]:
    """The real HTTP stack over the scripted perceiver, in this process; its token is `secret`."""
    sock = bind("127.0.0.1", 0)
    server = uvicorn.Server(
        uvicorn.Config(create_app(engine, token="secret", max_body=1 << 20), log_config=None, lifespan="off")
    )
    serving = asyncio.create_task(server.serve(sockets=[sock]))
    yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    server.should_exit = True
    await serving
