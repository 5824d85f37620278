"""What the doctor finds of libraries' data, weights, roots and folders."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from examining import SCENES, only

from rs_tools.doctor import Setup, files


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
