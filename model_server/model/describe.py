"""What a config amounts to, found on the meta device: no weights are allocated and nothing is downloaded.

Parameters are counted by part, and for each expert those that a request of its tasks touches ("active", which papers
call runtime parameters). Operations are counted by running the network's own code on shapes; a multiplication and its
addition are two. Norms, activations and softmax are not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from model_server.model.aquila import AquilaVLM
from model_server.model.attention import KVCache, attention_backend
from model_server.model.backends import Backend
from model_server.model.config import DecoderConfig, ModelConfig
from model_server.model.decoder import Decoder
from model_server.model.dense import DenseBranch
from model_server.model.experts import ROUTES
from model_server.model.fusion import Windows
from model_server.model.injection import Details, StepDetails
from model_server.model.llava import LlavaVLM
from model_server.model.presets import AnyConfig, build
from model_server.model.qwen_vl import QwenVLM
from model_server.model.rsvlm import RSVLM

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
ANCHORS = 16  # of an image, where it is modulated
DENSE = "boxes, masks, change"


@dataclass(frozen=True)
class Part:
    """Parameters of one part, and how many of them each kind of request touches."""

    name: str
    total: int
    active: Mapping[str, int]


@dataclass(frozen=True)
class Description:
    """Figures of one config. FLOPs: of one image up to its tokens, of the decoder over those tokens (with MDA and
    injection), and of one more token behind `context` others. `visual_tokens` are what an image takes of a sequence."""

    name: str
    columns: tuple[str, ...]
    parts: tuple[Part, ...]
    visual_tokens: int
    image_flops: int
    prefill_flops: int
    token_flops: int
    context: int
    cache_elements: int  # of a token, keys and values of all layers

    @property
    def total(self) -> int:
        return sum(part.total for part in self.parts)

    def active(self, column: str) -> int:
        return sum(part.active[column] for part in self.parts)

    def weight_bytes(self, precision: str) -> int:
        return self.total * BYTES[precision]

    def cache_bytes(self, precision: str) -> int:
        """Of one sequence of `context` tokens."""
        return self.cache_elements * self.context * BYTES[precision]


def describe(config: AnyConfig, context: int = 2048) -> Description:
    """Count a config's parameters and operations; `context`: tokens before the one that is decoded."""
    with torch.device("meta"):
        model = build(config).eval().requires_grad_(False)
        dense = DenseBranch(config) if isinstance(config, ModelConfig) and config.dense is not None else None
        if isinstance(model, RSVLM):
            model.backbone.fold_norms()  # as it is stored and served
    decoder, encode = _halves(model)
    c = decoder.config
    columns = _columns(model, c)
    with torch.no_grad(), attention_backend(Backend.MATH):
        found: list[Seen] = []
        image = _flops(lambda: found.append(encode()))
        (seen,) = found
        prefill = _flops(lambda: _decode(decoder, seen.tokens, 0, seen.windows, seen.details))
        steps = None if seen.details is None else seen.details.steps
        token = _flops(lambda: _decode(decoder, 1, context, None, steps))
    return Description(
        name=config.name,
        columns=(*columns, DENSE) if dense is not None else tuple(columns),
        parts=tuple(_parts(model, dense, c, columns)),
        visual_tokens=seen.tokens,
        image_flops=image,
        prefill_flops=prefill,
        token_flops=token,
        context=context,
        cache_elements=2 * c.layers * c.kv_heads * (c.width // c.heads),
    )


def _columns(model: nn.Module, c: DecoderConfig) -> list[str]:
    """The experts with their task tokens; a model that has none serves every task with what it has."""
    if len(c.experts) == 1 and not isinstance(model, RSVLM):
        return ["every task"]
    return [f"{e}: {' '.join(token for token, wanted in ROUTES.items() if wanted == e)}" for e in c.experts]


@dataclass(frozen=True)
class Seen:
    """An encoded image: its tokens in the sequence, and what decoder layers look at again."""

    tokens: int
    windows: Windows | None = None
    details: Details | None = None


def _flops(run: Callable[[], object]) -> int:
    counter = FlopCounterMode(display=False)
    with counter:
        run()
    return counter.get_total_flops()


def _decode(decoder: Decoder, tokens: int, behind: int, windows: Windows | None,
            details: Details | StepDetails | None) -> None:  # fmt: skip
    """Run `tokens` tokens and the output layer for the last of them, over a cache of `behind` others."""
    c = decoder.config
    x = torch.empty(1, tokens, c.width, device="meta")
    cache = KVCache(c.layers, 1, c.kv_heads, behind + tokens, c.width // c.heads, x)
    cache.filled = behind
    positions = torch.zeros((3, 1, tokens) if c.rope_sections else (1, tokens), device="meta")
    hidden = decoder(x, positions, "causal", torch.zeros(1, dtype=torch.long), windows, cache, details)
    decoder.logits(hidden[:, -1])


def _halves(model: nn.Module) -> tuple[Decoder, Callable[[], Seen]]:
    """The decoder, and what encodes one image."""
    match model:
        case RSVLM():
            return model.decoder, partial(_encode_rsvlm, model)
        case LlavaVLM():
            return model.decoder, partial(_encode_llava, model)
        case QwenVLM():
            return model.decoder, partial(_encode_qwen, model)
        case AquilaVLM():
            return model.decoder, partial(_encode_aquila, model)
        case _:
            raise TypeError(f"no such model: {type(model).__name__}")


def _encode_rsvlm(model: RSVLM) -> Seen:
    side = model.config.image_size
    features = model.encode(torch.empty(1, 3, side, side, dtype=torch.uint8, device="meta"))
    return Seen(features.visual.shape[1], features.windows, model.details(features))


def _encode_aquila(model: AquilaVLM) -> Seen:
    side = model.config.image_size
    scenes = model.encode(torch.empty(1, 3, side, side, device="meta"))
    return Seen(scenes.tokens.shape[1], scenes.windows)


def _encode_llava(model: LlavaVLM) -> Seen:
    side = model.config.vision.image_size
    (image,) = model.encode([torch.empty(1, 3, side, side, device="meta")])
    details = None
    if image.stacks is not None and model.config.inject_layers:
        rows, real = torch.zeros(1, dtype=torch.long, device="meta"), torch.ones(1, len(image.tokens), device="meta")
        details = Details(rows, image.stacks[None], real.bool(), 1, model.config.inject_steps)
    return Seen(len(image.tokens), details=details)


def _encode_qwen(model: QwenVLM) -> Seen:
    c = model.config.vision
    side = model.config.image_size // c.patch
    tokens = model.tower(torch.empty(side**2, 3 * c.frames * c.patch**2, device="meta"), [(side, side)])
    if model.modulation is not None:
        model.modulation.film(torch.empty(ANCHORS, model.modulation.config.vector_width, device="meta"))
    return Seen(len(tokens))


_NAMES = {
    "backbone": "convolutional backbone", "tower": "vision tower", "projector": "projector",
    "projectors": "projectors", "sentence": "sentence encoder", "heads": "image heads", "modulation": "TLM",
    "sfi": "SFI", "queries": "SFI", "from_last": "SFI", "cut": "SFI", "lift": "SFI", "detail": "detail view",
    "image_token": "head tokens", "label_token": "head tokens", "object_token": "head tokens",
    "concept_token": "head tokens", "question_states": "question reader", "question_vector": "question reader",
    "visual_norm": "head tokens", "newline": "projector",
}  # fmt: skip
_DECODER = {"embed": "embeddings", "head": "embeddings", "norm": "attention and norms", "mda": "MDA",
            "inject": "injection"}  # fmt: skip


def _part_of(name: str) -> tuple[str, int | None]:
    """The part that a parameter belongs to, and the row of its expert if it is one's own."""
    first, *rest = name.split(".")
    if first != "decoder":
        return _NAMES[first], None
    if rest[0] != "blocks":
        return _DECODER[rest[0]], None
    if rest[2] != "experts":
        return "attention and norms", None
    if rest[3] in ("experts", "deltas"):
        return "experts", int(rest[4])
    return "shared feed-forward", None


def _parts(model: nn.Module, dense: DenseBranch | None, c: DecoderConfig, columns: list[str]) -> list[Part]:
    totals: dict[str, int] = {}
    active: dict[str, dict[str, int]] = {}
    for name, p in model.named_parameters():
        part, expert = _part_of(name)
        label = part
        if expert is not None:
            label = f"feed-forward, {c.experts[expert]} expert" if len(c.experts) > 1 else "feed-forward"
        totals[label] = totals.get(label, 0) + p.numel()
        row = active.setdefault(label, dict.fromkeys(columns, 0))
        for i, column in enumerate(columns):
            row[column] += p.numel() if expert in (None, i) else 0
    if dense is None:
        return [Part(name, totals[name], active[name]) for name in totals]
    shared = [Part(name, totals[name], {**active[name], DENSE: _beside(model, dense, name)}) for name in totals]
    return [*shared, _dense(dense, columns)]


def _beside(model: nn.Module, dense: DenseBranch, part: str) -> int:
    """What the dense branch uses of another part: the backbone's first blocks and the sentence encoder."""
    assert isinstance(model, RSVLM)
    if part == _NAMES["sentence"]:
        return _count(model.sentence)
    if part == _NAMES["backbone"]:
        return _count(model.backbone.stem) + sum(_count(b) for b in model.backbone.blocks[: dense.config.shared])
    return 0


def _dense(dense: DenseBranch, columns: list[str]) -> Part:
    return Part("dense branch", _count(dense), {**dict.fromkeys(columns, 0), DENSE: _count(dense)})


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
