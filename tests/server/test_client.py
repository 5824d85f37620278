"""The client, and the one local server that it finds or starts."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
from processes import REQUESTS, picture
from scripted import GUILTY, ScriptedPerceiver, tile

from model_server.engine import Engine
from model_server.protocol import MAX_BODY_BYTES, SERVICE, PerceiveRequest, TileChange
from rs_tools import local_server
from rs_tools.client import ModelClient
from rs_tools.errors import (
    AccessError,
    ArtifactError,
    InputError,
    NotServed,
    ServerBusy,
    ServerError,
    ServerUnavailable,
)
from rs_tools.imagery.access import AccessPolicy
from rs_tools.local_server import LocalServer, state_dir, state_file
from rs_tools.model_facts import ModelFacts
from rs_tools.tools import Tools
from rs_tools.user_folder import user_folder

CAPTION = PerceiveRequest(task="caption")


@contextmanager
def state_folder(directory: Path) -> Iterator[Path]:
    """A state folder of its own; the servers that were started for it end with it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RS_PERCEPTION_STATE", str(directory))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield directory
    for file in directory.glob("server-*.json"):
        kill(json.loads(file.read_bytes())["pid"])


@pytest.fixture
def state(tmp_path: Path) -> Iterator[Path]:
    with state_folder(tmp_path / "state") as directory:
        yield directory


@pytest.fixture(scope="module")
def shared_state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One folder for the tests that only need some server to be there: a start takes seconds."""
    with state_folder(tmp_path_factory.mktemp("local") / "state") as directory:
        yield directory


def kill(pid: int) -> None:
    """Kill it, and wait until it has gone: until then it holds its connections."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    for _ in range(1000):
        if not _lives(pid):
            return
        time.sleep(0.005)


def _lives(pid: int) -> bool:
    try:
        return os.waitpid(pid, os.WNOHANG) == (0, 0)
    except ChildProcessError:  # started by another process, or gone
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def only_state(directory: Path) -> Path:
    (file,) = directory.glob("server-*.json")
    return file


def modes(directory: Path) -> tuple[int, set[int]]:
    """Permissions of the folder, and of what servers left in it."""
    return directory.stat().st_mode & 0o777, {file.stat().st_mode & 0o777 for file in directory.glob("server-*")}


def only_log(directory: Path) -> Path:
    (file,) = directory.glob("server-*.log")
    return file


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(300):
        while not condition():  # noqa: ASYNC110 - the worker thread gives no event to wait for
            await asyncio.sleep(0.001)


async def local_pid(weights: Path) -> int:
    """Process of the local server that a new client finds or starts."""
    async with ModelClient(weights=str(weights)) as client:
        return (await client.health())["pid"]


def test_processes_that_start_at_once_share_one_server(shared_state: Path, debug_weights: Path) -> None:
    program = (
        "import asyncio\n"
        "from rs_tools.client import ModelClient\n"
        "async def main():\n"
        f"    async with ModelClient(weights={str(debug_weights)!r}) as client:\n"
        "        print((await client.health())['pid'])\n"
        "asyncio.run(main())\n"
    )
    clients = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    pids = {client.communicate(timeout=300)[0] for client in clients}
    assert pids == {f"{json.loads(only_state(shared_state).read_bytes())['pid']}\n"}


async def test_without_a_url_the_local_server_answers_and_is_kept_for_the_next(
    shared_state: Path, debug_weights: Path
) -> None:
    async with ModelClient(weights=str(debug_weights)) as first:
        answer = await first.perceive(REQUESTS[2], [picture(1)])
        assert answer.classes[0].labels == REQUESTS[2].labels
        pid = (await first.health())["pid"]
    assert await local_pid(debug_weights) == pid == json.loads(only_state(shared_state).read_bytes())["pid"]


async def test_the_local_server_is_for_its_user_only(shared_state: Path, debug_weights: Path) -> None:
    await local_pid(debug_weights)
    assert modes(shared_state) == (0o700, {0o600})
    server = json.loads(only_state(shared_state).read_bytes())
    async with ModelClient(server["url"], token="guessed") as stranger:
        with pytest.raises(ServerError, match="401"):
            await stranger.perceive(CAPTION, [picture(1)])


@pytest.mark.usefixtures("shared_state")
async def test_a_killed_server_is_replaced_by_the_next_call(debug_weights: Path) -> None:
    async with ModelClient(weights=str(debug_weights)) as client:
        before = await client.perceive(CAPTION, [picture(1)])
        pid = (await client.health())["pid"]
        kill(pid)
        after = await client.perceive(CAPTION, [picture(1)])
        assert after.captions == before.captions
        assert (await client.health())["pid"] != pid


@pytest.mark.usefixtures("shared_state")
async def test_a_server_killed_in_mid_call_is_an_error_at_once_and_the_next_call_has_a_new_one(
    debug_weights: Path,
) -> None:
    async with ModelClient(weights=str(debug_weights)) as client, ModelClient(weights=str(debug_weights)) as watcher:

        async def captions() -> int:
            return (await watcher.health())["engine"]["requests"].get("caption", 0)

        pid, before = (await client.health())["pid"], await captions()
        running = asyncio.create_task(client.perceive(CAPTION, [picture(i) for i in range(256)]))
        while await captions() == before:
            assert not running.done()
        kill(pid)
        told = r"does not answer.*call again, and a new one is started; its log tells of no fault"
        with pytest.raises(ServerUnavailable, match=told):
            async with asyncio.timeout(300):
                await running
        assert (await client.perceive(CAPTION, [picture(1)])).captions
        assert (await client.health())["pid"] != pid


def test_of_a_log_only_what_tells_of_a_fault_is_quoted(tmp_path: Path) -> None:
    server = LocalServer(url="http://127.0.0.1:1", token="", pid=0, log=tmp_path / "log")
    at = "2026-11-22 09:47:05,040"
    routine = [
        f"{at} INFO model_server.app ready load_s=3.05",
        f"{at} INFO model_server.http.request_log call id=1 method=POST path=/v1/perceive status=200",
        f"{at} WARNING model_server.http.request_log call id=2 method=POST path=/v1/perceive status=503 error=busy",
    ]
    server.log.write_text("\n".join(routine))
    assert server.last_words() == f"its log tells of no fault (log: {server.log})"
    telling = [f"{at} WARNING model_server.device out of memory with 4 queries", "terminate called: std::bad_alloc"]
    server.log.write_text("\n".join([routine[0], telling[0], routine[1], telling[1], routine[2]]))
    assert server.last_words() == f"its log says {telling[0]} | {telling[1]} (log: {server.log})"


def test_how_a_server_ended_that_could_not_log_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    monkeypatch.setattr(local_server, "_children", [process])
    server = LocalServer(url="http://127.0.0.1:1", token="", pid=process.pid, log=tmp_path / "log")
    process.kill()
    process.wait(300)
    assert server.last_words().startswith("it was killed, as the system does where memory runs out; ")


async def test_who_poses_as_a_server_that_has_ended_gets_neither_token_nor_tiles(
    shared_state: Path, debug_weights: Path
) -> None:
    """Another user of this machine, who waits at the port that it had."""
    heard: list[bytes] = []

    async def pose(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(await reader.readuntil(b"\r\n\r\n"))
        health = json.dumps({"service": SERVICE, "pid": pid}).encode()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(health), health))
        await writer.drain()
        writer.close()

    async with ModelClient(weights=str(debug_weights)) as client:
        pid = (await client.health())["pid"]
        port = httpx.URL(json.loads(only_state(shared_state).read_bytes())["url"]).port
        kill(pid)
        async with await asyncio.start_server(pose, "127.0.0.1", port):
            replaced = (await client.health())["pid"]
            assert replaced != pid
            kill(replaced)
            only_state(shared_state).write_text(json.dumps({
                "url": f"http://127.0.0.1:{port}", "token": "t", "pid": pid, "log": str(only_log(shared_state))
            }))  # fmt: skip
            async with ModelClient(weights=str(debug_weights)) as another:
                assert (await another.health())["pid"] != pid
    assert heard == []


async def test_a_spoilt_state_file_is_replaced(shared_state: Path, debug_weights: Path) -> None:
    pid = await local_pid(debug_weights)
    only_state(shared_state).write_text("{not json")
    kill(pid)
    new = await local_pid(debug_weights)
    assert new == json.loads(only_state(shared_state).read_bytes())["pid"] != pid


async def test_another_program_on_the_port_of_a_dead_server_is_not_taken_for_it(
    shared_state: Path, debug_weights: Path, scripted_url: str
) -> None:
    kill(await local_pid(debug_weights))
    server = json.loads(only_state(shared_state).read_bytes())
    only_state(shared_state).write_text(json.dumps({**server, "url": scripted_url}))
    async with ModelClient(weights=str(debug_weights)) as client:
        assert (await client.perceive(CAPTION, [picture(1)])).model.model != "scripted"


async def test_a_server_that_dies_at_its_start_is_reported_with_the_end_of_its_log(state: Path, tmp_path: Path) -> None:
    async with ModelClient(weights=str(tmp_path / "nowhere")) as client:
        with pytest.raises(ServerUnavailable, match="nowhere") as failure:
            await client.perceive(CAPTION, [picture(1)])
    assert str(only_log(state)) in str(failure.value)


@pytest.mark.usefixtures("state")
async def test_without_torch_the_error_names_the_extra_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else found(name))
    async with ModelClient() as client:
        with pytest.raises(ServerUnavailable, match=r"pip install 'rs-perception\[server\]'"):
            await client.health()


@pytest.fixture
def open_state(state: Path) -> Path:
    state.mkdir()
    state.chmod(0o777)
    return state


@pytest.mark.usefixtures("open_state")
async def test_a_state_folder_that_others_may_write_is_refused() -> None:
    async with ModelClient() as client:
        with pytest.raises(ServerUnavailable, match="RS_PERCEPTION_STATE"):
            await client.health()


@pytest.mark.parametrize("taken", ["lock", "{state}.new"])
async def test_a_state_that_cannot_be_written_is_an_error_with_advice_and_leaves_no_server(
    state: Path, debug_weights: Path, taken: str
) -> None:
    """As on a full disk or in a home folder that is read only."""
    os.makedirs(state / taken.format(state=state_file(str(debug_weights)).stem))
    os.chmod(state, 0o700)
    async with ModelClient(weights=str(debug_weights)) as client:
        with pytest.raises(ServerUnavailable, match=r"no state .* can be kept.*RS_PERCEPTION_STATE"):
            await client.health()
    assert not [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if str(state) in folder_of(pid)]


def folder_of(pid: int) -> str:
    """Where a living process works."""
    try:
        return os.readlink(f"/proc/{pid}/cwd")
    except OSError:
        return ""


async def test_what_prints_in_place_of_the_address_of_a_server_is_named(
    state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text("print('Welcome to this cluster!')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    async with ModelClient() as client:
        with pytest.raises(ServerUnavailable, match=r"Welcome to this cluster!.*rs-tools doctor"):
            await client.health()
    assert not only_log(state).read_text()


def test_folders_of_a_user_whose_files_a_group_may_write_are_the_users_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a umask of 002 the folder of answers, made first, left the folder around it open to the group, and no
    server was started there any more."""
    monkeypatch.delenv("RS_PERCEPTION_STATE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = os.umask(0o002)
    try:
        with pytest.raises(ArtifactError):  # there is no such file, but the folder is there
            asyncio.run(Tools(AccessPolicy([tmp_path]), ModelClient()).read_artifact("rs-artifact://none.tif"))
        assert state_dir().stat().st_mode & 0o777 == 0o700
    finally:
        os.umask(before)


def test_a_user_without_a_home_folder_may_name_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that runs under a number without an entry."""
    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 7)
    monkeypatch.setenv("RS_PERCEPTION_STATE", str(tmp_path))
    assert user_folder() == tmp_path
    monkeypatch.delenv("RS_PERCEPTION_STATE")
    with pytest.raises(AccessError, match="set RS_PERCEPTION_STATE"):
        user_folder()


async def test_a_url_where_nobody_listens_is_named_in_the_error() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        async with ModelClient(url) as client:
            with pytest.raises(ServerUnavailable, match=url):
                await client.perceive(CAPTION, [picture(1)])


async def test_one_broken_connection_is_survived() -> None:
    calls = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal calls
        calls += 1
        await reader.readline()
        if calls == 2:
            writer.write(b'HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\n{"calls":2}')
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server, ModelClient(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}") as client:
        assert await client.health() == {"calls": 2}
        with pytest.raises(ServerUnavailable):
            await client.health()
    assert calls == 4


async def test_a_server_of_another_kind_is_not_mistaken_for_ours() -> None:
    async def page(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(page, "127.0.0.1", 0)
    async with server, ModelClient(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}") as client:
        with pytest.raises(ServerError, match="protocol"):
            await client.perceive(CAPTION, [tile(1)])
        with pytest.raises(ServerError, match="rs-model-server"):
            await client.health()


async def test_a_busy_server_says_when_to_call_again(
    scripted_url: str, engine: Engine, perceiver: ScriptedPerceiver
) -> None:
    async with asyncio.timeout(300), ModelClient(scripted_url, token="secret") as client:
        perceiver.gate.clear()
        running = asyncio.create_task(client.perceive(CAPTION, [tile(1)]))
        await until(lambda: len(perceiver.batches) == 1)
        waiting = asyncio.create_task(client.perceive(CAPTION, [tile(2)] * 32))
        await until(lambda: engine.waiting == 32)
        with pytest.raises(ServerBusy, match="call again in") as refusal:
            await client.perceive(CAPTION, [tile(3)])
        assert refusal.value.retry_after_s >= 1
        perceiver.gate.set()
        assert (await running).captions[0].caption == "colour 1"
        assert len((await waiting).captions) == 32


async def test_the_words_of_the_server_reach_the_caller(scripted_url: str) -> None:
    async with ModelClient(scripted_url, token="secret") as client:
        with pytest.raises(ServerError, match="unlucky tile"):
            await client.perceive(CAPTION, [tile(GUILTY)])


async def test_arrays_arrive_on_the_answers_of_their_tiles(scripted_url: str) -> None:
    rng = np.random.default_rng(0)
    tiles = [rng.integers(0, 256, (h, w, 3), np.uint8) for h, w in ((5, 7), (5, 7), (8, 3), (8, 3))]
    async with asyncio.timeout(300), ModelClient(scripted_url, token="secret") as client:
        masks = (await client.perceive(PerceiveRequest(task="segment", labels=["road", "sea"]), tiles)).masks
        changes = (await client.perceive(PerceiveRequest(task="detect_change"), tiles)).changes
    for tile_, mask in zip(tiles, masks, strict=True):
        np.testing.assert_array_equal(mask.probabilities, np.stack([tile_[..., 0]] * 2))
    for before, after, change in zip(tiles[::2], tiles[1::2], changes, strict=True):
        np.testing.assert_array_equal(change.probabilities, after[..., 0] - before[..., 0])


async def test_an_array_that_does_not_fit_its_tile_is_not_passed_on(
    scripted_url: str, perceiver: ScriptedPerceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    change = TileChange(threshold=0.5, scale=1, probabilities=np.zeros((9, 9), np.uint8))
    monkeypatch.setattr(perceiver, "answer", lambda queries: [change] * len(queries))
    async with asyncio.timeout(300), ModelClient(scripted_url, token="secret") as client:
        with pytest.raises(ServerError, match=r"probabilities \(9, 9\) for a tile of 4x4"):
            await client.perceive(PerceiveRequest(task="detect_change"), [tile(1), tile(2)])


async def test_a_model_that_cannot_do_a_task_is_named_with_what_it_can(
    scripted_url: str, perceiver: ScriptedPerceiver
) -> None:
    perceiver.tasks = ("caption", "vqa")
    async with asyncio.timeout(300), ModelClient(scripted_url, token="secret") as client:
        with pytest.raises(NotServed, match=r"^the loaded model 'scripted' has no part for ground") as refusal:
            await client.perceive(PerceiveRequest(task="ground", text="ship"), [tile(1)])
    assert "it serves caption, vqa: use one of these" in str(refusal.value)


async def test_a_cancelled_call_frees_its_place_on_the_server(
    scripted_url: str, engine: Engine, perceiver: ScriptedPerceiver
) -> None:
    async with asyncio.timeout(300), ModelClient(scripted_url, token="secret") as client:
        perceiver.gate.clear()
        running = asyncio.create_task(client.perceive(CAPTION, [tile(1)]))
        await until(lambda: len(perceiver.batches) == 1)
        cancelled = asyncio.create_task(client.perceive(CAPTION, [tile(2)] * 9))
        await until(lambda: engine.waiting == 9)
        cancelled.cancel()
        await until(lambda: engine.waiting == 0)
        perceiver.gate.set()
        await running


async def test_more_bytes_than_a_request_may_have_are_refused_before_they_travel() -> None:
    side = 2048
    tiles = [picture(0, side)] * (MAX_BODY_BYTES // (side * side * 3) + 1)
    async with ModelClient("http://127.0.0.1:1") as client:
        with pytest.raises(InputError, match="smaller region"):
            await client.perceive(CAPTION, tiles)


def test_the_client_does_not_import_torch() -> None:
    program = "import sys, rs_tools.client; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=300, check=False).returncode == 0


async def test_too_many_calls_are_a_busy_server_too() -> None:
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 3\r\nContent-Length: 4\r\n\r\nwait")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(refuse, "127.0.0.1", 0)
    async with server, ModelClient(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}") as client:
        with pytest.raises(ServerBusy, match="call again in 3 s"):
            await client.health()


@pytest.mark.parametrize("said", ["Wed, 21 Oct 2026 07:28:00 GMT", "soon", "nan", "-5"])
async def test_a_busy_server_that_names_no_seconds_is_called_again_soon(said: str) -> None:
    """As a proxy in front of it may: the header may be a date."""
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 503 Busy\r\nRetry-After: {said}\r\nContent-Length: 4\r\n\r\nwait".encode())
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(refuse, "127.0.0.1", 0)
    async with server, ModelClient(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}") as client:
        with pytest.raises(ServerBusy, match="call again in 1 s") as refusal:
            await client.perceive(CAPTION, [tile(1)])
    assert refusal.value.retry_after_s == 1


@pytest.mark.parametrize("url", ["127.0.0.1:8765", "http://host:port", "http://host:99999", "http://[::1", "file:///x"])
def test_an_address_that_is_none_is_refused_before_anything_is_asked(url: str) -> None:
    with pytest.raises(InputError, match="is no address of a server: give one such as"):
        ModelClient(url)


@pytest.mark.parametrize("token", ["hush-4711\nhush-4712", "hush-4711 é"])
def test_a_token_that_no_header_can_carry_is_refused_and_not_quoted(token: str) -> None:
    with pytest.raises(InputError, match="one line of ASCII") as refusal:
        ModelClient("http://127.0.0.1:8765", token)
    assert "hush" not in str(refusal.value)


async def test_the_address_may_be_the_one_that_openai_clients_are_given(scripted_url: str) -> None:
    async with ModelClient(f"{scripted_url}/v1/", token="secret\n") as client:
        assert (await client.perceive(CAPTION, [tile(7)])).captions[0].caption == "colour 7"


async def test_no_proxy_stands_between_this_machine_and_itself(
    scripted_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    async with ModelClient(scripted_url, token="secret") as client:
        assert (await client.perceive(CAPTION, [tile(7)])).captions[0].caption == "colour 7"
    assert (await ModelFacts(scripted_url, "secret", None).taxonomy()).model == "scripted"


async def test_an_answer_that_cannot_be_unpacked_is_a_typed_error() -> None:
    async def garble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\nnone")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(garble, "127.0.0.1", 0)
    async with server, ModelClient(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}") as client:
        with pytest.raises(ServerUnavailable, match="DecodingError"):
            await client.health()
