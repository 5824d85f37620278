"""What all tests share: a tiny real checkpoint, and where the labelled data lie."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def debug_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the debug config with random weights."""
    from model_server.checkpoints.debug import write_debug_checkpoint

    folder = tmp_path_factory.mktemp("weights") / "debug"
    write_debug_checkpoint(folder)
    return folder


@pytest.fixture(scope="session")
def dense_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a branch for boxes, masks and change, random too."""
    from model_server.checkpoints.debug import write_debug_checkpoint

    folder = tmp_path_factory.mktemp("weights") / "dense"
    write_debug_checkpoint(folder, dense=True)
    return folder


@pytest.fixture(scope="session")
def labelled_data() -> Path:
    """The directory of labelled sets (RS_DATA, or ../shared/data); the test is skipped where there is none."""
    folder = Path(os.environ.get("RS_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "ucm" / "records.jsonl").is_file():
        pytest.skip(f"no labelled data in {folder}; set RS_DATA to a directory of record sets")
    return folder


@pytest.fixture(scope="session")
def oracles() -> Path:
    """Recorded results of published code (RS_ORACLES, or ../shared/reference/oracles); skipped where there are none."""
    folder = Path(os.environ.get("RS_ORACLES", ROOT.parent / "shared" / "reference" / "oracles"))
    if not (folder / "README.md").is_file():
        pytest.skip(f"no recorded results in {folder}; set RS_ORACLES to their directory")
    return folder
