"""MF-RSVLM, also FUSE-RSVLM: the published layout `vhm`.

A CLIP tower in a folder of its own, a two-layer projector and Llama with recurrent injection (`deepstack_*`). What its
weights were trained with and is kept: windows cut plane by plane, Hann weights that are 0 at the edge of a window,
visual tokens before everything (the start token included), injection at prefill only. What is mended: detail stacks
belong to their prompt and cannot outlive it, and padding stays invisible in cached decoding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    feature_layer,
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
from model_server.checkpoints.store import WeightsError
from model_server.model.config import DetailConfig, LlavaConfig, MergeConfig, ViTConfig
from model_server.model.llava import LlavaVLM
from model_server.model.windows import WindowsDoNotFit
from model_server.model.windows import plan as window_plan

NAME = "mfrsvlm"
CLIP = ViTConfig(
    style="clip", width=768, layers=12, heads=12, ffn=3072, image_size=224, patch=32, act="quick_gelu", norm_eps=1e-5
)  # CLIPVisionConfig's defaults
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
TOWER = "vision_model."
PUBLISHED_BASE = 10000.0
# Rotary rates are computed; copies of the tower in step checkpoints are ignored by the authors' loader too.
UNUSED = (
    r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
    r"model\.vision_tower\..*",
    r"vision_model\.post_layernorm\..*",
    r"vision_model\.embeddings\.position_ids",
    r"(text_model\.|visual_projection|text_projection|logit_scale).*",
)


def recognises(folder: Path) -> bool:
    path = folder / "config.json"
    return path.is_file() and read_json(path).get("model_type") == "vhm"


def inject_layers(listed: Sequence[int], layers: int) -> tuple[int, ...]:
    """Decoder layers, 0-based. The published list counts from 1, unless it holds a 0; what is out of range drops."""
    first = 0 if 0 in listed else 1
    return tuple(sorted({int(n) - first for n in listed if 0 <= n - first < layers}))


def taps(listed: Sequence[float], layers: int) -> tuple[int, ...]:
    """Tapped hidden states: a float in (0, 1] is a share of the depth, an int an index; -n is layers - n."""
    found = set()
    for value in listed:
        share = isinstance(value, float) and 0 < value <= 1
        index = round(value * layers) if share else int(value)
        found.add(max(1, min(layers, index + layers if index < 0 else index)))
    return tuple(sorted(found))


def scales(listed: Sequence[float]) -> tuple[float, ...]:
    """Window scales in the order given, at most 1; the full scale comes first if it is not in the list."""
    found = list(dict.fromkeys(min(float(s), 1.0) for s in listed if s > 0))
    return tuple(found if any(abs(s - 1) < 1e-6 for s in found) else [1.0, *found])


def _listed(raw: Mapping[str, Any], key: str, default: Sequence[float]) -> Sequence[float]:
    """A list of the config; without one the published default, which None stands for too.

    Raises:
        UnsupportedLayout: it is empty: the published code then has nothing to inject.
    """
    found = default if raw.get(key) is None else raw[key]
    if not found:
        raise UnsupportedLayout(f"config.json has {key} = {found!r}; give at least one, or leave it out")
    return found


def detail_config(raw: Mapping[str, Any], tower: Path, vision: ViTConfig) -> DetailConfig:
    mean = None
    if raw.get("image_aspect_ratio") == "pad":
        path = tower / "preprocessor_config.json"
        mean = tuple(read_json(path).get("image_mean", CLIP_MEAN)) if path.is_file() else CLIP_MEAN
    return DetailConfig(
        scales=scales(_listed(raw, "deepstack_window_scales", (1.0, 0.5))),
        taps=taps(_listed(raw, "deepstack_detail_layers", (0.33, 0.66, 1.0)), vision.layers),
        factor=max(1, int(raw.get("deepstack_downsample_factor", 2))),
        pad_mean=mean,
        plane_windows=True,
        zero_edges=True,
    )


def read_config(raw: Mapping[str, Any], tensors: Tensors, tower: Path) -> LlavaConfig:
    """Our config of a checkpoint whose config.json holds `raw`, with the tower in a folder.

    Raises:
        UnsupportedLayout: it asks for what is not computed here.
    """
    require(raw, "mm_projector_type", ["mlp2x_gelu"])
    require(raw, "mm_vision_select_feature", ["patch"])
    described = read_json(tower / "config.json")
    require(described, "model_type", ["clip_vision_model", "clip"])
    vision = vit_config(described, CLIP)
    decoder = decoder_config(raw)
    if decoder.rope_base != (base := _rope_base(tensors, decoder.rope_base)):
        decoder = decoder_config({**raw, "rope_theta": base})
    details = detail_config(raw, tower, vision)
    if vision.image_size != details.window:
        raise UnsupportedLayout(f"its tower takes {vision.image_size} pixels; the detail view needs {details.window}")
    try:
        window_plan(details, vision)
    except WindowsDoNotFit as error:
        raise UnsupportedLayout(f"config.json's deepstack settings do not fit its tower: {error}") from error
    listed = raw.get("deepstack_injection_layers", (2, 4, 6, 8))
    if not isinstance(listed, list | tuple):
        raise UnsupportedLayout(f"config.json has deepstack_injection_layers = {listed!r}; it must be a list")
    return LlavaConfig(
        name=NAME,
        vision=vision,
        decoder=decoder,
        merge=MergeConfig(visual_first=True),
        feature=feature_layer(need(raw, "mm_vision_select_layer"), vision.layers),
        details=details,
        inject_layers=inject_layers(listed, decoder.layers),
    )


def tower_of(folder: Path, raw: Mapping[str, Any]) -> Path:
    """The folder of the tower that a checkpoint's config.json names.

    Raises:
        WeightsError: it is not there.
    """
    name = need(raw, "mm_vision_tower")
    tower = tower_folder(folder, name)
    if tower is None:
        raise WeightsError(
            f"{folder} keeps no vision tower of its own, it names {name!r}; "
            f"put that CLIP checkpoint into {folder / name} or name its folder in config.json"
        )
    return tower


def _rope_base(tensors: Tensors, configured: float) -> float:
    """The base of the saved rotary rates where they are saved: the class that wrote them knew no `rope_theta`, its base
    was 10000. Rates saved in half precision say which of the two it is, no more.

    Raises:
        UnsupportedLayout: they are of neither, or of no one base.
    """
    read = tensors.get("model.layers.0.self_attn.rotary_emb.inv_freq")
    if read is None:
        return configured
    saved = read()
    count, step = len(saved), 4 * torch.finfo(saved.dtype).eps
    rates = saved.double()
    guess = [float(torch.round(rates[-1] ** (-count / (count - 1))))] if count > 1 and saved.dtype.itemsize > 2 else []
    for base in (configured, PUBLISHED_BASE, *guess):
        exact = base ** -(torch.arange(count, dtype=torch.float64) / count)
        if bool(((rates / exact - 1).abs() <= step).all()):
            return base
    tried = f"{configured:g}, nor of {PUBLISHED_BASE:g}"
    raise UnsupportedLayout(f"the saved rotary rates (inv_freq) are not those of a base of {tried}")


def load(folder: Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32,
         overrides: Mapping[str, Any] | None = None, tower: Path | None = None,
         spread: Spread | None = None) -> tuple[LlavaVLM, Report]:  # fmt: skip
    """Read a checkpoint's folder and its tower's (`tower`, if it is elsewhere than the config says); `overrides`
    replace fields of its config.json; `spread`: over devices.

    Raises:
        LayoutError: tensors are missing, unexpected or of another shape.
        WeightsError: a file is missing or unreadable, or asks for what is not computed here.
    """
    raw = {**read_json(folder / "config.json"), **(overrides or {})}
    tensors = open_tensors(folder)
    tower = tower or tower_of(folder, raw)
    config = read_config(raw, tensors, tower)
    model = empty(lambda: LlavaVLM(config), device, dtype, spread)
    unused = (*UNUSED, *tied_head(config.decoder, tensors))
    report = fill(model, plan(config), {**tensors, **open_tensors(tower)}, unused)
    if not report.fits:
        raise LayoutError(folder, report)
    model = model.eval().requires_grad_(False)
    return (model if spread is None else spread.dispatch(model)), report


def plan(config: LlavaConfig) -> Plan:
    """Published names and where they go."""
    w = config.decoder.width
    found = {
        **decoder_plan(config.decoder),
        **projector_plan(config.vision.width, w, "model.mm_projector."),
        **vit_plan(config.vision, TOWER),
    }
    if not config.inject_layers:
        return found
    count = len(config.inject_layers)
    ours = [f"decoder.inject.{layer}." for layer in config.inject_layers]
    found["model.deepstack_residual_scale"] = [Piece(f"{o}scale", (count,), item=i) for i, o in enumerate(ours)]
    layers = {
        "hidden_norms.{}": ("hidden_norm", None),
        "detail_norms.{}": ("detail_norm", None),
        "detail_proj.{}": ("project", w),
        "gate_proj.{}": ("gate", 2 * w),
        "router_query.{}.0": ("router.query_norm", None),
        "router_query.{}.1": ("router.query", w),
        "router_key.{}.0": ("router.key_norm", None),
        "router_key.{}.1": ("router.key", w),
    }
    for rank, prefix in enumerate(ours):
        for theirs, (name, into) in layers.items():
            published = f"model.deepstack_{theirs.format(rank)}."
            found[published + "weight"] = [Piece(f"{prefix}{name}.weight", (w,) if into is None else (w, into))]
            found[published + "bias"] = [Piece(f"{prefix}{name}.bias", (w,))]
    return found
