"""What the doctor finds of the model server: this user's own, or one at an address."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from examining import only

from rs_tools import local_server
from rs_tools.doctor import Setup, server


def remember(state: Path, weights: Path, url: str, pid: int, log: str = "") -> Path:
    file = local_server.state_file(str(weights))
    file.with_suffix(".log").write_text(log)
    told = local_server.LocalServer(url=url, token="t", pid=pid, log=file.with_suffix(".log"))
    file.write_text(told.model_dump_json())
    file.chmod(0o600)
    return file


def test_a_running_server_is_shown_with_its_weights_and_log_and_one_that_was_killed_is_not(
    debug_weights: Path, tmp_path: Path
) -> None:
    weights = tmp_path / "weights"
    shutil.copytree(debug_weights, weights)
    running = local_server.find_or_start(str(weights))
    try:
        ready = only(server.local_server, Setup(weights=str(weights)))
        while "still loading" in ready.found:
            time.sleep(0.2)
            ready = only(server.local_server, Setup(weights=str(weights)))
        assert ready.status == "ok"
        for word in (f"process {running.pid}", "as on the disk", str(running.log), "INFO model_server"):
            assert word in ready.found
    finally:
        os.kill(running.pid, signal.SIGTERM)
    local_server._children[-1].wait(300)
    ended = only(server.local_server, Setup(weights=str(weights)))
    assert ended.status == "ok"
    assert "none runs" in ended.found
    assert "stopped" in ended.found


def test_a_server_that_failed_is_shown_with_the_reason_in_its_log(debug_weights: Path, state: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    line = "2026-01-01 ERROR model_server.app the model could not be loaded: OutOfMemory"
    log = remember(state, debug_weights, "http://127.0.0.1:9", ended.pid, line).with_suffix(".log")
    finding = only(server.local_server, Setup(weights=str(debug_weights)))
    assert finding.status == "problem"
    assert "OutOfMemory" in finding.found
    assert str(log) in finding.found


class Stranger(BaseHTTPRequestHandler):
    """Another program's server."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        models = {"data": [{"id": "some-model", "owned_by": "somebody"}]}
        self.wfile.write(json.dumps(models if self.path == "/v1/models" else {"hello": "world"}).encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def stranger() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Stranger) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


def test_another_program_on_the_servers_port_is_not_taken_for_it(
    debug_weights: Path, state: Path, stranger: str
) -> None:
    file = remember(state, debug_weights, stranger, os.getpid())
    finding = only(server.local_server, Setup(weights=str(debug_weights)))
    assert (finding.status, f"rm {file}" in finding.mend) == ("warning", True)
    elsewhere = only(server.remote_server, Setup(model_url=stranger))
    assert elsewhere.status == "problem"
    assert "not as an rs-model-server" in elsewhere.found


def test_of_another_models_endpoint_the_model_must_be_there(stranger: str) -> None:
    there = only(server.remote_server, Setup(model_url=f"{stranger}/v1", model="some-model"))
    assert there.status == "ok"
    absent = only(server.remote_server, Setup(model_url=f"{stranger}/v1", model="another"))
    assert absent.status == "problem"
    assert "some-model" in absent.found


def test_a_server_that_takes_calls_and_does_not_answer_is_a_problem(
    debug_weights: Path, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_server, "PROBE_S", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        remember(state, debug_weights, f"http://127.0.0.1:{silent.getsockname()[1]}", os.getpid())
        finding = only(server.local_server, Setup(weights=str(debug_weights)))
    assert finding.status == "problem"
    assert f"kill {os.getpid()}" in finding.mend


def test_an_address_where_nobody_answers_is_a_problem() -> None:
    with socket.socket() as deaf:  # bound, so that nobody else can listen there
        deaf.bind(("127.0.0.1", 0))
        finding = only(server.remote_server, Setup(model_url=f"http://127.0.0.1:{deaf.getsockname()[1]}"))
    assert finding.status == "problem"
    assert "does not answer" in finding.found
