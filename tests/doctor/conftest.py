"""A state folder and a set-up of each test's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from rs_tools.doctor import Setup


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "state"
    folder.mkdir(mode=0o700)
    monkeypatch.setenv("RS_PERCEPTION_STATE", str(folder))
    return folder


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    return Setup(home=tmp_path / "home", folder=tmp_path / "project", ports=())
