"""The model server: this user's local one as it is, or the one at an address. None is started."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rs_tools.doctor.files import is_published, weights_folder
from rs_tools.doctor.findings import Finding, Setup
from rs_tools.endpoint import through_proxy
from rs_tools.upstream.choosing import KEY_VARIABLE

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
    kill = f"kill {server.pid}; the next question starts a new one"
    try:
        if not servers.answers(server):
            found = f"process {server.pid} is not a model server any more, or does not listen; {_says(server)}"
            return Finding(CHECK, "warning", found, f"rm {state}; the next question starts a new one")
    except ServerUnavailable:
        return Finding(CHECK, "problem", f"{where}: takes calls but does not answer; {_says(server)}", kill)
    if state.stat().st_mode & 0o077:
        return Finding(CHECK, "warning", f"others can read its token in {state}", f"chmod 600 {state}, and {kill}")
    answer = _models(server.url, server.token, trust_env=False)
    if answer.status_code == 503:
        return Finding(CHECK, "ok", f"{where}: still loading; {_says(server)}")
    if answer.status_code != 200:
        return Finding(CHECK, "problem", f"{where}: answers {answer.status_code}; {_says(server)}", kill)
    return _same_weights(answer, where, _says(server), kill, setup)


def _says(server: LocalServer) -> str:
    """The end of its log. Read after it was asked: what it logged up to its answer is in it."""
    return f"its log: {' | '.join(_last_lines(server.log)) or 'nothing'}"


def _same_weights(answer: httpx.Response, where: str, says: str, kill: str, setup: Setup) -> Finding:
    from model_server.checkpoints.layout import weights_digest

    [model] = answer.json()["data"]
    folder = weights_folder(setup)
    if not folder.is_dir() or is_published(folder):
        return Finding(CHECK, "ok", f"{where}: serves {model['id']} on {model['device']}; {says}")
    try:
        on_disk = weights_digest(folder)
    except OSError:
        on_disk = "none"
    if model["weights_digest"] != on_disk:
        found = f"{where}: serves weights {model['weights_digest']}, but {folder} holds {on_disk}"
        return Finding(CHECK, "warning", found, kill)
    served = f"{model['model']} ({model['weights_digest']}, as on the disk) on {model['device']}"
    return Finding(CHECK, "ok", f"{where}: serves {served}; {says}")


def remote_server(setup: Setup) -> Iterator[Finding]:
    """Whether the server at the given address answers, with this token, and has the model that is named."""
    if setup.model_url is None:
        return
    try:
        import httpx
    except ImportError:
        return  # `packages` says so
    url = setup.model_url.rstrip("/").removesuffix("/v1")
    token = setup.token if setup.model is None else os.environ.get(KEY_VARIABLE)
    try:
        yield _remote(_models(url, token, trust_env=through_proxy(url)), url, setup)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        found = f"{url} does not answer: {type(error).__name__}: {error}"
        yield Finding(CHECK, "problem", found, f"start it there, or mend the address {url}")


def _remote(answer: httpx.Response, url: str, setup: Setup) -> Finding:
    if answer.status_code in (401, 403):
        given = "give --token-file the file with the token that the server was started with"
        mend = given if setup.model is None else f"set {KEY_VARIABLE} to the endpoint's key"
        return Finding(CHECK, "problem", f"{url} wants another token, or one at all", mend)
    if answer.status_code == 503:
        return Finding(CHECK, "warning", f"{url} is still loading its model, or busy", "wait, and look again")
    models = _listed(answer)
    if setup.model is not None:
        names = [str(one.get("id")) for one in models]
        if setup.model in names:
            return Finding(CHECK, "ok", f"{url} has the model {setup.model}")
        found = f"{url} has no model {setup.model}, but {', '.join(names[:5]) or 'none that it lists'}"
        return Finding(CHECK, "problem", found, "give --model one of its names")
    if len(models) != 1 or models[0].get("owned_by") != "rs-perception":
        found = f"{url} answers {answer.status_code}, not as an rs-model-server does"
        return Finding(CHECK, "problem", found, "mend the address, or name the endpoint's model with --model")
    [model] = models
    return Finding(CHECK, "ok", f"{url} serves {model['id']} ({model['weights_digest']}) on {model['device']}")


def _listed(answer: httpx.Response) -> list[dict[str, Any]]:
    """The models of a list in OpenAI's form; none where it is no such list."""
    try:
        models = answer.json()["data"]
    except (ValueError, KeyError, TypeError):
        return []
    return [one for one in models if isinstance(one, dict)] if isinstance(models, list) else []


def _models(url: str, token: str | None, trust_env: bool) -> httpx.Response:
    import httpx

    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return httpx.get(f"{url}/v1/models", headers=headers, timeout=ANSWER_S, trust_env=trust_env)


def _last_lines(log: Path, count: int = 3) -> list[str]:
    try:
        return [line[:300] for line in log.read_text(errors="replace").splitlines()[-count:]]
    except OSError:
        return []
