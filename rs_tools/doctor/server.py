"""The model server: this user's local one as it is, or the one at an address. None is started."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rs_tools.doctor.files import is_published, weights_folder
from rs_tools.doctor.findings import Finding, Setup

if TYPE_CHECKING:
    import httpx

    from rs_tools.local_server import LocalServer

ANSWER_S = 10.0
CHECK = "model server"


def local_server(setup: Setup) -> Iterator[Finding]:
    """Whether the local server runs, answers, and has the weights that are on the disk; what its log says."""
    if setup.model_url is not None or sys.platform == "win32":
        return
    try:
        from rs_tools import local_server as servers
    except ImportError:
        return  # `packages` says which is missing
    state = servers.state_file(setup.weights)
    server = servers.read_state(state)
    if server is None or not servers.is_process(server.pid):
        yield _ended(state.with_suffix(".log"))
    else:
        yield _running(server, state, setup)
    for other in sorted(state.parent.glob("server-*.json")):
        stranger = servers.read_state(other)
        if other != state and stranger is not None and servers.is_process(stranger.pid):
            found = f"process {stranger.pid} serves other weights or another version; it ends by being idle"
            yield Finding("other model server", "ok", f"{found}; log {stranger.log}")


def _ended(log: Path) -> Finding:
    """None runs: was that the end of being idle, or a failure?"""
    last = _last_lines(log)
    failed = [line for line in last if " ERROR " in line or line.startswith(("Traceback", "Error", "Usage"))]
    if failed:
        return Finding(CHECK, "problem", f"the last one failed: {failed[-1]}; log {log}", "see what its log says")
    if last:
        return Finding(CHECK, "ok", f"none runs; the next question starts one. The last one's log {log}: {last[-1]}")
    return Finding(CHECK, "ok", f"none runs; the first question starts one, with its log in {log}")


def _running(server: LocalServer, state: Path, setup: Setup) -> Finding:
    from rs_tools import local_server as servers
    from rs_tools.errors import ServerUnavailable

    where = f"process {server.pid} at {server.url}, log {server.log}"
    says = " | ".join(_last_lines(server.log)) or "nothing"
    kill = f"kill {server.pid}; the next question starts a new one"
    try:
        if not servers.answers(server):
            found = f"process {server.pid} is not a model server any more, or does not listen; its log: {says}"
            return Finding(CHECK, "warning", found, f"rm {state}; the next question starts a new one")
    except ServerUnavailable:
        return Finding(CHECK, "problem", f"{where}: takes calls but does not answer; its log: {says}", kill)
    if state.stat().st_mode & 0o077:
        return Finding(CHECK, "warning", f"others can read its token in {state}", f"chmod 600 {state}, and {kill}")
    answer = _models(server.url, server.token, trust_env=False)
    if answer.status_code == 503:
        return Finding(CHECK, "ok", f"{where}: still loading; its log: {says}")
    if answer.status_code != 200:
        return Finding(CHECK, "problem", f"{where}: answers {answer.status_code}; its log: {says}", kill)
    return _same_weights(answer, where, says, kill, setup)


def _same_weights(answer: httpx.Response, where: str, says: str, kill: str, setup: Setup) -> Finding:
    from model_server.checkpoints.layout import weights_digest

    [model] = answer.json()["data"]
    folder = weights_folder(setup)
    if not folder.is_dir() or is_published(folder):
        return Finding(CHECK, "ok", f"{where}: serves {model['id']} on {model['device']}; its log: {says}")
    try:
        on_disk = weights_digest(folder)
    except OSError:
        on_disk = "none"
    if model["weights_digest"] != on_disk:
        found = f"{where}: serves weights {model['weights_digest']}, but {folder} holds {on_disk}"
        return Finding(CHECK, "warning", found, kill)
    served = f"{model['model']} ({model['weights_digest']}, as on the disk) on {model['device']}"
    return Finding(CHECK, "ok", f"{where}: serves {served}; its log: {says}")


def remote_server(setup: Setup) -> Iterator[Finding]:
    """Whether the server at the given address answers, with this token."""
    if setup.model_url is None:
        return
    try:
        import httpx
    except ImportError:
        return  # `packages` says so
    url = setup.model_url.rstrip("/")
    start = f"start it there with `rs-model-server --host ... --token-file ...`, or mend the address {url}"
    try:
        answer = _models(url, setup.token, trust_env=True)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        yield Finding(CHECK, "problem", f"{url} does not answer: {type(error).__name__}: {error}", start)
        return
    if answer.status_code in (401, 403):
        mend = "give --token-file the file with the token that the server was started with"
        yield Finding(CHECK, "problem", f"{url} refuses {'this' if setup.token else 'a call without a'} token", mend)
    elif answer.status_code == 503:
        yield Finding(CHECK, "warning", f"{url} is still loading its model, or busy", "wait, and look again")
    elif answer.status_code != 200 or not _is_ours(answer):
        yield Finding(CHECK, "problem", f"{url} answers {answer.status_code}, not as an rs-model-server does", start)
    else:
        [model] = answer.json()["data"]
        yield Finding(CHECK, "ok", f"{url} serves {model['id']} ({model['weights_digest']}) on {model['device']}")


def _models(url: str, token: str | None, trust_env: bool) -> httpx.Response:
    import httpx

    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return httpx.get(f"{url}/v1/models", headers=headers, timeout=ANSWER_S, trust_env=trust_env)


def _is_ours(answer: httpx.Response) -> bool:
    try:
        return answer.json()["data"][0]["owned_by"] == "rs-perception"
    except (ValueError, KeyError, IndexError, TypeError):
        return False


def _last_lines(log: Path, count: int = 3) -> list[str]:
    try:
        return [line[:300] for line in log.read_text(errors="replace").splitlines()[-count:]]
    except OSError:
        return []
