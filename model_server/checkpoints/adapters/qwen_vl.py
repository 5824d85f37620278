"""Plain Qwen2.5-VL: the base of FUSAR-GPT without its LoRA and modulation, images at native size."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from model_server.checkpoints.adapters.fusar import base_tensors, read_base_config
from model_server.checkpoints.adapters.fusar import plan as base_plan
from model_server.checkpoints.files import read_json
from model_server.checkpoints.published import LayoutError, Report, empty, fill, tied_head
from model_server.checkpoints.spread import Spread
from model_server.model.qwen_vl import QwenVLM

NAME = "qwen_vl"


def recognises(folder: Path) -> bool:
    path = folder / "config.json"
    return path.is_file() and read_json(path).get("model_type") == "qwen2_5_vl"


def load(folder: Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32,
         overrides: Mapping[str, Any] | None = None,
         spread: Spread | None = None) -> tuple[QwenVLM, Report]:  # fmt: skip
    """Read a checkpoint's folder; `overrides` replace fields of its config.json; `spread`: over devices.

    Raises:
        LayoutError: tensors are missing, unexpected or of another shape.
        WeightsError: a file is missing or unreadable, or asks for what is not computed here.
    """
    config = read_base_config({**read_json(folder / "config.json"), **(overrides or {})}, NAME)
    tensors = base_tensors(folder)
    model = empty(lambda: QwenVLM(config), device, dtype, spread)
    report = fill(model, base_plan(config), tensors, tied_head(config.decoder, tensors))
    if not report.fits:
        raise LayoutError(folder, report)
    model = model.eval().requires_grad_(False)
    return (model if spread is None else spread.dispatch(model)), report
