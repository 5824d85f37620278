"""Published checkpoints: what their configs ask for, and where their tensors belong in our modules.

A plan says for every published name which part of which of our parameters it fills. Filling is strict: a tensor that is
missing, unexpected or of another shape is reported by its published name, and nothing is guessed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from model_server.checkpoints.files import Tensors, read_json
from model_server.checkpoints.spread import Spread
from model_server.checkpoints.store import WeightsError
from model_server.model.config import DecoderConfig, ViTConfig


@dataclass(frozen=True)
class Piece:
    """Where a published tensor goes: into `ours`, or its rows from `start` on; `item` takes one entry of it only."""

    ours: str
    shape: tuple[int, ...]  # of the published tensor
    start: int | None = None
    item: int | None = None


Plan = dict[str, list[Piece]]  # published name -> pieces


@dataclass(frozen=True)
class Report:
    """What did not fit. `unused` are tensors which the authors' own code does not use either."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshaped: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)  # name, is, should be
    unused: list[str] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        return not (self.missing or self.unexpected or self.misshaped)

    def lines(self) -> list[str]:
        """One line a fault."""
        return [
            *(f"missing: {name}" for name in self.missing),
            *(f"unexpected: {name}" for name in self.unexpected),
            *(f"mis-shaped: {name} is {list(found)}, should be {list(wanted)}"
              for name, found, wanted in self.misshaped),
        ]  # fmt: skip


class LayoutError(WeightsError):
    """The tensors of a published checkpoint do not fit its config."""

    def __init__(self, folder: Path, report: Report) -> None:
        super().__init__(f"the tensors in {folder} do not fit its config:\n" + "\n".join(report.lines()))
        self.report = report


class UnsupportedLayout(WeightsError):
    """The checkpoint asks for something that this code does not compute."""


M = TypeVar("M", bound=nn.Module)


@torch.no_grad()
def fill(model: nn.Module, plan: Plan, tensors: Mapping[str, Callable[[], Tensor]], unused: Sequence[str]) -> Report:
    """Fill a model from published tensors, one at a time; `unused` are patterns of names to leave alone.

    What does not fit is left out and reported; the model is right only if the report `fits`.
    """
    state = model.state_dict()
    covered = {piece.ours for pieces in plan.values() for piece in pieces}
    assert covered == set(state), f"the plan and the model differ: {covered ^ set(state)}"
    skip = re.compile("|".join(unused)) if unused else None
    report = Report()
    for name in sorted(tensors.keys() - plan.keys()):
        (report.unused if skip and skip.fullmatch(name) else report.unexpected).append(name)
    for name, pieces in plan.items():
        if name not in tensors:
            report.missing.append(name)
            continue
        tensor = tensors[name]()
        for piece in pieces:
            if tuple(tensor.shape) != piece.shape:
                report.misshaped.append((name, tuple(tensor.shape), piece.shape))
                break
            target = state[piece.ours]
            if piece.start is not None:
                target = target[piece.start : piece.start + piece.shape[0]]
            target.copy_(tensor if piece.item is None else tensor[piece.item])
    return report


def decoder_plan(c: DecoderConfig, ours: str = "decoder.") -> Plan:
    """Names of Llama and Qwen2 (`model.layers.N...`); several experts are `mlp.E` (RSUniVLM)."""
    w, kv = c.width, c.width // c.heads * c.kv_heads
    plan: Plan = {
        "model.embed_tokens.weight": [Piece(f"{ours}embed.weight", (c.vocab_size, w))],
        "model.norm.weight": [Piece(f"{ours}norm.weight", (w,))],
    }
    if not c.tied:
        plan["lm_head.weight"] = [Piece(f"{ours}head.weight", (c.vocab_size, w))]
    for n in range(c.layers):
        theirs, block = f"model.layers.{n}.", f"{ours}blocks.{n}."
        plan[theirs + "input_layernorm.weight"] = [Piece(block + "norm1.weight", (w,))]
        plan[theirs + "post_attention_layernorm.weight"] = [Piece(block + "norm2.weight", (w,))]
        for part, rows, start in (("q", w, 0), ("k", kv, w), ("v", kv, w + kv)):
            name = f"{theirs}self_attn.{part}_proj."
            plan[name + "weight"] = [Piece(block + "qkv.weight", (rows, w), start)]
            if c.qkv_bias:
                plan[name + "bias"] = [Piece(block + "qkv.bias", (rows,), start)]
        plan[theirs + "self_attn.o_proj.weight"] = [Piece(block + "out.weight", (w, w))]
        for e in range(len(c.experts)):
            mlp = theirs + ("mlp." if len(c.experts) == 1 else f"mlp.{e}.")
            for part, shape in (("gate", (c.ffn, w)), ("up", (c.ffn, w)), ("down", (w, c.ffn))):
                plan[f"{mlp}{part}_proj.weight"] = [Piece(f"{block}experts.experts.{e}.{part}.weight", shape)]
    return plan


def projector_plan(vision: int, width: int, theirs: str, ours: str = "projector.") -> Plan:
    """A two-layer projector (`mlp2x_gelu`): layers 0 and 2 of a sequence."""
    shapes = {"0.weight": (width, vision), "0.bias": (width,), "2.weight": (width, width), "2.bias": (width,)}
    return {theirs + name: [Piece(ours + name, shape)] for name, shape in shapes.items()}


def vit_plan(c: ViTConfig, theirs: str, ours: str = "tower.") -> Plan:
    """Names of the CLIP and SigLIP vision models of `transformers`; `theirs` ends where `embeddings.` begins."""
    w, clip = c.width, c.style == "clip"
    tokens = (c.image_size // c.patch) ** 2 + clip
    plan: Plan = {
        theirs + "embeddings.patch_embedding.weight": [Piece(ours + "patches.weight", (w, 3, c.patch, c.patch))],
        theirs + "embeddings.position_embedding.weight": [Piece(ours + "places", (tokens, w))],
    }
    if clip:
        plan[theirs + "embeddings.class_embedding"] = [Piece(ours + "class_token", (w,))]
        for kind in ("weight", "bias"):
            plan[f"{theirs}pre_layrnorm.{kind}"] = [Piece(f"{ours}norm.{kind}", (w,))]
    else:
        plan[theirs + "embeddings.patch_embedding.bias"] = [Piece(ours + "patches.bias", (w,))]
    rows = {"out": ("self_attn.out_proj", w, w), "up": ("mlp.fc1", c.ffn, w), "down": ("mlp.fc2", w, c.ffn)}
    for n in range(c.layers):
        layer, mine = f"{theirs}encoder.layers.{n}.", f"{ours}layers.{n}."
        for i, part in enumerate(("q", "k", "v")):
            name = f"{layer}self_attn.{part}_proj."
            plan[name + "weight"] = [Piece(mine + "qkv.weight", (w, w), i * w)]
            plan[name + "bias"] = [Piece(mine + "qkv.bias", (w,), i * w)]
        for own, (name, out, into) in rows.items():
            plan[f"{layer}{name}.weight"] = [Piece(f"{mine}{own}.weight", (out, into))]
            plan[f"{layer}{name}.bias"] = [Piece(f"{mine}{own}.bias", (out,))]
        for i in (1, 2):
            for kind in ("weight", "bias"):
                plan[f"{layer}layer_norm{i}.{kind}"] = [Piece(f"{mine}norm{i}.{kind}", (w,))]
    return plan


ACTS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "quick_gelu"}


def need(raw: Mapping[str, Any], key: str, file: str = "config.json") -> Any:
    """raw[key].

    Raises:
        UnsupportedLayout: the config has no such field.
    """
    if key not in raw:
        raise UnsupportedLayout(f"{file} has no {key}")
    return raw[key]


def require(raw: Mapping[str, Any], key: str, allowed: Sequence[Any], file: str = "config.json") -> None:
    """Refuse a config whose `key`, where it has one, asks for what is not computed here.

    Raises:
        UnsupportedLayout: naming the key, its value and what is allowed.
    """
    if key in raw and raw[key] not in allowed:
        raise UnsupportedLayout(f"{file} has {key} = {raw[key]!r}; supported are {list(allowed)}")


def repetition_penalty(folder: Path) -> float:
    """What generation_config.json takes from repeated tokens; 1, nothing, where there is none.

    Raises:
        UnsupportedLayout: it is no positive number.
    """
    path = folder / "generation_config.json"
    found = (read_json(path) if path.is_file() else {}).get("repetition_penalty") or 1.0
    if not isinstance(found, int | float) or found <= 0:
        raise UnsupportedLayout(f"{path} has repetition_penalty = {found!r}; it must be a positive number")
    return float(found)


def rope_config(raw: Mapping[str, Any], kinds: Sequence[str] = ("default",)) -> dict[str, Any]:
    """Rotary settings: those of `rope_parameters` (newer) or `rope_scaling` (older), and `rope_theta` wherever it is.

    Raises:
        UnsupportedLayout: frequencies that are scaled, or heads that turn in part.
    """
    rope = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    for key in ("rope_type", "type"):
        require(rope, key, kinds)
    if "rope_type" not in rope and "type" not in rope:
        require(rope, "factor", [None, 1, 1.0])
    rope = {"rope_theta": raw.get("rope_theta"), "partial_rotary_factor": raw.get("partial_rotary_factor"), **rope}
    require(rope, "partial_rotary_factor", [None, 1, 1.0])
    return rope


def decoder_config(raw: Mapping[str, Any], rope: Mapping[str, Any] | None = None, **family: Any) -> DecoderConfig:
    """A config.json of the Llama or Qwen2 family, with that family's defaults; `rope`: its rotary settings, if they are
    read already; `family` overrides.

    Raises:
        UnsupportedLayout: another activation, sliding windows, scaled frequencies, quantised weights, heads that do
            not divide the width.
    """
    require(raw, "hidden_act", ["silu", "swish"])
    require(raw, "use_sliding_window", [False, None])
    require(raw, "attention_bias", [False, None])
    require(raw, "quantization_config", [None, {}])
    if kinds := sorted(set(raw.get("layer_types") or ()) - {"full_attention"}):
        raise UnsupportedLayout(f"config.json has layer_types of {kinds}; supported is full_attention")
    rope = rope_config(raw) if rope is None else rope
    heads = raw.get("num_attention_heads", 32)
    found = {
        "width": raw.get("hidden_size", 4096),
        "layers": raw.get("num_hidden_layers", 32),
        "heads": heads,
        "kv_heads": raw.get("num_key_value_heads") or heads,
        "rope_base": float(rope.get("rope_theta") or 10000.0),
        "norm_eps": raw.get("rms_norm_eps", 1e-6),
        "tied": bool(raw.get("tie_word_embeddings", False)),
        "vocab_size": need(raw, "vocab_size"),
        "ffn": need(raw, "intermediate_size"),
    }
    require(raw, "head_dim", [found["width"] // heads, None])
    if found["width"] % heads or heads % found["kv_heads"]:
        raise UnsupportedLayout(
            f"config.json has hidden_size = {found['width']}, num_attention_heads = {heads} and num_key_value_heads = "
            f"{found['kv_heads']}; each must be a multiple of the next"
        )
    return DecoderConfig(**{**found, **family})


def tied_head(c: DecoderConfig, tensors: Tensors) -> tuple[str, ...]:
    """The name of an output embedding that a file holds although the config ties it to the input's, to leave alone.

    Raises:
        UnsupportedLayout: the two differ: versions of `transformers` disagree on which of them to take.
    """
    head, embedding = tensors.get("lm_head.weight"), tensors.get("model.embed_tokens.weight")
    if not c.tied or head is None:
        return ()
    if embedding is not None and not torch.equal(head(), embedding()):
        raise UnsupportedLayout(
            "config.json has tie_word_embeddings = True, but lm_head.weight is another than model.embed_tokens.weight: "
            "set it to False if the head is to be used, or take the head out"
        )
    return (r"lm_head\.weight",)


def feature_layer(selected: Any, layers: int) -> int:
    """The one hidden state of a tower that a config selects, 0 = before the first layer; -1 is the last.

    Raises:
        UnsupportedLayout: several, or one that the tower has not.
    """
    chosen = selected[0] if isinstance(selected, list) and len(selected) == 1 else selected
    if not isinstance(chosen, int) or not -layers - 1 <= chosen <= layers:
        raise UnsupportedLayout(
            f"config.json selects the tower's layers {selected}; supported is one of its {layers} and 0"
        )
    return chosen if chosen >= 0 else layers + 1 + chosen


def vit_config(raw: Mapping[str, Any], defaults: ViTConfig) -> ViTConfig:
    """A vision tower's config.json, flat or nested under `vision_config`; what it does not say is as in `defaults`."""
    raw = raw.get("vision_config", raw)
    act = raw.get("hidden_act")
    if act is not None and act not in ACTS:
        raise UnsupportedLayout(f"the tower's config.json has hidden_act = {act!r}; supported are {list(ACTS)}")
    width, heads = raw.get("hidden_size", defaults.width), raw.get("num_attention_heads", defaults.heads)
    if width % heads:
        raise UnsupportedLayout(f"the tower's config.json has hidden_size = {width}, no multiple of its {heads} heads")
    return ViTConfig(
        style=defaults.style,
        width=width,
        layers=raw.get("num_hidden_layers", defaults.layers),
        heads=heads,
        ffn=raw.get("intermediate_size", defaults.ffn),
        image_size=raw.get("image_size", defaults.image_size),
        patch=raw.get("patch_size", defaults.patch),
        act=ACTS[act] if act is not None else defaults.act,
        norm_eps=raw.get("layer_norm_eps", defaults.norm_eps),
    )


def empty(model: Callable[[], M], device: str, dtype: torch.dtype, spread: Spread | None = None) -> M:
    """Build a model without computing its random start: memory that `fill` then fills, on one device or spread.

    Raises:
        MissingAccelerate, DoesNotFit: see spread.py.
    """
    if spread is not None:
        return spread.empty(model, dtype)
    with torch.device("meta"):
        built = model()
    return built.to(dtype).to_empty(device=device)


def tower_folder(checkpoint: Path, name: str) -> Path | None:
    """The folder of the vision tower that a checkpoint names, if it is there: beside the tensors, or a path."""
    for folder in (checkpoint / name, Path(name)):
        if (folder / "config.json").is_file():
            return folder
    return None
