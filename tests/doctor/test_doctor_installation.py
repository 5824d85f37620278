"""What the doctor finds of an installation: each test spoils one thing and reads how to mend it."""

from __future__ import annotations

from pathlib import Path

import pytest
from examining import module, only

from rs_tools.doctor import Setup, installation
from rs_tools.doctor import findings as findings_module


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
