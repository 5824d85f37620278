"""`rs-tools doctor` as a whole, on real breakage."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from examining import SCENES, module

from rs_tools import doctor
from rs_tools.doctor import Finding


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
