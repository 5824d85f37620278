"""What the tests of real processes share: one model server, with the embedded weights."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def own_state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A state folder of these tests' own, so that they neither find nor leave a model server of the user."""
    folder = tmp_path_factory.mktemp("state")
    yield folder
    for file in folder.glob("server-*.json"):
        os.kill(json.loads(file.read_text())["pid"], 15)
