"""What the doctor finds of ports, proxies, certificates, memory and processors."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from examining import only

from rs_tools.doctor import Setup, machine, network


def test_a_port_that_is_taken_is_named_with_the_command_that_wants_it() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        finding = only(network.ports, Setup(ports=((holder.getsockname()[1], "rs-mcp --http"),)))
    assert finding.status == "warning"
    assert "rs-mcp --http" in finding.found
    assert only(network.ports, Setup(ports=((0, "rs-mcp --http"),))).status == "ok"  # 0: whichever is free


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
    # Calls to a model server on this machine go past any proxy: not worse than a warning of other clients' calls.
    assert only(network.proxies, Setup(model_url="http://127.0.0.1:8765")).status == "warning"
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
