from pathlib import Path

import pytest
from toy import ScriptedModel, write_toy


@pytest.fixture
def toy_data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    write_toy(folder, "train", 4)
    write_toy(folder, "val", 2)
    return folder


@pytest.fixture
def scripted() -> ScriptedModel:
    return ScriptedModel()
