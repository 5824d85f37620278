"""Stages make their tensors on the chosen device; what is not spread over processes refuses a launcher."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from model_server.training import place
from model_server.training.place import Device, chosen, half, here, on, tensor

STAGES = ("vision", "language", "polish", "answers", "region", "mechanisms", "dense")


def test_auto_is_the_cpu_where_torch_sees_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert chosen(Device.AUTO) == torch.device("cpu")
    with pytest.raises(ValueError, match="sees no GPU: let --device be auto or cpu"):
        chosen(Device.CUDA)


def test_each_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert chosen(Device.AUTO) == torch.device("cuda", 0)
    assert chosen(Device.CPU) == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert chosen(Device.AUTO) == torch.device("cuda", 1)


def test_new_tensors_arrays_and_autocast_follow_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place, "chosen", lambda _: torch.device("meta"))  # a second device that every torch has
    with on(Device.AUTO):
        assert here().type == torch.nn.Linear(2, 2).weight.device.type == tensor(np.zeros(2)).device.type == "meta"
    assert here().type == tensor(np.zeros(2)).device.type == "cpu"
    assert half(True).device == "cpu"
    assert half(True).fast_dtype is torch.bfloat16


@pytest.mark.parametrize("stage", STAGES)
def test_no_stage_names_a_device_or_leaves_it_to_a_file_or_an_array(stage: str) -> None:
    """Everything else is made by torch's own factories, which follow the device."""
    tree = ast.parse((Path(place.__file__).parent / f"{stage}.py").read_text())
    called = {ast.unparse(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert not called.keys() & {"torch.from_numpy", "torch.autocast", "torch.as_strided"}
    for node in ast.walk(tree):
        assert not (isinstance(node, ast.Constant) and node.value in ("cpu", "cuda")), f"line {node.lineno}"
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            assert "map_location" in {keyword.arg for keyword in node.keywords}, f"line {node.lineno}"
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.Generator":
            assert node.args, f"line {node.lineno}"


@pytest.mark.parametrize("command", ["region", "mechanisms"])
def test_a_command_of_one_process_refuses_a_launcher_before_it_reads_anything(command: str, tmp_path: Path) -> None:
    module, out = f"model_server.training.{command}", ["--out", str(tmp_path)] if command == "mechanisms" else []
    done = subprocess.run(
        [sys.executable, "-m", module, str(tmp_path), "--run", str(tmp_path), *out],
        env={**os.environ, "WORLD_SIZE": "2", "RANK": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith(f"{module} trains in one process, and a launcher started 2")
    assert not list(tmp_path.iterdir())
