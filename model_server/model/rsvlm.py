"""The whole model: images to features, prompts to hidden states, and cached steps after them.

A sequence is laid out as [visual | question | task token | answer]. The visual part is L*L SFI tokens, one token of
the pooled image and one each of what the heads found (labels, objects, caption words). The question part is one
token of the sentence vector and the sentence encoder's token states. Visual tokens see each other only, so what they
become does not depend on the text; everything after them is causal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model_server.model.attention import KVCache
from model_server.model.config import ModelConfig
from model_server.model.decoder import Decoder
from model_server.model.fusion import MapWindows, SpatialIntegration, Windows
from model_server.model.heads import ImageHeads
from model_server.model.injection import Details, StepDetails
from model_server.model.modulation import Anchors, TokenModulation
from model_server.model.sentence import SentenceEncoder
from model_server.model.stacks import DetailStacks, canvas_of
from model_server.model.vision import Backbone

HEAD_TOKENS = 4  # pooled image, labels, objects, caption words
TURNS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda x: x.flip(3),
    lambda x: x.rot90(1, (2, 3)),
    lambda x: x.rot90(1, (2, 3)).flip(3),
)


@dataclass
class Features:
    """What an image is after encoding; rows are images."""

    visual: Tensor  # [B, P, D], the visual part of a sequence
    windows: Windows  # for MDA
    pooled: Tensor  # [B, head]
    stacks: Tensor | None = None  # [B, K, L*L, D], for injection

    def rows(self, index: Tensor) -> Features:
        stacks = None if self.stacks is None else self.stacks[index]
        return Features(self.visual[index], {s: w[index] for s, w in self.windows.items()}, self.pooled[index], stacks)


@dataclass
class Questions:
    """Questions through the sentence encoder, padded to the longest; `mask` is all False where there is none."""

    states: Tensor  # [B, Q, S]
    vectors: Tensor  # [B, S]
    mask: Tensor  # bool [B, Q]


@dataclass
class DecodeState:
    """A prefilled batch: cache, which cached places are real, the next position and expert of each sequence.

    With V `views`, each of the B sequences has V rows, one under each turned view of its image: row v B + b.
    """

    cache: KVCache
    visible: Tensor  # bool [V B, length]
    position: Tensor  # int [V B]
    expert: Tensor  # int [V B], CPU
    views: int = 1
    details: StepDetails | None = None  # where every step looks at them again

    def select(self, sequences: Tensor) -> None:
        """Keep these sequences, in this order; one may be named several times."""
        b = len(self.position) // self.views
        rows = torch.cat([sequences + v * b for v in range(self.views)])
        self.cache.select(rows)
        self.visible, self.position = self.visible[rows], self.position[rows]
        self.expert = self.expert[rows.cpu()]
        self.details = None if self.details is None else self.details.select(rows)


class RSVLM(nn.Module):
    """Remote-sensing vision-language model of one config."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        fusion, width, sentence = config.fusion, config.decoder.width, config.sentence.width
        self.backbone = Backbone(config.backbone)
        pooled = config.backbone.head
        self.sentence = SentenceEncoder(config.sentence)
        self.heads = ImageHeads(
            pooled, sentence, config.embed_width, len(config.labels), len(config.objects), config.concepts
        )
        widths = {s: self.backbone.widths[s] for s in fusion.strides}
        keys = {s: (config.image_size // s // fusion.grid) ** 2 for s in fusion.strides}
        self.cut = MapWindows(widths, fusion.grid)
        self.queries = nn.Parameter(torch.randn(fusion.grid**2, width) * 0.02)
        last = max(self.backbone.widths)
        self.from_last = nn.Linear(self.backbone.widths[last], width) if fusion.query_from_last else None
        self.sfi = SpatialIntegration(widths, keys, width, fusion.width) if fusion.sfi else None
        self.image_token = nn.Linear(pooled, width)
        self.label_token = nn.Linear(max(len(config.labels), 1), width)
        self.object_token = nn.Linear(max(len(config.objects), 1), width)
        self.concept_token = nn.Linear(config.concepts, width)
        self.question_states = nn.Linear(sentence, width)
        self.question_vector = nn.Linear(sentence, width)
        self.visual_norm = nn.RMSNorm(width)
        mda = SpatialIntegration.repeated(
            fusion.mda_layers, lambda: SpatialIntegration(widths, keys, width, fusion.width), fusion.mda_shared
        )
        self.decoder = Decoder(config.decoder, mda, config.inject_layers)
        if bool(config.inject_layers) != (config.stacks is not None):
            raise ValueError("inject_layers and stacks need each other: what is injected, and where")
        self.detail = DetailStacks(config.stacks, self.backbone.widths, fusion.grid, width) if config.stacks else None
        self.modulation = TokenModulation(config.modulation, width) if config.modulation else None

    @property
    def visual_tokens(self) -> int:
        return self.config.fusion.grid**2 + HEAD_TOKENS

    def encode(self, images: Tensor, turned: bool = False, canvas: Tensor | None = None,
               anchors: Anchors | None = None) -> Features:  # fmt: skip
        """uint8 [B, 3, side, side] -> features.

        Imagery seen from above has no upright: the pooled vector is the mean over `config.views` turned views V.

        Args:
            images: of the config's size.
            turned: give the features of every view, V B rows, the upright ones first; else the B upright ones.
            canvas: the same places at `stacks.factor` times the side, uint8, where the detail is known; else the images
                are enlarged.
            anchors: what is known of the places, for modulation; of upright views only.
        """
        if turned and anchors is not None:
            raise ValueError("anchors have upright positions; encode with turned=False")
        b, views = len(images), self.config.views
        maps, pooled = self.backbone(images)
        shown = images
        if views > 1:
            others, more = self.backbone(torch.cat([turn(images) for turn in TURNS[: views - 1]]))
            pooled = torch.cat((pooled, more)).view(views, b, -1).mean(0)
            if turned:
                maps, pooled = {s: torch.cat((m, others[s])) for s, m in maps.items()}, pooled.repeat(views, 1)
                shown = torch.cat([images, *(turn(images) for turn in TURNS[: views - 1])])
                if canvas is not None:
                    canvas = torch.cat([canvas, *(turn(canvas) for turn in TURNS[: views - 1])])
        features = self.fuse(maps, pooled, anchors)
        self.add_details(features, maps, shown, canvas)
        return features

    def add_details(self, features: Features, maps: dict[int, Tensor], shown: Tensor,
                    canvas: Tensor | None = None) -> None:  # fmt: skip
        """Give features their detail stacks, where the config has them; `maps` are of the images `shown`."""
        if self.detail is not None:
            features.stacks = self.detail(self._detail_maps(maps, shown, canvas))

    def _detail_maps(self, maps: dict[int, Tensor], images: Tensor, canvas: Tensor | None) -> dict[int, Tensor]:
        """Maps of the canvas, which without a detail view is the image itself."""
        stacks = self.config.stacks
        if stacks is None or stacks.factor == 1:
            return maps
        return self.backbone(canvas_of(images, stacks.factor) if canvas is None else canvas)[0]

    def details(self, features: Features) -> Details | None:
        """What injection looks at; the tokens behind the SFI tokens look as text does, where it looks at all."""
        if features.stacks is None:
            return None
        b, _, v, _ = features.stacks.shape
        rows = torch.arange(b, device=features.stacks.device)
        real = torch.ones(b, v, dtype=torch.bool, device=features.stacks.device)
        return Details(rows, features.stacks, real, b, self.config.inject_steps)

    def fuse(self, maps: dict[int, Tensor], pooled: Tensor, anchors: Anchors | None = None) -> Features:
        """Backbone maps and pooled vectors to the visual tokens. The heads' findings enter without gradient."""
        dtype = self.queries.dtype
        pooled = pooled.to(self.heads.image.weight.dtype)  # which may be finer than the rest of the network
        windows = self.cut({s: maps[s].to(dtype) for s in self.config.fusion.strides})
        x = self.queries.expand(pooled.shape[0], -1, -1)
        if self.from_last is not None:
            x = x + self.from_last(self.grid_of_last(maps[max(maps)].to(dtype)))
        if self.sfi is not None:
            x = self.sfi(x, windows)
        if self.modulation is not None:
            side = self.config.fusion.grid
            x = self.modulation(x.flatten(0, 1), [(side, side)] * len(x), anchors).view_as(x)
        with torch.no_grad():
            labels = self.heads.labels(pooled).softmax(-1) if self.config.labels else pooled.new_zeros(len(pooled), 1)
            objects = self.heads.objects(pooled).sigmoid() if self.config.objects else pooled.new_zeros(len(pooled), 1)
            concepts = self.heads.concepts(pooled).sigmoid().sqrt()
        tokens = (self.image_token, self.label_token, self.object_token, self.concept_token)
        found = (pooled, labels, objects, concepts)
        heads = torch.stack([token(what.to(dtype)) for token, what in zip(tokens, found, strict=True)], 1)  # [B, 4, D]
        return Features(self.visual_norm(torch.cat((x, heads), 1)), windows, pooled)

    def grid_of_last(self, x: Tensor) -> Tensor:
        """The coarsest map [B, C, H, W], averaged onto the query grid: [B, L*L, C]."""
        n = self.config.fusion.grid
        return nn.functional.adaptive_avg_pool2d(x, n).flatten(2).transpose(1, 2)

    def read_questions(self, ids: Tensor, mask: Tensor) -> Questions:
        """Token ids [B, Q] and mask of questions -> their states; a row without tokens is no question."""
        asked = mask.any(1)
        safe = mask.clone()
        safe[~asked, :1] = True  # attention over nothing is undefined
        states, vectors = self.sentence(ids, safe)
        return Questions(states, vectors * asked[:, None].to(vectors.dtype), mask)

    def prefill(self, features: Features, tasks: Tensor, questions: Questions | None, expert: Tensor,
                room: int, views: int = 1) -> tuple[Tensor, DecodeState]:  # fmt: skip
        """Run [visual | question | task] of a mixed batch; returns next-token logits and the state to go on.

        tasks: int [B] token ids; expert: int [B] CPU; room: how many answer tokens may follow. With several `views`,
        whose rows are laid out as `encode` gives them, each sequence's logits are the mean of its views' log-softmax.
        """
        x, visible, positions = self.prompt(features, tasks, questions)
        b, t, _ = x.shape
        c = self.config.decoder
        cache = KVCache(c.layers, b, c.kv_heads, t + room, c.width // c.heads, x)
        details = self.details(features)
        mask = prompt_mask(visible, self.visual_tokens)
        hidden = self.decoder(x, positions, mask, expert, features.windows, cache, details)
        seen = torch.ones(b, t + room, dtype=torch.bool, device=x.device)
        seen[:, :t] = visible
        steps = None if details is None else details.steps
        state = DecodeState(cache, seen, positions[:, -1] + 1, expert, views, steps)
        return _agreed(self.decoder.logits(hidden[:, -1]), views), state

    def step(self, tokens: Tensor, state: DecodeState) -> Tensor:
        """One more token of every sequence, int [B] -> next-token logits [B, vocabulary]."""
        x = self.decoder.embed(tokens.repeat(state.views))[:, None]
        mask = state.visible[:, None, None, : state.cache.filled + 1]
        hidden = self.decoder(x, state.position[:, None], mask, state.expert, None, state.cache, state.details)
        state.position = state.position + 1
        return _agreed(self.decoder.logits(hidden[:, -1]), state.views)

    def prompt(self, features: Features, tasks: Tensor, questions: Questions | None) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings [B, T, D], which of them are real [B, T], and their positions [B, T]."""
        b, p = features.visual.shape[:2]
        parts = [features.visual]
        visible = [torch.ones(b, p, dtype=torch.bool, device=tasks.device)]
        if questions is not None:
            states, vectors = questions.states.to(self.queries.dtype), questions.vectors.to(self.queries.dtype)
            parts += [self.question_vector(vectors)[:, None], self.question_states(states)]
            visible += [questions.mask.any(1, keepdim=True), questions.mask]
        parts.append(self.decoder.embed(tasks)[:, None])
        visible.append(torch.ones(b, 1, dtype=torch.bool, device=tasks.device))
        seen = torch.cat(visible, 1)
        return torch.cat(parts, 1), seen, (seen.cumsum(1) - 1).clamp(min=0)  # padding takes no position


def _agreed(logits: Tensor, views: int) -> Tensor:
    """[V B, vocabulary] -> [B, vocabulary]: what the views of each sequence say together."""
    return logits if views == 1 else logits.float().log_softmax(-1).view(views, -1, logits.shape[-1]).mean(0)


def prompt_mask(visible: Tensor, visual: int) -> Tensor:
    """Who may look at whom, bool [B, 1, T, T]: visual tokens at all visual ones, the rest causally.

    A hidden token looks at itself, so that no row is empty.
    """
    t = visible.shape[1]
    place = torch.arange(t, device=visible.device)
    causal = (place[None, :] <= place[:, None]) | ((place[None, :] < visual) & (place[:, None] < visual))
    return (causal & visible[:, None, :] | torch.eye(t, dtype=torch.bool, device=visible.device))[:, None]
