"""FUSAR-GPT: a Qwen2.5-VL base and a folder with its LoRA, its modulation `vec64_film.pt` and `tlm_config.json`.

The LoRA is merged into the base. What its weights were trained with and is kept: anchor weights normalised twice,
positions between the centres of the outermost patches, and the square resampling that fits square images only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model_server.checkpoints.files import Tensors, held, open_tensors, read_json, unpickled
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
    require,
    rope_config,
    tied_head,
)
from model_server.checkpoints.spread import Spread
from model_server.checkpoints.store import WeightsError
from model_server.model.config import ModulationConfig, QwenVisionConfig, QwenVLConfig
from model_server.model.qwen_vl import QwenVLM

NAME = "fusar"
FORMAT = "tlm_original_train_patch_resize_v1"
FILM, TLM, LORA = "vec64_film.pt", "tlm_config.json", "adapter_config.json"
# Qwen2.5-VL's, where a config.json leaves them out.
ROPE_BASE = 1e6
QWEN = {
    "vocab_size": 152064, "hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
}  # fmt: skip
# Those that leave the base's own weights as they are; others (PiSSA, OLoRA, LoftQ) change them too.
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
NOT_PLAIN = (
    "use_dora", "use_rslora", "use_qalora", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "modules_to_save",
    "layer_replication", "lora_bias", "target_parameters", "trainable_token_indices", "alora_invocation_tokens",
)  # fmt: skip
# Kept in old checkpoints for a fallback that the authors' code no longer has.
UNUSED = (r"score\b.*",)


def recognises(folder: Path) -> bool:
    return (adapter_folder(folder) / FILM).is_file() and (adapter_folder(folder) / LORA).is_file()


def adapter_folder(folder: Path) -> Path:
    """The folder with the modulation: `folder`, or `adapter/` in it."""
    return folder / "adapter" if (folder / "adapter").is_dir() else folder


def base_folder(folder: Path) -> Path:
    """The base's folder: `base/` in or beside the given one, or where the adapter says it was.

    Raises:
        WeightsError: there is none.
    """
    adapter = adapter_folder(folder)
    named = str(read_json(adapter / LORA).get("base_model_name_or_path") or "")
    for candidate in (folder / "base", adapter.parent / "base", *([Path(named)] if named else [])):
        if (candidate / "config.json").is_file():
            return candidate
    raise WeightsError(f"{folder} is an adapter and needs its base model {named}: put its files into {folder / 'base'}")


def read_config(base: Mapping[str, Any], tlm: Mapping[str, Any]) -> QwenVLConfig:
    """Our config of a base's config.json, nested as new ones are or flat, and a tlm_config.json.

    Raises:
        UnsupportedLayout: one of them asks for what is not computed here.
    """
    require(tlm, "format", [FORMAT], TLM)
    require(tlm, "vec_dim", [64], TLM)
    config = read_base_config(base, NAME)
    vision = config.vision
    modulation = ModulationConfig(
        sigma=float(need(tlm, "sigma", TLM)),
        hidden_mult=int(tlm.get("hidden_mult", 4)),
        merge=vision.merge,
        normalise="twice",
        span="centres",
        resize="square",
    )
    size = int(tlm.get("image_size", 504))
    if size <= 0 or size % (vision.patch * vision.merge):
        raise UnsupportedLayout(f"image_size must be a multiple of {vision.patch * vision.merge}; it is {size}")
    return replace(config, image_size=size, modulation=modulation)


def read_base_config(base: Mapping[str, Any], name: str) -> QwenVLConfig:
    """Our config of a base's config.json alone, without modulation.

    Raises:
        UnsupportedLayout: it asks for what is not computed here.
    """
    require(base, "model_type", ["qwen2_5_vl"])
    text = {**QWEN, **base, **base.get("text_config", {})}
    text["tie_word_embeddings"] = base.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
    rope = rope_config(text, ("default", "mrope"))
    rope["rope_theta"] = rope["rope_theta"] or ROPE_BASE
    sections = tuple(need(rope, "mrope_section"))
    decoder = decoder_config(text, rope, qkv_bias=True, rope_sections=sections)
    if len(sections) != 3 or 2 * sum(sections) != decoder.width // decoder.heads:
        raise UnsupportedLayout(
            f"config.json has mrope_section = {list(sections)}; it must be three numbers that add up to "
            f"{decoder.width // decoder.heads // 2}, half of a head"
        )
    vision = vision_config(base.get("vision_config", {}), decoder.width)
    return QwenVLConfig(name=name, vision=vision, decoder=decoder, image_token=need(base, "image_token_id"))


def vision_config(raw: Mapping[str, Any], width: int) -> QwenVisionConfig:
    """The tower's part of a Qwen2.5-VL config.json; `width` is that of the decoder."""
    require(raw, "hidden_act", ["silu", "swish"])
    require(raw, "out_hidden_size", [width])
    require(raw.get("rope_parameters") or {}, "rope_theta", [10000, None])
    heads = raw.get("num_heads", QwenVisionConfig().heads)
    if raw.get("hidden_size", QwenVisionConfig().width) % (4 * heads):
        raise UnsupportedLayout(f"the tower's {heads} heads must divide its hidden_size into multiples of four")
    for key in ("in_channels", "in_chans"):
        require(raw, key, [3])
    d = QwenVisionConfig()
    return QwenVisionConfig(
        width=raw.get("hidden_size", d.width),
        layers=raw.get("depth", d.layers),
        heads=raw.get("num_heads", d.heads),
        ffn=raw.get("intermediate_size", d.ffn),
        patch=raw.get("patch_size", d.patch),
        frames=raw.get("temporal_patch_size", d.frames),
        merge=raw.get("spatial_merge_size", d.merge),
        window=raw.get("window_size", d.window),
        full_layers=tuple(raw.get("fullatt_block_indexes", d.full_layers)),
    )


def load(folder: Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32,
         overrides: Mapping[str, Any] | None = None, base: Path | None = None,
         spread: Spread | None = None) -> tuple[QwenVLM, Report]:  # fmt: skip
    """Read an adapter's folder with its base.

    Args:
        folder: the adapter's, or one that holds `adapter/` and `base/`.
        device, dtype: where and how the tensors are kept. The modulation stays in float32, as published.
        overrides: replace fields of tlm_config.json; `sigma` must be given for old checkpoints without that file.
        base: the base's folder, if it is elsewhere.
        spread: over devices instead of on `device`.

    Raises:
        LayoutError: tensors are missing, unexpected or of another shape.
        WeightsError: a file is missing or unreadable, or asks for what is not computed here.
    """
    adapter, base = adapter_folder(folder), base or base_folder(folder)
    tlm = read_json(adapter / TLM) if (adapter / TLM).is_file() else {}
    tlm = {**tlm, **(overrides or {})}
    if "sigma" not in tlm:
        raise UnsupportedLayout(f"{adapter} has no {TLM}; give the sigma it was trained with (the authors' was 2)")
    config = read_config(read_json(base / "config.json"), tlm)
    tensors, stray = _merged(base, adapter)
    model = empty(lambda: QwenVLM(config), device, dtype, spread)
    if model.modulation is not None:
        model.modulation.float()
    unused = (*UNUSED, *tied_head(config.decoder, tensors))
    report = fill(model, plan(config), {**tensors, **_film(adapter / FILM)}, unused)
    report.unexpected.extend(stray)
    if not report.fits:
        raise LayoutError(folder, report)
    model = model.eval().requires_grad_(False)
    return (model if spread is None else spread.dispatch(model)), report


def plan(config: QwenVLConfig) -> Plan:
    """Published names, in the base's old form (`visual.`, `model.layers.`), and where they go."""
    v, w = config.vision, config.decoder.width
    merged = v.width * v.merge**2
    found = decoder_plan(config.decoder)
    found["visual.patch_embed.proj.weight"] = [
        Piece("tower.patches.weight", (v.width, 3, v.frames, v.patch, v.patch)),
    ]
    found["visual.merger.ln_q.weight"] = [Piece("tower.norm.weight", (v.width,))]
    found |= _linear("visual.merger.mlp.0", "tower.merger.0", merged, merged)
    found |= _linear("visual.merger.mlp.2", "tower.merger.2", w, merged)
    parts = (
        ("attn.qkv", "qkv", 3 * v.width, v.width),
        ("attn.proj", "out", v.width, v.width),
        ("mlp.gate_proj", "gate", v.ffn, v.width),
        ("mlp.up_proj", "up", v.ffn, v.width),
        ("mlp.down_proj", "down", v.width, v.ffn),
    )
    for n in range(v.layers):
        theirs, ours = f"visual.blocks.{n}.", f"tower.blocks.{n}."
        for name, own, out, into in parts:
            found |= _linear(theirs + name, ours + own, out, into)
        for norm in ("norm1", "norm2"):
            found[f"{theirs}{norm}.weight"] = [Piece(f"{ours}{norm}.weight", (v.width,))]
    if config.modulation is not None:
        hidden = max(128, config.modulation.hidden_mult * w)
        found |= _linear("film_mlp.0", "modulation.film.0", hidden, config.modulation.vector_width)
        found |= _linear("film_mlp.2", "modulation.film.2", 2 * w, hidden)
    return found


def _linear(theirs: str, ours: str, out: int, into: int) -> Plan:
    shapes = {"weight": (out, into), "bias": (out,)}
    return {f"{theirs}.{kind}": [Piece(f"{ours}.{kind}", shape)] for kind, shape in shapes.items()}


def old_name(name: str) -> str:
    """`model.language_model.layers.0...` -> `model.layers.0...`, `model.visual...` -> `visual...`."""
    return re.sub(r"^model\.(?:language_model\.|(?=visual\.))", lambda m: "model." if m.end() > 6 else "", name)


@dataclass(frozen=True)
class LowRank:
    """What a LoRA adds to a matrix: scale B A; `down` reads A [r, in], `up` reads B [out, r], both in float32."""

    name: str  # of the matrix
    rank: int
    scale: float
    down: Callable[[], Tensor]
    up: Callable[[], Tensor]

    def added(self, weight: Tensor) -> Tensor:
        """weight + scale B A, in float32.

        Raises:
            WeightsError: the shapes do not fit, or the rank is not the config's.
        """
        down, up = self.down(), self.up()
        if (down.shape[0], up.shape[1]) != (self.rank, self.rank):
            raise WeightsError(
                f"the LoRA of {self.name} is {list(up.shape)} by {list(down.shape)}; {LORA} says r = {self.rank}"
            )
        if weight.shape != (up.shape[0], down.shape[1]):
            found = f"{list(up.shape)} by {list(down.shape)}"
            raise WeightsError(f"{self.name} is {list(weight.shape)}; its LoRA is {found}")
        return weight.float() + self.scale * (up @ down)


def base_tensors(base: Path) -> Tensors:
    """The base's tensors by their old names."""
    return {old_name(name): read for name, read in open_tensors(base).items()}


def low_ranks(adapter: Path, base: Collection[str]) -> tuple[dict[str, LowRank], list[str]]:
    """An adapter's LoRA by the names of the base's tensors, and its own names that belong to none of them.

    Raises:
        UnsupportedLayout: it is no plain LoRA, W + alpha / r B A.
    """
    raw = read_json(adapter / LORA)
    require(raw, "peft_type", ["LORA"], LORA)
    require(raw, "bias", ["none"], LORA)
    require(raw, "init_lora_weights", PLAIN_STARTS, LORA)
    for switch in NOT_PLAIN:
        require(raw, switch, [False, None, {}, []], LORA)
    rank, alpha = need(raw, "r", LORA), need(raw, "lora_alpha", LORA)
    if not isinstance(rank, int) or rank < 1:
        raise UnsupportedLayout(f"{LORA} has r = {rank!r}; it must be a positive integer")
    lora = open_tensors(adapter)
    found, stray = {}, []
    for name in sorted(lora):
        parts = re.fullmatch(r"base_model\.model\.(.+)\.lora_A\.weight", name)
        partner = name.replace(".lora_A.", ".lora_B.")
        target = f"{old_name(parts[1])}.weight" if parts else ""
        if parts and partner in lora and target in base:
            found[target] = LowRank(target, rank, alpha / rank, _single(lora[name]), _single(lora[partner]))
        elif parts or name.replace(".lora_B.", ".lora_A.") not in lora or ".lora_B." not in name:
            stray.append(name)
    return found, stray


def _merged(base: Path, adapter: Path) -> tuple[Tensors, list[str]]:
    """The base's tensors with the LoRA in them, and the adapter's names that belong to none of them."""
    tensors = base_tensors(base)
    added, stray = low_ranks(adapter, tensors.keys())
    return {name: _with(read, added.get(name)) for name, read in tensors.items()}, stray


def _with(read: Callable[[], Tensor], added: LowRank | None) -> Callable[[], Tensor]:
    return read if added is None else lambda: added.added(read())


def _single(read: Callable[[], Tensor]) -> Callable[[], Tensor]:
    return lambda: read().float()


def _film(path: Path) -> Tensors:
    """The modulation's tensors, `film_mlp.0.weight` and so on."""
    saved = unpickled(path)
    if not isinstance(saved, dict) or not isinstance(saved.get("film_mlp"), dict):
        raise WeightsError(f"{path} holds no film_mlp")
    found = {f"film_mlp.{name}": tensor for name, tensor in saved["film_mlp"].items()}
    return {name: held(tensor) for name, tensor in found.items()}
