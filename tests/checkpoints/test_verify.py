"""`verify`: our results against what the authors' own code was recorded to compute."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from model_server.checkpoints.__main__ import app
from model_server.checkpoints.verify import TOLERANCE, Comparison, lines, verify

FIXTURES = Path(__file__).parent / "oracles"


def altered(tmp_path: Path, family: str, edit: Callable[[dict[str, Tensor]], None]) -> Path:
    folder = Path(shutil.copytree(FIXTURES / family, tmp_path / family))
    tensors = load_file(folder / "checkpoint" / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "checkpoint" / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("family", ["rsunivlm", "mfrsvlm"])
def test_recorded_results_come_out_and_every_one_is_compared(family: str) -> None:
    found = verify(FIXTURES / family)
    assert found.family == family
    assert found.comparison.passed, found.comparison.worst
    assert found.comparison.left_out == []
    assert {"features", "embeddings", "layers", "logits", "ids"} <= set(found.comparison.worst)


@pytest.mark.parametrize("case", ["rsunivlm/a", "rsunivlm/c", "mfrsvlm/a"])
def test_the_full_recordings_come_out(oracles: Path, case: str) -> None:
    found = verify(oracles / case)
    assert found.comparison.passed, found.comparison.worst
    assert found.comparison.left_out == []


def test_recorded_strings_and_pictures_come_out_without_a_checkpoint(oracles: Path) -> None:
    found = verify(oracles / "rsunivlm" / "text")
    assert found.comparison.passed, found.comparison.worst
    # 151 strings less 4 of left padding, and 16 pictures.
    assert sum(found.comparison.counts.values()) == 151 - 4 + 16
    assert {name.partition("/")[0] for name in found.comparison.left_out} == {"left_pad_sequences"}
    assert "prompts" in "\n".join(lines(found))


def test_a_recorded_string_that_differs_fails(oracles: Path, tmp_path: Path) -> None:
    cases = json.loads((oracles / "rsunivlm" / "text" / "text_cases.json").read_text())
    cases[0]["output"] = 2  # another expert than the recorded one
    (tmp_path / "text_cases.json").write_text(json.dumps(cases))
    result = CliRunner().invoke(app, ["verify", str(tmp_path)])
    assert result.exit_code == 1
    assert "routes" in result.output


def test_the_command_names_the_cases_and_the_largest_difference_by_kind() -> None:
    result = CliRunner().invoke(app, ["verify", str(FIXTURES / "rsunivlm")])
    assert result.exit_code == 0, result.output
    assert "text/g0, text/g1" in result.output
    for kind in ("features", "embeddings", "layers", "logits", "ids"):
        assert f"  {kind} " in result.output
    assert "passed at a tolerance of 0.0001" in result.output


def test_one_expert_one_percent_off_fails_and_only_its_granularity_differs(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.1.up_proj.weight"
    folder = altered(tmp_path, "rsunivlm", lambda tensors: tensors.update({name: tensors[name] * 1.01}))
    result = CliRunner().invoke(app, ["verify", str(folder)])
    assert result.exit_code == 1
    assert "FAILED at a tolerance" in result.output
    assert "/g1/" in result.output
    assert "features " in result.output  # untouched parts still agree
    found = verify(folder).comparison
    assert found.worst["features"][0] <= TOLERANCE < found.worst["logits"][0]


def test_a_missing_tensor_fails_with_its_name(tmp_path: Path) -> None:
    folder = altered(tmp_path, "mfrsvlm", lambda tensors: tensors.__delitem__("model.deepstack_gate_proj.1.bias"))
    result = CliRunner().invoke(app, ["verify", str(folder)])
    assert result.exit_code == 1
    assert "missing: model.deepstack_gate_proj.1.bias" in result.output


def test_a_folder_that_is_no_checkpoint_fails_in_one_sentence(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["verify", str(tmp_path)])
    assert result.exit_code == 1
    assert "no published checkpoint" in result.output


def test_a_comparison_of_nothing_or_of_nan_has_not_passed() -> None:
    comparison = Comparison()
    assert not comparison.passed
    comparison.tensor("logits", "x", torch.tensor([torch.nan]), torch.tensor([1.0]))
    assert not comparison.passed
    shapes = Comparison()
    shapes.tensor("logits", "x", torch.zeros(2), torch.zeros(3))
    assert not shapes.passed
