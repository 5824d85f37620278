"""`rs-tools doctor` on real breakage: each test spoils one thing and reads what is found and how to mend it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from rs_tools import doctor, local_server
from rs_tools.doctor import Check, Finding, Setup, clients, files, installation, machine, network, server
from rs_tools.doctor import findings as findings_module

SCENES = Path(__file__).parents[2] / "examples" / "data"


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "state"
    folder.mkdir(mode=0o700)
    monkeypatch.setenv("RS_PERCEPTION_STATE", str(folder))
    return folder


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    return Setup(home=tmp_path / "home", folder=tmp_path / "project", ports=())


def only(check: Check, setup: Setup) -> Finding:
    [finding] = check(setup)
    return finding


def module(folder: Path, name: str, text: str) -> None:
    (folder / f"{name}.py").write_text(text + "\n")


# The whole


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | environment)


def test_a_sound_installation_gives_status_0_and_a_broken_root_status_1(tmp_path: Path) -> None:
    home = {"HOME": str(tmp_path)}
    sound = run("rs_tools.cli", "doctor", "--json", "--root", str(SCENES), **home)
    report = json.loads(sound.stdout)
    assert sound.returncode == 0, sound.stdout
    assert report["status"] in ("ok", "warning")
    checks = {one["check"] for one in report["findings"]}
    for check in ("python", "packages", "torch", "start", "raster libraries", "weights", "model server", "memory"):
        assert check in checks
    broken = run("rs_tools.cli", "doctor", "--root", str(tmp_path / "absent"), "--model-url", "http://127.0.0.1:9")
    assert broken.returncode == 1
    assert f"{tmp_path / 'absent'} does not exist" in broken.stdout
    assert "-> give --root a folder that exists" in broken.stdout


def test_it_runs_where_the_packages_of_the_tools_cannot_be_imported(tmp_path: Path) -> None:
    for name in ("rasterio", "typer", "httpx", "pydantic", "httpcore", "torch"):
        module(tmp_path, name, f"raise ImportError('{name} is spoilt')")
    done = run("rs_tools.doctor", "--json", PYTHONPATH=str(tmp_path), HOME=str(tmp_path))
    assert done.returncode == 1, done.stderr
    said = {one["check"]: one["found"] for one in json.loads(done.stdout)["findings"] if one["status"] == "problem"}
    assert "is spoilt" in said["start"]
    assert "rasterio is spoilt" in said["raster libraries"]
    assert "torch is spoilt" in said["torch"]
    assert "httpcore is spoilt" in said["certificates"]


def test_the_command_line_loads_nothing_that_may_be_broken_until_it_is_needed() -> None:
    program = "import sys, rs_tools.cli; assert not {'rasterio', 'httpx', 'numpy', 'pydantic'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_worst_finding_is_the_status_of_the_report() -> None:
    fine, odd, bad = Finding("a", "ok", "x"), Finding("b", "warning", "x", "y"), Finding("c", "problem", "x", "y")
    assert [doctor.Report(one).status for one in ([], [fine], [fine, odd], [bad, odd])] == [
        "ok", "ok", "warning", "problem",
    ]  # fmt: skip


def test_a_finding_that_is_not_ok_says_how_to_mend_it() -> None:
    with pytest.raises(ValueError, match="mend"):
        Finding("a", "problem", "x")


# Installation


def test_a_package_that_is_too_old_is_named_with_its_bounds(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "site" / "rasterio-0.9.dist-info"
    old.mkdir(parents=True)
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: rasterio\nVersion: 0.9\n")
    monkeypatch.syspath_prepend(old.parent)
    finding = only(installation.packages, setup)
    assert finding.status == "problem"
    assert "rasterio 0.9 is not >=1.4" in finding.found
    assert "pip install" in finding.mend


def test_without_the_server_extra_the_local_server_cannot_start_but_another_may_serve(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tmp_path / "site" / "rs_perception-0.1.0.dist-info"
    project.mkdir(parents=True)
    (project / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: rs-perception\nVersion: 0.1.0\n"
        'Requires-Dist: no-such-torch>=2.6; extra == "server"\n'
    )
    monkeypatch.syspath_prepend(project.parent)
    alone = next(one for one in installation.extras(setup) if one.check == "extra server")
    assert (alone.status, "no-such-torch is missing" in alone.found) == ("problem", True)
    assert "rs-perception[server]" in alone.mend
    elsewhere = Setup(model_url="http://gpu:8765")
    assert {one.status for one in installation.extras(elsewhere)} == {"ok"}


def test_what_prints_when_python_starts_is_found_because_stdout_is_the_wire(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module(tmp_path, "sitecustomize", "print('Welcome to the cluster')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    finding = next(installation.start(setup))
    assert finding.status == "problem"
    assert "Welcome to the cluster" in finding.found
    assert "sitecustomize" in finding.mend


def test_a_probe_that_does_not_end_is_given_up(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module(tmp_path, "mcp_server", "import time; time.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(findings_module, "PROBE_S", 0.5)
    assert "no end" in only(installation.start, setup).found


def test_commands_of_another_installation_on_path_are_pointed_out(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stranger = tmp_path / "rs-mcp"
    stranger.write_text("#!/bin/sh\n")
    stranger.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    finding = next(installation.commands(setup))
    assert (finding.check, finding.status) == ("command rs-mcp", "warning")
    assert str(stranger) in finding.found


# Files


def test_projection_data_of_another_program_are_blamed(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert only(files.raster_libraries, setup).status == "ok"
    monkeypatch.setenv("PROJ_DATA", str(tmp_path))
    finding = only(files.raster_libraries, setup)
    assert finding.status != "ok"
    assert f"PROJ_DATA={tmp_path}" in finding.found
    assert finding.mend == "unset PROJ_DATA"


def test_whole_weights_are_named_by_the_digest_that_answers_carry(setup: Setup, debug_weights: Path) -> None:
    from model_server.checkpoints.store import load_checkpoint

    finding = only(files.weights, Setup(weights=str(debug_weights)))
    assert finding.status == "ok"
    assert f"digest {load_checkpoint(debug_weights).digest}" in finding.found
    assert "words only" in finding.found


def test_the_embedded_weights_are_those_that_the_server_loads() -> None:
    from model_server.perceiver import DEFAULT_WEIGHTS

    assert files.embedded_weights().resolve() == Path(DEFAULT_WEIGHTS).resolve()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda file: file.write_text("version https://git-lfs.github.com/spec/v1\nsize 9\n"), "git-lfs pointer"),
        (lambda file: os.truncate(file, file.stat().st_size - 1), "is damaged"),
        (lambda file: file.write_bytes(b"{}"), "no safetensors file"),
        (lambda file: file.write_bytes(b""), "no safetensors file"),
        (lambda file: file.unlink(), "has no model.safetensors"),
    ],
    ids=["pointer", "truncated", "another file", "empty", "missing"],
)
def test_spoilt_weights_are_found_without_loading_them(
    debug_weights: Path, tmp_path: Path, spoil: Callable[[Path], object], said: str
) -> None:
    folder = tmp_path / "weights"
    shutil.copytree(debug_weights, folder)
    spoil(folder / "model.safetensors")
    finding = only(files.weights, Setup(weights=str(folder)))
    assert finding.status == "problem"
    assert said in finding.found


def test_a_published_checkpoint_is_looked_at_shard_by_shard(debug_weights: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llava_qwen"}')
    shutil.copy(debug_weights / "model.safetensors", tmp_path / "model-00001.safetensors")
    assert only(files.weights, Setup(weights=str(tmp_path))).status == "ok"
    shards = {"weight_map": {"a": "model-00001.safetensors", "b": "model-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(shards))
    os.truncate(tmp_path / "model-00001.safetensors", 1000)
    finding = only(files.weights, Setup(weights=str(tmp_path)))
    assert finding.status == "problem"
    assert "model-00002.safetensors is missing" in finding.found
    assert "model-00001.safetensors is damaged" in finding.found or "no safetensors file" in finding.found


def test_weights_that_are_not_here_may_be_an_id_on_the_hub(tmp_path: Path) -> None:
    assert "hub" in only(files.weights, Setup(weights="someone/some-model@v1")).found
    assert only(files.weights, Setup(weights=str(tmp_path / "absent"))).status == "problem"


def test_roots_that_cannot_be_read_or_hold_nothing_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    places = SCENES, tmp_path / "empty", tmp_path / "file", tmp_path / "absent"
    found = list(files.roots(Setup(roots=places)))
    assert [one.status for one in found] == ["ok", "warning", "problem", "problem"]
    assert "holds no image" in found[1].found
    assert "is a file" in found[2].found


def test_a_state_folder_that_others_may_write_or_that_cannot_be_made_is_a_problem(
    setup: Setup, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [one.status for one in files.folders(setup)] == ["ok", "ok"]
    state.chmod(0o777)
    open_to_all = next(iter(files.folders(setup)))
    assert open_to_all.status == "problem"
    assert f"chmod 700 {state}" in open_to_all.mend
    (state / "file").write_text("x")
    monkeypatch.setenv("RS_PERCEPTION_STATE", str(state / "file" / "below"))
    below_a_file, _ = files.folders(setup)
    assert below_a_file.status == "problem"
    assert "is a file" in below_a_file.found


# Model server


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
    local_server._children[-1].wait(60)
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
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    finding = only(server.remote_server, Setup(model_url=url))
    assert finding.status == "problem"
    assert "does not answer" in finding.found


# Network


def test_a_port_that_is_taken_is_named_with_the_command_that_wants_it() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        finding = only(network.ports, Setup(ports=((port, "rs-mcp --http"),)))
    assert finding.status == "warning"
    assert "rs-mcp --http" in finding.found
    assert only(network.ports, Setup(ports=((port, "rs-mcp --http"),))).status == "ok"


def test_a_proxy_that_catches_loopback_is_found_and_its_password_is_not_shown(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTP_PROXY", "http://me:secret@proxy:3128")
    monkeypatch.setenv("http_proxy", "http://me:secret@proxy:3128")
    finding = only(network.proxies, setup)
    assert finding.status == "warning"
    assert "NO_PROXY=localhost,127.0.0.1" in finding.mend
    assert "secret" not in finding.found
    assert only(network.proxies, Setup(model_url="http://127.0.0.1:8765")).status == "problem"
    monkeypatch.setenv("NO_PROXY", "localhost,127.0.0.1")
    monkeypatch.setenv("no_proxy", "localhost,127.0.0.1")
    assert only(network.proxies, setup).status == "ok"


def test_certificates_that_are_not_there_are_found(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert only(network.certificates, setup).status == "ok"
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "company.pem"))
    finding = only(network.certificates, setup)
    assert finding.status == "problem"
    assert "company.pem" in finding.found


# Clients


def configured(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


@pytest.mark.parametrize(
    ("entry", "status", "said"),
    [
        ({"command": sys.executable, "args": ["-m", "mcp_server", "--root", str(SCENES)]}, "ok", sys.executable),
        ({"command": "/gone/bin/rs-mcp", "args": ["--root", str(SCENES)]}, "problem", "not an executable file"),
        ({"command": "rs-mcp-of-nobody", "args": ["--root", str(SCENES)]}, "problem", "not on PATH"),
        ({"command": "~/venv/bin/rs-mcp", "args": ["--root", str(SCENES)]}, "problem", "~"),
        ({"command": "sh", "args": ["rs-mcp", "--root", str(SCENES)]}, "warning", "without its path"),
        ({"command": sys.executable, "args": ["--root=/nowhere"]}, "problem", "/nowhere is no folder"),
        ({"command": sys.executable, "args": []}, "problem", "no --root"),
        ({"args": []}, "problem", "no command"),
        ({"url": "http://127.0.0.1:8000/mcp"}, "ok", "leads to"),
    ],
)
def test_what_a_client_is_told_to_start_must_be_there(
    setup: Setup, entry: dict[str, object], status: str, said: str
) -> None:
    configured(setup.home / ".cursor" / "mcp.json", json.dumps({"mcpServers": {"rs-perception": entry}}))
    finding = only(clients.configurations, setup)
    assert (finding.check, finding.status) == ("client Cursor", status)
    assert said in finding.found


def test_every_client_is_looked_for_where_it_keeps_its_configuration(setup: Setup) -> None:
    bad = {"rs-perception": {"command": "/gone"}}
    servers = json.dumps({"mcpServers": bad})
    configured(setup.home / ".config/Claude/claude_desktop_config.json", servers)
    configured(setup.home / ".claude.json", json.dumps({"projects": {"/p": {"mcpServers": bad}}}))
    configured(setup.folder / ".mcp.json", servers)
    configured(setup.folder / ".vscode/mcp.json", '{\n // ours\n "servers": %s,\n}' % json.dumps(bad))  # noqa: UP031
    found = list(clients.configurations(setup))
    assert sorted(one.check for one in found) == [
        "client Claude Code", "client Claude Code", "client Claude Desktop", "client VS Code",
    ]  # fmt: skip
    assert {one.status for one in found} == {"problem"}


def test_a_configuration_that_is_not_json_is_named_with_the_place_of_the_fault(setup: Setup) -> None:
    configured(setup.folder / ".mcp.json", '{"mcpServers": {\n"rs-mcp": {},\n}}')
    finding = only(clients.configurations, setup)
    assert finding.status == "problem"
    assert "line 3" in finding.found


def test_configurations_of_other_servers_are_no_business_of_ours(setup: Setup) -> None:
    configured(setup.folder / ".mcp.json", '{"mcpServers": {"weather": {"command": "/gone"}}}')
    configured(setup.home / ".cursor" / "mcp.json", "{ not json")
    finding = only(clients.configurations, setup)
    assert finding.status == "ok"
    assert "yet" in finding.found


# Machine


def test_memory_counts_the_limit_of_the_container(setup: Setup, tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       16777216 kB\nMemAvailable:    8388608 kB\n")
    [plenty] = machine.memory(setup, meminfo, tmp_path)
    assert (plenty.status, plenty.found) == ("ok", "8.0 GiB available")
    (tmp_path / "memory.max").write_text(f"{2**30}\n")
    (tmp_path / "memory.current").write_text(f"{2**29}\n")
    [little] = machine.memory(setup, meminfo, tmp_path)
    assert little.status == "warning"
    assert little.found.startswith("0.5 GiB available")


def test_cores_count_the_share_of_the_container(setup: Setup, tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    [finding] = machine.cores(setup, tmp_path)
    assert finding.status == "warning"
    assert "0.5" in finding.found
