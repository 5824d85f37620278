"""Plain Qwen2.5-VL: the base of FUSAR-GPT without its LoRA and modulation, images at native size."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from model_server.checkpoints.adapters.fusar import old_name, read_base_config
from model_server.checkpoints.adapters.fusar import plan as base_plan
from model_server.checkpoints.published import LayoutError, Report, empty, fill, open_tensors, read_json
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
    tensors = {old_name(name): read for name, read in open_tensors(folder).items()}
    model = empty(lambda: QwenVLM(config), device, dtype, spread)
    tied = (r"lm_head\.weight",) if config.decoder.tied else ()
    report = fill(model, base_plan(config), tensors, tied)
    if not report.fits:
        raise LayoutError(folder, report)
    model = model.eval().requires_grad_(False)
    return (model if spread is None else spread.dispatch(model)), report
