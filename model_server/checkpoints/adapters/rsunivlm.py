"""RSUniVLM (arXiv 2412.05679): the published layout `llava_qwen_gmoe`.

A SigLIP tower, a two-layer projector and Qwen2 with three feed-forward copies a layer, `mlp.0` image, `mlp.1` region,
`mlp.2` pixel. What its weights were trained with and is kept: the tower's last layer is dropped and its final norm
skipped; arithmetic on tiles uses the standard tower (384 pixels, 27 tokens a side) whatever tower is loaded.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from model_server.checkpoints.files import Tensors, open_tensors, read_json
from model_server.checkpoints.published import (
    LayoutError,
    Piece,
    Plan,
    Report,
    UnsupportedLayout,
    decoder_config,
    decoder_plan,
    empty,
    fill,
    need,
    projector_plan,
    require,
    tied_head,
    tower_folder,
    vit_config,
    vit_plan,
)
from model_server.checkpoints.spread import Spread
from model_server.model.config import EXPERTS, LlavaConfig, MergeConfig, ViTConfig
from model_server.model.llava import LlavaVLM

NAME = "rsunivlm"
SIGLIP = ViTConfig(layers=27)  # SigLIP-so400m, patch 14, 384 pixels: what the published code assumes by default
TOWER = "model.vision_tower.vision_tower.vision_model."
# The tower's last layer, final norm and pooling head are never run.
UNUSED = (r".*vision_model\.post_layernorm\..*", r".*vision_model\.head\..*")


def recognises(folder: Path) -> bool:
    path = folder / "config.json"
    return path.is_file() and read_json(path).get("model_type") == "llava_qwen_gmoe"


def merge_config(raw: Mapping[str, Any]) -> MergeConfig:
    """How image tokens are merged, from `mm_patch_merge_type`, `image_aspect_ratio` and `image_grid_pinpoints`."""
    kind, aspect = raw.get("mm_patch_merge_type") or "flat", raw.get("image_aspect_ratio") or "square"
    if kind != "flat" and not kind.startswith("spatial"):
        raise UnsupportedLayout(f"config.json has mm_patch_merge_type = {kind!r}; supported are flat and spatial...")
    most = re.match(r"anyres_max_(\d+)", aspect)
    tiled = aspect == "anyres" or "anyres_max" in aspect
    defaults = MergeConfig()
    return MergeConfig(
        spatial=kind != "flat",
        newline="unpad" in kind,
        maxpool="maxpool2x2" in kind,
        overview="nobase" not in kind,
        grids=_grids(raw.get("image_grid_pinpoints"), defaults.tile) if tiled else (),
        max_tiles=int(most[1]) if most else None,
        context=raw.get("tokenizer_model_max_length"),
    )


def _grids(pinpoints: Any, tile: int) -> tuple[tuple[int, int], ...]:
    """Admitted sizes in pixels: a list of pairs, one written out, or "(1x1),...,(6x6)" in tiles."""
    if isinstance(pinpoints, str) and "x" in pinpoints:
        pairs = [(int(a), int(b)) for a, b in re.findall(r"\((\d+)x(\d+)\)", pinpoints)]
        if not pairs:
            raise UnsupportedLayout(f"config.json has image_grid_pinpoints = {pinpoints!r}, not like (1x1),...,(6x6)")
        (a0, b0), (a1, b1) = pairs[0], pairs[-1]
        return tuple((a * tile, b * tile) for a in range(a0, a1 + 1) for b in range(b0, b1 + 1))
    try:
        if isinstance(pinpoints, str):
            pinpoints = ast.literal_eval(pinpoints)
        return tuple((int(w), int(h)) for w, h in pinpoints or ())
    except (TypeError, ValueError, SyntaxError) as error:
        raise UnsupportedLayout(f"config.json has image_grid_pinpoints = {pinpoints!r}, no list of sizes") from error


def read_config(folder: Path, raw: Mapping[str, Any]) -> LlavaConfig:
    """Our config of a checkpoint whose config.json holds `raw`.

    Raises:
        UnsupportedLayout: it asks for what is not computed here.
    """
    require(raw, "mm_projector_type", ["mlp2x_gelu"])
    require(raw, "mm_resampler_type", [None])
    base = tower_folder(folder, need(raw, "mm_vision_tower"))
    described = {} if base is None else read_json(base / "config.json")
    require(described, "model_type", ["siglip", "siglip_vision_model"])
    vision = vit_config(described, SIGLIP)
    layers = vision.layers - 1
    return LlavaConfig(
        name=NAME,
        vision=ViTConfig(**{**vars(vision), "layers": layers}),
        # The published class sets rope_scaling aside, whatever it says.
        decoder=decoder_config({**raw, "rope_scaling": None}, experts=EXPERTS, qkv_bias=True),
        merge=merge_config(raw),
        feature=layers,
    )


def load(folder: Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32,
         overrides: Mapping[str, Any] | None = None,
         spread: Spread | None = None) -> tuple[LlavaVLM, Report]:  # fmt: skip
    """Read a checkpoint's folder; `overrides` replace fields of its config.json; `spread`: over devices.

    Raises:
        LayoutError: tensors are missing, unexpected or of another shape.
        WeightsError: a file is missing or unreadable, or asks for what is not computed here.
    """
    config = read_config(folder, {**read_json(folder / "config.json"), **(overrides or {})})
    model = empty(lambda: LlavaVLM(config), device, dtype, spread)
    tensors = _tensors(folder, config)
    report = fill(model, plan(config), tensors, _unused(config, tensors))
    if not report.fits:
        raise LayoutError(folder, report)
    model = model.eval().requires_grad_(False)
    return (model if spread is None else spread.dispatch(model)), report


def plan(config: LlavaConfig) -> Plan:
    """Published names and where they go."""
    found = {
        **decoder_plan(config.decoder),
        **projector_plan(config.vision.width, config.decoder.width, "model.mm_projector."),
        **vit_plan(config.vision, TOWER),
    }
    if config.merge.newline:
        found["model.image_newline"] = [Piece("newline", (config.decoder.width,))]
    return found


def _tensors(folder: Path, config: LlavaConfig) -> Tensors:
    """The checkpoint's tensors; the tower's come from the base tower where the checkpoint has none of its own."""
    own = open_tensors(folder)
    if any(name.startswith(TOWER) for name in own):
        return own
    base = tower_folder(folder, read_json(folder / "config.json")["mm_vision_tower"])
    if base is None:
        return own  # the report says what is missing
    cut = f"vision_model.encoder.layers.{config.vision.layers}."
    tower = {n: t for n, t in open_tensors(base).items() if n.startswith("vision_model.") and not n.startswith(cut)}
    return {**own, **{TOWER.removesuffix("vision_model.") + name: tensor for name, tensor in tower.items()}}


def _unused(config: LlavaConfig, tensors: Tensors) -> tuple[str, ...]:
    newline = () if config.merge.newline else (r"model\.image_newline",)
    return (*UNUSED, *tied_head(config.decoder, tensors), *newline)
