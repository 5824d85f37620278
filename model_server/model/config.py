"""Shapes and switches of the network, as plain dataclasses. Needs nothing beyond the standard library."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

EXPERTS = ("image", "region", "pixel")


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """An EfficientNet-Lite pyramid: blocks as (expansion, kernel, stride, width), strides 4/8/16/32.

    `input_mean` and `input_std` are those of the published ImageNet weights, (x - 127) / 128 on 0..255.
    """

    stem: int = 32
    blocks: tuple[tuple[int, int, int, int], ...] = (
        (1, 3, 1, 16),
        *((6, 3, 2, 24), (6, 3, 1, 24), (6, 3, 1, 24)),
        *((6, 5, 2, 48), (6, 5, 1, 48), (6, 5, 1, 48)),
        *((6, 3, 2, 88), (6, 3, 1, 88), (6, 3, 1, 88), (6, 3, 1, 88)),
        *((6, 5, 1, 120), (6, 5, 1, 120), (6, 5, 1, 120), (6, 5, 1, 120)),
        *((6, 5, 2, 208), (6, 5, 1, 208), (6, 5, 1, 208), (6, 5, 1, 208), (6, 5, 1, 208)),
        (6, 3, 1, 352),
    )
    head: int = 1280
    input_mean: float = 127.0
    input_std: float = 128.0


@dataclass(frozen=True, kw_only=True)
class SentenceConfig:
    """A BERT-style sentence encoder (MiniLM-L6 in `nano`)."""

    vocab_size: int = 30522
    width: int = 384
    layers: int = 6
    heads: int = 12
    ffn: int = 1536
    max_tokens: int = 128


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A Llama-style causal decoder; `inject_layers` are those before which the maps are looked at again."""

    vocab_size: int = 2048
    width: int = 256
    layers: int = 4
    heads: int = 8
    kv_heads: int = 8
    ffn: int = 768
    rope_base: float = 10000.0
    norm_eps: float = 1e-6
    max_text: int = 64
    dropout: float = 0.0
    experts: tuple[str, ...] = ("image",)


@dataclass(frozen=True, kw_only=True)
class FusionConfig:
    """SFI (Aquila) over a grid of `grid` x `grid` queries, and its repetition inside the decoder (MDA).

    `strides` are the scales whose maps are looked at. `query_from_last` starts each query from the last stage
    at its place; with False the queries are free parameters only, as published.
    """

    grid: int = 8
    strides: tuple[int, ...] = (8, 16, 32)
    query_from_last: bool = True
    mda_layers: tuple[int, ...] = (2,)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The whole model. `labels` are the scenes it has learned by name, `merged_labels` pairs
    a label with its near-synonym that stands for both in the default taxonomy; `objects` are those of the presence
    head, `concepts` the number of caption words it foresees.
    `views` turned views share one pooled vector at inference (1 to 4)."""

    name: str = "nano"
    image_size: int = 256
    views: int = 4
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    sentence: SentenceConfig = field(default_factory=SentenceConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    fusion: FusionConfig = field(default_factory=FusionConfig)
    embed_width: int = 256
    labels: tuple[str, ...] = ()
    merged_labels: tuple[tuple[str, str], ...] = ()
    objects: tuple[str, ...] = ()
    concepts: int = 800

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> ModelConfig:
        return _build(cls, json.loads(text))


_PARTS = {
    "backbone": BackboneConfig,
    "sentence": SentenceConfig,
    "decoder": DecoderConfig,
    "fusion": FusionConfig,
}


def _build(cls: type[ModelConfig], raw: Mapping[str, Any]) -> ModelConfig:
    def freeze(value: Any) -> Any:
        return tuple(freeze(v) for v in value) if isinstance(value, list) else value

    parts = {k: _PARTS[k](**{n: freeze(v) for n, v in raw[k].items()}) for k in _PARTS if k in raw}
    return cls(**{**{k: freeze(v) for k, v in raw.items() if k not in _PARTS}, **parts})


def nano() -> ModelConfig:
    """The embedded default: EfficientNet-Lite2, MiniLM-L6, a decoder of 4 layers."""
    return ModelConfig(
        merged_labels=(
            ("agricultural", "farmland"),
            ("baseball field", "baseball diamond"),
            ("parking", "parking lot"),
            ("port", "harbor"),
        ),
    )


def debug() -> ModelConfig:
    """The same architecture, small enough to train in seconds."""
    return ModelConfig(
        name="debug",
        image_size=64,
        backbone=BackboneConfig(
            stem=8,
            blocks=((1, 3, 1, 8), (2, 3, 2, 8), (2, 3, 2, 12), (2, 3, 2, 16), (2, 3, 2, 24)),
            head=32,
        ),
        sentence=SentenceConfig(vocab_size=600, width=24, layers=1, heads=2, ffn=48),
        decoder=DecoderConfig(vocab_size=400, width=32, layers=2, heads=4, kv_heads=2, ffn=64),
        fusion=FusionConfig(grid=2, mda_layers=(1,)),
        embed_width=16,
        labels=("farmland", "forest", "harbor", "river"),
        objects=("cars", "ship", "trees", "water"),
        concepts=16,
    )


PRESETS = {"nano": nano, "debug": debug}
