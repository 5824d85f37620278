"""Saving and loading a checkpoint, and what is said of a broken one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from model_server.calibration import Calibration, Logistic
from model_server.checkpoints.store import WeightsError, load_checkpoint, save_checkpoint


def test_a_saved_checkpoint_loads_as_the_same_model_in_half_precision(debug_weights: Path, tmp_path: Path) -> None:
    first = load_checkpoint(debug_weights)
    calibration = Calibration(yes_no=Logistic(2.0, -0.5), label_temperature=1.7)
    save_checkpoint(tmp_path / "again", first.model, first.tokenizer, first.sentence_tokenizer, calibration)
    again = load_checkpoint(tmp_path / "again")
    assert again.model.config == first.model.config
    assert again.calibration == calibration
    for (name, a), (_, b) in zip(first.model.state_dict().items(), again.model.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert again.digest != first.digest  # the calibration is part of what answers


def test_what_is_missing_is_named(debug_weights: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(debug_weights, folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(WeightsError, match=r"tokenizer\.json is missing"):
        load_checkpoint(folder)


def test_truncated_tensors_are_refused(debug_weights: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(debug_weights, folder)
    body = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(body[: len(body) // 2])
    with pytest.raises(WeightsError, match=r"model\.safetensors"):
        load_checkpoint(folder)


def test_tensors_of_another_config_are_refused_by_name(debug_weights: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(debug_weights, folder)
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"embed_width": 16', '"embed_width": 17'))
    with pytest.raises(WeightsError, match=r"heads\.image"):
        load_checkpoint(folder)


def test_a_config_with_an_unknown_field_is_refused(debug_weights: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(debug_weights, folder)
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"embed_width"', '"embed_wdith"'))
    with pytest.raises(WeightsError, match="embed_wdith"):
        load_checkpoint(folder)
