"""One local model server per user, shared by every process: found through a state file, started when there is none.

The state file (mode 0600, in `state_dir()`) holds url, token and pid. Its name carries the weights and this project's
version: other weights, weights that were replaced on disk, or another version get a server of their own and the old one
ends by being idle. A lock on the folder makes finding and starting one step: two processes that start at once get one
server.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import platform
import re
import secrets
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import httpx
from pydantic import BaseModel, ValidationError

from model_server import protocol
from rs_tools.errors import ServerUnavailable
from rs_tools.user_folder import make_user_folder, user_folder

IDLE_EXIT_S = 15 * 60
ANNOUNCE_S = 60  # on a loaded machine or a slow disk; a process that ends is noticed at once
PROBE_S = 10
# Lines of its log that do not tell why it ended: what went well, and calls that were refused.
_ROUTINE = re.compile(r"[-\d]+ [:,\d]+ (?:(?:DEBUG|INFO) |\w+ model_server\.http\.request_log )")


class LocalServer(BaseModel):
    """How to reach the running server, and where it writes its log."""

    url: str
    token: str
    pid: int
    log: Path

    def last_words(self) -> str:
        """How it ended, as far as that is known, and what its log says of it."""
        return _last_words(self.log, self.pid)


def find_or_start(weights: str | None) -> LocalServer:
    """The user's server for these weights (None: the embedded model); it may still be loading them.

    Blocks: at once when it runs, otherwise about the start of a Python process, at most `ANNOUNCE_S`.

    Raises:
        ServerUnavailable: it cannot be started or remembered, or does not answer though its process lives.
    """
    if sys.platform == "win32":
        raise ServerUnavailable(
            "a local model server is started on Linux and macOS only: "
            "run `rs-model-server` yourself and give its url, http://127.0.0.1:8765"
        )
    directory = state_dir()
    state = state_file(weights)
    try:
        with _lock(directory):
            running = read_state(state)
            if running is not None and answers(running):
                return running
            _sweep(directory, state)
            server = _start(weights, state.with_suffix(".log"))
            try:
                _write(state, server)
            except OSError:
                unknown = _children.pop()  # nobody would find it
                unknown.kill()
                unknown.wait()
                raise
            return server
    except OSError as error:
        raise ServerUnavailable(
            f"no state of the local model server can be kept in {directory} ({error.strerror}): make room there, or "
            "set RS_PERCEPTION_STATE to a folder that you own"
        ) from error


def state_dir() -> Path:
    """The user's folder for state files, made where it is missing. Only the user may enter it."""
    try:
        directory = make_user_folder()
        status = directory.stat()
    except OSError as error:
        raise ServerUnavailable(
            f"no state of the local model server can be kept in {user_folder()} ({error.strerror}): "
            "set RS_PERCEPTION_STATE to a folder that you own"
        ) from error
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise ServerUnavailable(
            f"{directory} can be written by others, who could put a server of their own in the place of yours: "
            f"chmod 700 {directory}, or set RS_PERCEPTION_STATE to a folder that only you may write"
        )
    return directory


def state_file(weights: str | None) -> Path:
    """The state file of the server of these weights, as they are on disk now; it and its folder may not exist."""
    return user_folder() / f"server-{_key(weights)}.json"


def _key(weights: str | None) -> str:
    root = Path(weights).expanduser().resolve() if weights else Path(protocol.__file__).parent / "weights"
    # What is not on the disk is an id on the hub, the same in whichever folder it is named.
    named = str(root) if root.exists() else str(weights)
    seen = [platform.node(), sys.executable, version("rs-perception"), named]
    for path in sorted(root.rglob("*")) if root.is_dir() else [root]:
        with contextlib.suppress(FileNotFoundError):  # the server itself says that they are missing
            status = path.stat()
            seen.append(f"{path} {status.st_size} {status.st_mtime_ns}")
    return hashlib.sha256("\n".join(seen).encode()).hexdigest()[:12]


@contextlib.contextmanager
def _lock(directory: Path) -> Iterator[None]:
    import fcntl  # not on Windows, where this module must still import

    with (directory / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # goes with the file, also when this process is killed
        yield


def read_state(state: Path) -> LocalServer | None:
    """What a state file says; None where there is none, or half of one."""
    try:
        return LocalServer.model_validate_json(state.read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


def _write(state: Path, server: LocalServer) -> None:
    new = state.with_suffix(".new")
    with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(server.model_dump_json())
    new.replace(state)


def answers(server: LocalServer) -> bool:
    """Whether it is alive and itself: after a kill or a reboot another program, and another user's, may hold its port.

    Raises:
        ServerUnavailable: it accepts calls, and leaves them.
    """
    if not is_process(server.pid):
        return False  # whoever answers there only says that it is the server
    try:
        health = httpx.get(f"{server.url}/health", timeout=PROBE_S, trust_env=False).json()
    except httpx.TimeoutException as error:
        raise ServerUnavailable(
            f"the local model server at {server.url} (process {server.pid}) accepts calls but does not answer: "
            f"end that process and call again; its log is {server.log}"
        ) from error
    except (httpx.TransportError, json.JSONDecodeError, UnicodeDecodeError):
        return False
    return isinstance(health, dict) and health.get("service") == protocol.SERVICE and health.get("pid") == server.pid


def _sweep(directory: Path, wanted: Path) -> None:
    """Drop what servers of other weights left behind that are gone."""
    for state in directory.glob("server-*.json"):
        server = read_state(state)
        if state != wanted and (server is None or not is_process(server.pid)):
            for left in directory.glob(f"{state.stem}.*"):
                left.unlink(missing_ok=True)


def is_process(pid: int) -> bool:
    """Whether it is a living process of this user."""
    if child := _child(pid):
        return child.poll() is None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # the number belongs to another user's process now
        return False
    return True


# Servers that this process started: polling them keeps a dead one from staying a zombie.
_children: list[subprocess.Popen[bytes]] = []
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_children.clear)  # they are the parent's


def _child(pid: int) -> subprocess.Popen[bytes] | None:
    return next((child for child in _children if child.pid == pid), None)


def _start(weights: str | None, log: Path) -> LocalServer:
    if importlib.util.find_spec("torch") is None:
        raise ServerUnavailable(
            "no model server is configured and none can be started here, because torch is not installed: "
            "`pip install 'rs-perception[server]'`, or give the url of a running rs-model-server"
        )
    _children[:] = [child for child in _children if child.poll() is None]
    token = secrets.token_urlsafe(32)
    # -P: no module of the caller's working folder may stand in for one of ours.
    arguments = [sys.executable, "-P", "-m", "model_server.app", "--port", "0", "--token-file", "-"]
    arguments += ["--idle-exit", str(IDLE_EXIT_S)]
    if weights:
        path = Path(weights).expanduser()
        arguments += ["--weights", str(path.resolve()) if path.exists() else weights]  # which may be an id on the hub
    with contextlib.suppress(FileNotFoundError):
        log.replace(log.with_suffix(".log.old"))  # why the previous one ended
    with open(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as stderr:
        process = subprocess.Popen(
            arguments,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            cwd=log.parent,
            start_new_session=True,  # it outlives this process and its terminal
        )
    _children.append(process)
    line = _announcement(process, token)
    try:
        url = json.loads(line)["url"]
    except (ValueError, KeyError, TypeError) as error:
        said = f"it began with {line.decode(errors='replace')[:100]!r}; `rs-tools doctor` finds what prints that"
        why = said if line else _last_words(log, process.pid)
        process.kill()
        raise ServerUnavailable(f"the local model server did not start: {why}") from error
    return LocalServer(url=url, token=token, pid=process.pid, log=log)


def _announcement(process: subprocess.Popen[bytes], token: str) -> bytes:
    """Hand over the token and read the line with the url; empty when the process ended or said nothing in time."""
    assert process.stdin is not None
    assert process.stdout is not None
    with process.stdout as stdout, contextlib.suppress(BrokenPipeError):  # a dead process: its log says why
        with process.stdin as stdin:
            stdin.write(f"{token}\n".encode())
        deadline = time.monotonic() + ANNOUNCE_S
        if select.select([stdout], [], [], deadline - time.monotonic())[0]:
            return stdout.readline()
    return b""


def _last_words(log: Path, pid: int) -> str:
    """The last lines of a log that tell of a fault, each cut to what an error message has room for."""
    try:
        lines = log.read_text(errors="replace").splitlines()
    except FileNotFoundError:
        lines = []
    telling = [line for line in lines if line.strip() and not _ROUTINE.match(line)][-3:]
    first = [line.split(r"\n", 1)[0][:300] for line in telling]  # our server writes a traceback as one line
    told = f"its log says {' | '.join(first)}" if first else "its log tells of no fault"
    return f"{_end(pid)}{told} (log: {log})"


def _end(pid: int) -> str:
    """How it ended, where this process started it and that was not of its own accord."""
    child = _child(pid)
    status = child.poll() if child else None
    if not status:
        return ""
    if status == -signal.SIGKILL:
        return "it was killed, as the system does where memory runs out; "
    return f"it ended by {signal.Signals(-status).name}; " if status < 0 else f"it ended with status {status}; "
