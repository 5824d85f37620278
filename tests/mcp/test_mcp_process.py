"""`rs-mcp` as a process: its wire, its options, its progress reports and what it must not load."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from http_processes import running_service
from mcp import Client
from mcp_processes import ModelServer, stdio, text_of

import mcp_server
from rs_tools.imagery.access import AccessPolicy
from rs_tools.mcp import progress as mcp_progress

SCENE = "itaipu_landsat8.tif"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mcp_server", *arguments], input="", capture_output=True, text=True, timeout=300
    )


def test_nothing_is_written_to_stdout_unless_a_client_asks(root: Path) -> None:
    ended = run("--root", str(root))
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == ""


def test_the_server_and_its_tools_never_load_torch() -> None:
    code = "import sys, mcp_server, rs_tools.cli; assert 'torch' not in sys.modules, 'torch is loaded'"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--root"),
        (["--root", "/nowhere"], "/nowhere"),
        (["--root", ".", "--http", "--host", "0.0.0.0"], "not authenticated"),
        (["--root", ".", "--http", "--port", "99999"], "65535"),
        (["--root", ".", "--token-file", "t"], "--model-url"),
        (["--root", ".", "--model-url", "127.0.0.1:8765"], "is no address of a server"),
        (["--root", ".", "--model-url", "http://127.0.0.1:1", "--token-file", "/nowhere"], "/nowhere"),
        (["--root", ".", "--model-url", "http://127.0.0.1:1", "--weights", "w"], "--weights"),
    ],
)
def test_wrong_options_end_with_a_reason_on_stderr(arguments: list[str], said: str) -> None:
    ended = run(*arguments)
    assert ended.returncode == 2
    assert said in ended.stderr
    assert ended.stdout == ""


async def test_with_nothing_configured_it_starts_a_model_server_that_the_next_session_shares(
    debug_weights: Path, root: Path, tmp_path: Path
) -> None:
    arguments = ["--root", str(root), "--weights", str(debug_weights)]
    state = tmp_path / "state"
    pids = []
    try:
        for _ in range(2):
            async with Client(stdio(*arguments, RS_PERCEPTION_STATE=str(state))) as client:
                answer = await client.call_tool("caption", {"image": SCENE})
                assert not answer.is_error, text_of(answer)
                pids.append(_pid(state))
        assert pids[0] == pids[1]
    finally:
        for pid in set(pids):
            os.kill(pid, signal.SIGTERM)


def test_over_http_a_foreign_host_or_origin_is_refused(http_server: str) -> None:
    body = {"jsonrpc": "2.0", "id": 1, "method": "ping"}
    headers = {"Accept": "application/json, text/event-stream"}
    for name, value, status in (("Host", "evil.example", 421), ("Origin", "https://evil.example", 403)):
        answer = httpx.post(http_server, json=body, headers=headers | {name: value}, trust_env=False, timeout=60)
        assert answer.status_code == status


async def test_a_long_call_reports_progress_that_only_grows_and_can_be_cancelled(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mcp_progress, "EVERY_S", 0.02)
    seen: list[float] = []
    asked, enough, hung_up = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def never_answers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.set()
        await reader.read(-1)  # until the other side hangs up
        hung_up.set()
        writer.close()

    async def heard(progress: float, total: float | None, message: str | None) -> None:
        seen.append(progress)
        assert message
        if len(seen) == 5:
            enough.set()

    async with await asyncio.start_server(never_answers, "127.0.0.1", 0) as silent:
        url = f"http://127.0.0.1:{silent.sockets[0].getsockname()[1]}"
        async with Client(mcp_server.build_server(AccessPolicy([root]), url)) as client:
            call = asyncio.create_task(client.call_tool("caption", {"image": SCENE}, progress_callback=heard))
            async with asyncio.timeout(300):
                await asked.wait()
                await enough.wait()
                call.cancel()
                await hung_up.wait()
            assert not (await client.call_tool("list_images", {})).is_error
    assert seen == sorted(set(seen))


@pytest.mark.parametrize("transport", ["stdio", "http"])
async def test_a_client_that_waits_no_longer_hangs_up_on_the_model_server(
    root: Path, tmp_path: Path, transport: str
) -> None:
    asked, hung_up = asyncio.Event(), asyncio.Event()

    async def never_answers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.set()
        await reader.read(-1)  # until the other side hangs up
        hung_up.set()
        writer.close()

    async with contextlib.AsyncExitStack() as stack:
        silent = await stack.enter_async_context(await asyncio.start_server(never_answers, "127.0.0.1", 0))
        url = f"http://127.0.0.1:{silent.sockets[0].getsockname()[1]}"
        arguments = ["--root", str(root), "--model-url", url]
        if transport == "stdio":
            client = Client(stdio(*arguments))
        else:
            service = await asyncio.to_thread(stack.enter_context, running_service(tmp_path, *arguments))
            client = Client(f"{service.url}/mcp")
        session = await stack.enter_async_context(client)
        waiting = asyncio.create_task(session.call_tool("caption", {"image": SCENE}))
        async with asyncio.timeout(300):
            await asked.wait()
            waiting.cancel()
            await hung_up.wait()
        assert not (await session.call_tool("list_images", {})).is_error


async def test_sixteen_calls_at_once_are_all_answered(model_server: ModelServer, http_server: str) -> None:
    async with Client(http_server) as client:
        answers = await asyncio.gather(*(client.call_tool("classify", {"image": SCENE}) for _ in range(16)))
    assert len({text_of(answer) for answer in answers}) == 1
    assert not any(answer.is_error for answer in answers)


def _pid(state: Path) -> int:
    (file,) = state.glob("server-*.json")
    return json.loads(file.read_text())["pid"]
