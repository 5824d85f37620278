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
    `norm_momentum` moves the batch norms' statistics: slowly from published ones, faster from none.
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
    norm_momentum: float = 0.01


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
    """A causal decoder of the Llama family; Qwen2 adds biases to q, k and v (`qkv_bias`).

    `tied`: the output embedding is the input's. `rope_sections`: rotary frequencies that follow time, row and column
    (M-RoPE of Qwen2-VL); empty = one position a token. `expert_rank`: 0 = each expert is a whole feed-forward layer
    (as published); else all share one and differ from it by matrices of this rank.
    """

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
    qkv_bias: bool = False
    tied: bool = True
    rope_sections: tuple[int, ...] = ()
    expert_rank: int = 0


@dataclass(frozen=True, kw_only=True)
class FusionConfig:
    """SFI (Aquila) over a grid of `grid` x `grid` queries, and its repetition inside the decoder (MDA).

    `strides` are the scales whose maps are looked at. `query_from_last` starts each query from the last stage
    at its place; with False the queries are free parameters only, as published. `sfi` off: they look at no map.
    `mda_layers`: decoder layers (0-based) before which it is repeated, with weights of their own or, `mda_shared`, one
    module for all (the paper names neither). `width`: channels in which queries and keys meet; None = the decoder's.
    """

    grid: int = 8
    strides: tuple[int, ...] = (8, 16, 32)
    query_from_last: bool = True
    mda_layers: tuple[int, ...] = (2,)
    sfi: bool = True
    mda_shared: bool = False
    width: int | None = None


@dataclass(frozen=True, kw_only=True)
class ModulationConfig:
    """Token-wise linear modulation (TLM) from anchored embeddings; `sigma` in patches, `merge` patches a side share a
    token. The other three have a sound form by default and that of FUSAR-GPT's published code:

    `normalise`: weights sum to one "once", or "twice" with masked anchors counted in the first sum.
    `span`: positions 0..1 reach from "edges" to edges, or between the "centres" of the outermost patches.
    `resize`: a token takes the "mean" of its patches, or from a "square" resampling that fits square images only.
    """

    vector_width: int = 64
    sigma: float = 2.0
    hidden_mult: int = 4
    merge: int = 2
    normalise: str = "once"
    span: str = "edges"
    resize: str = "mean"

    def __post_init__(self) -> None:
        if self.sigma <= 0:
            raise ValueError(f"sigma must be positive; got {self.sigma}")
        allowed = {"normalise": ("once", "twice"), "span": ("edges", "centres"), "resize": ("mean", "square")}
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} must be one of {values}; got {getattr(self, name)!r}")


@dataclass(frozen=True, kw_only=True)
class StacksConfig:
    """Detail stacks of a convolutional pyramid, for injection (FUSE-RSVLM's idea without its windows, which a
    convolution does not need): maps of `strides` of the image at `factor` times its side, split by their phases.
    A factor of 1 is no detail view: the stacks are of the image as it is."""

    factor: int = 2
    strides: tuple[int, ...] = (16, 32)


@dataclass(frozen=True, kw_only=True)
class DenseConfig:
    """The dense branch: boxes, masks and change from a pyramid of its own over the backbone's first blocks.

    The first `shared` blocks are the backbone's and stay as they are; the branch has its own copy of the others.
    `width` and `change_width` are channels of the two top-down paths, `query` those that meet a phrase.
    """

    shared: int = 7
    width: int = 96
    tower: int = 64
    query: int = 64
    change_width: int = 64
    groups: int = 8


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """A vision transformer. `style` is "clip" (class token, a norm before the first layer, patches without bias) or
    "siglip" (none of these); `act` is "gelu", "gelu_tanh" or "quick_gelu". `layers` counts those that are run."""

    style: str = "siglip"
    width: int = 1152
    layers: int = 26
    heads: int = 16
    ffn: int = 4304
    image_size: int = 384
    patch: int = 14
    act: str = "gelu_tanh"
    norm_eps: float = 1e-6


@dataclass(frozen=True, kw_only=True)
class DetailConfig:
    """The detail view (FUSE-RSVLM): windows of a canvas through the tower, stitched and split into stacks.

    `scales` are window sides relative to `window` (the side the tower takes), in the order of the stacks; `taps` are
    indices of tapped hidden states (0 = before the first layer); `factor` splits the stitched grid by its phases.
    `pad_mean`: a picture that is not square is padded with these values for the global view; None = it is squashed.
    What the published code does and its weights have learned: `plane_windows` takes the windows of each colour plane
    in turn and calls every three of them one picture; `zero_edges` weights with a Hann window that is 0 at its ends.
    """

    canvas: int = 672
    window: int = 336
    scales: tuple[float, ...] = (1.0, 0.5)
    taps: tuple[int, ...] = (8, 16, 24)
    factor: int = 2
    pad_mean: tuple[float, ...] | None = None
    plane_windows: bool = False
    zero_edges: bool = False


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """How an image's tokens enter the sequence (LLaVA and its kin).

    `visual_first`: before everything, the start token included (MF-RSVLM); else in the place of the placeholder.
    `spatial`: an image of several tiles is its overview (`overview`) and then its tiles put together on one grid, cut
    to the picture and with a newline token after each row (`newline`), or pooled 2x2 (`maxpool`); else one after
    another. `tile` and `side`: a tile's pixels and tokens a side. `grids`: the admitted sizes (width, height) of the
    tiled picture, empty = always 2x2 tiles. `max_tiles`: a larger grid is resized to about that many tiles' tokens.
    `context`: longer sequences are cut.
    """

    visual_first: bool = False
    spatial: bool = False
    newline: bool = False
    maxpool: bool = False
    overview: bool = True
    tile: int = 384
    side: int = 27
    grids: tuple[tuple[int, int], ...] = ()
    max_tiles: int | None = None
    context: int | None = None


@dataclass(frozen=True, kw_only=True)
class LlavaConfig:
    """A LLaVA-style model: a vision transformer, a two-layer projector and a decoder (RSUniVLM, MF-RSVLM).

    `feature` is the hidden state of the tower that is projected. `inject_layers`: decoder layers (0-based) before
    which the detail stacks are looked at again; they need `details`. `inject_steps`: not by the visual tokens alone, at
    prefill, as published, but by every token of text too, at every decoding step (as the paper says).
    """

    name: str
    vision: ViTConfig
    decoder: DecoderConfig
    merge: MergeConfig = field(default_factory=MergeConfig)
    feature: int = 26
    details: DetailConfig | None = None
    inject_layers: tuple[int, ...] = ()
    inject_steps: bool = False


@dataclass(frozen=True, kw_only=True)
class QwenVisionConfig:
    """The vision tower of Qwen2.5-VL: attention within windows of `window` pixels, except in `full_layers` (0-based).

    `merge` patches a side become one token; `frames` copies of a still image enter each patch.
    """

    width: int = 1280
    layers: int = 32
    heads: int = 16
    ffn: int = 3420
    patch: int = 14
    frames: int = 2
    merge: int = 2
    window: int = 112
    full_layers: tuple[int, ...] = (7, 15, 23, 31)
    norm_eps: float = 1e-6


@dataclass(frozen=True, kw_only=True)
class QwenVLConfig:
    """Qwen2.5-VL, with token-wise modulation of its visual tokens where `modulation` is given (FUSAR-GPT).

    `image_token` is the id that stands for each visual token; images are squashed to `image_size` pixels a side.
    """

    name: str
    vision: QwenVisionConfig
    decoder: DecoderConfig
    image_token: int
    image_size: int = 504
    modulation: ModulationConfig | None = None


@dataclass(frozen=True, kw_only=True)
class ConvNeXtConfig:
    """A ConvNeXt pyramid of four stages, strides 4, 8, 16 and 32 (XXL by default); pixels come normalised."""

    widths: tuple[int, ...] = (384, 768, 1536, 3072)
    depths: tuple[int, ...] = (3, 4, 30, 3)


@dataclass(frozen=True, kw_only=True)
class AquilaConfig:
    """Aquila: a ConvNeXt pyramid, a two-layer projector for each scale, SFI, and a decoder with MDA.

    `fusion.width` is the width of the projectors, of the queries and of MDA's inner space. Images have `image_size`
    pixels a side, a multiple of 32 times the grid's, so that every scale divides into the windows of the queries.
    """

    name: str
    decoder: DecoderConfig
    fusion: FusionConfig
    backbone: ConvNeXtConfig = field(default_factory=ConvNeXtConfig)
    image_size: int = 1024


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The whole model. `labels` are the scenes it has learned by name, `merged_labels` pairs
    a label with its near-synonym that stands for both in the default taxonomy; `objects` are those of the presence
    head, `concepts` the number of caption words it foresees.
    `views` turned views share one pooled vector at inference (1 to 4). `dense`: the branch for boxes, masks and change;
    None = it has none. `stacks`: what `inject_layers` (decoder layers, 0-based) look at again, `inject_steps` as in
    LlavaConfig; `modulation`: of the visual tokens by anchored embeddings, a token being a patch."""

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
    dense: DenseConfig | None = None
    stacks: StacksConfig | None = None
    inject_layers: tuple[int, ...] = ()
    inject_steps: bool = False
    modulation: ModulationConfig | None = None

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
    "dense": DenseConfig,
    "stacks": StacksConfig,
    "modulation": ModulationConfig,
}


def _build(cls: type[ModelConfig], raw: Mapping[str, Any]) -> ModelConfig:
    def freeze(value: Any) -> Any:
        return tuple(freeze(v) for v in value) if isinstance(value, list) else value

    parts = {k: _PARTS[k](**{n: freeze(v) for n, v in raw[k].items()}) for k in _PARTS if raw.get(k)}
    return cls(**{**{k: freeze(v) for k, v in raw.items() if k not in _PARTS}, **parts})


def nano() -> ModelConfig:
    """The embedded default: EfficientNet-Lite2, MiniLM-L6, a decoder of 4 layers."""
    return ModelConfig(
        dense=DenseConfig(),
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
            norm_momentum=0.1,
        ),
        sentence=SentenceConfig(vocab_size=600, width=24, layers=1, heads=2, ffn=48),
        decoder=DecoderConfig(vocab_size=400, width=32, layers=2, heads=4, kv_heads=2, ffn=64),
        fusion=FusionConfig(grid=2, mda_layers=(1,)),
        embed_width=16,
        labels=("farmland", "forest", "harbor", "river"),
        objects=("cars", "ship", "trees", "water"),
        concepts=16,
        dense=DenseConfig(shared=2, width=16, tower=16, query=8, change_width=16, groups=4),
    )


PRESETS = {"nano": nano, "debug": debug}
