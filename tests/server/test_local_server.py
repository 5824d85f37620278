"""The one local server of a user that the client finds or starts."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from processes import REQUESTS, picture

from model_server.protocol import SERVICE, PerceiveRequest
from rs_tools import local_server
from rs_tools.client import ModelClient
from rs_tools.errors import (
    AccessError,
    ArtifactError,
    ServerError,
    ServerUnavailable,
)
from rs_tools.imagery.access import AccessPolicy
from rs_tools.local_server import LocalServer, state_dir, state_file
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
