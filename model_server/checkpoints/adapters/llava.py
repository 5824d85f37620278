"""Plain LLaVA: a CLIP tower, a two-layer projector and Llama, in two published layouts.

The original one (`llava-v1.5`: `mm_vision_tower` names the tower, which lies beside the tensors or elsewhere) and that
of `transformers` (`llava-hf`: one file set, `vision_config` and `text_config`). Images are one square each.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from model_server.checkpoints.adapters.mfrsvlm import CLIP, UNUSED
from model_server.checkpoints.adapters.mfrsvlm import plan as clip_llama_plan
from model_server.checkpoints.adapters.mfrsvlm import tower_of as tower_of
from model_server.checkpoints.files import Tensors, open_tensors, read_json
from model_server.checkpoints.published import (
    LayoutError,
    Report,
    decoder_config,
    empty,
    feature_layer,
    fill,
    need,
    require,
    tied_head,
    vit_config,
)
from model_server.checkpoints.spread import Spread
from model_server.model.config import LlavaConfig
from model_server.model.llava import LlavaVLM

NAME = "llava"
LLAMA = {"vocab_size": 32000, "intermediate_size": 11008}  # LlamaConfig's defaults, which `text_config` leaves out
_OWN_TOWER = "model.vision_tower.vision_tower."
# From the names of `transformers`, older and newer, to those of the original layout.
_RENAMED = (
    (r"(?:model\.)?vision_tower\.(?:vision_model\.)?", "vision_model."),
    (r"(?:model\.)?multi_modal_projector\.linear_1\.", "model.mm_projector.0."),
    (r"(?:model\.)?multi_modal_projector\.linear_2\.", "model.mm_projector.2."),
    (r"language_model\.(?=lm_head\.)", ""),
    (r"language_model\.model\.", "model."),
    (r"model\.language_model\.", "model."),
)


def recognises(folder: Path) -> bool:
    path = folder / "config.json"
    return path.is_file() and read_json(path).get("model_type") in ("llava", "llava_llama")


def is_original(raw: Mapping[str, Any]) -> bool:
    """Whether a config.json is of the original layout, with a tower of its own."""
    return "mm_vision_tower" in raw


def read_config(raw: Mapping[str, Any], tower: Mapping[str, Any]) -> LlavaConfig:
    """Our config of a config.json; tower: that of the vision tower, or `raw` again where it holds it.

    Raises:
        UnsupportedLayout: it asks for what is not computed here.
    """
    text = {**LLAMA, **raw.get("text_config", raw)}
    require(text, "model_type", ["llama", "llava", "llava_llama"])
    if is_original(raw):
        require(raw, "mm_projector_type", ["mlp2x_gelu"])
        require(raw, "mm_vision_select_feature", ["patch"])
        require(raw, "mm_patch_merge_type", ["flat"])
        feature = need(raw, "mm_vision_select_layer")
    else:
        require(raw, "projector_hidden_act", ["gelu"])
        require(raw, "vision_feature_select_strategy", ["default"])
        require(raw, "multimodal_projector_bias", [True])
        feature = raw.get("vision_feature_layer", -2)
    require(tower.get("vision_config", tower), "model_type", ["clip_vision_model", "clip"])
    vision = vit_config(tower, CLIP)
    feature = feature_layer(feature, vision.layers)
    return LlavaConfig(name=NAME, vision=vision, decoder=decoder_config(text), feature=feature)


def load(folder: Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32,
         overrides: Mapping[str, Any] | None = None, tower: Path | None = None,
         spread: Spread | None = None) -> tuple[LlavaVLM, Report]:  # fmt: skip
    """Read a checkpoint's folder and, in the original layout, its tower's (`tower`, if it is elsewhere than the config
    says); `overrides` replace fields of its config.json; `spread`: over devices.

    Raises:
        LayoutError: tensors are missing, unexpected or of another shape.
        WeightsError: a file is missing or unreadable, or asks for what is not computed here.
    """
    raw = {**read_json(folder / "config.json"), **(overrides or {})}
    tensors, described = open_tensors(folder), raw
    if is_original(raw):
        tower = tower or tower_of(folder, raw)
        described = read_json(tower / "config.json")
        tensors = {**tensors, **open_tensors(tower), **_tuned_tower(raw, tensors)}
    else:
        tensors = {_original_name(name): read for name, read in tensors.items()}
    config = read_config(raw, described)
    model = empty(lambda: LlavaVLM(config), device, dtype, spread)
    unused = (*UNUSED, *tied_head(config.decoder, tensors))
    report = fill(model, clip_llama_plan(config), tensors, unused)
    if not report.fits:
        raise LayoutError(folder, report)
    model = model.eval().requires_grad_(False)
    return (model if spread is None else spread.dispatch(model)), report


def _tuned_tower(raw: Mapping[str, Any], tensors: Tensors) -> Tensors:
    """The checkpoint's own copy of the tower, which the original code reads where the tower was trained too; elsewhere
    it takes the named tower's and leaves a copy alone."""
    trained = raw.get("unfreeze_mm_vision_tower") or "mm_vision_tower" in (raw.get("mm_tunable_parts") or "")
    if not trained:
        return {}
    return {name.removeprefix(_OWN_TOWER): read for name, read in tensors.items() if name.startswith(_OWN_TOWER)}


def _original_name(name: str) -> str:
    for pattern, ours in _RENAMED:
        changed, count = re.subn(f"^{pattern}", ours, name)
        if count:
            return changed
    return name
