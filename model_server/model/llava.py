"""LLaVA-style models (RSUniVLM, MF-RSVLM): a tower's tokens, projected, stand in the decoder's sequence.

One batch may mix granularities, images and plain text: rows are padded on the right, each has its own expert, and
nothing of a request stays on the model after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model_server.model.attention import KVCache
from model_server.model.config import LlavaConfig
from model_server.model.decoder import Decoder
from model_server.model.greedy import Repetition, follow
from model_server.model.injection import Details
from model_server.model.merging import merge_tiles
from model_server.model.rsvlm import DecodeState
from model_server.model.vit import VisionTransformer
from model_server.model.windows import canvas_of, detail_stacks, global_view, plan

IMAGE = -200  # stands in a prompt's ids where an image belongs


class PlaceholderMismatch(ValueError):
    """A prompt has another number of image placeholders than images."""


@dataclass(frozen=True)
class ImageTokens:
    """An encoded image: its tokens as they stand in the sequence, and its detail stacks if the model has any."""

    tokens: Tensor  # [V, D]
    stacks: Tensor | None  # [K, V, D]


@dataclass(frozen=True)
class Prompt:
    """A batch of sequences, padded on the right."""

    embeddings: Tensor  # [B, T, D]
    real: Tensor  # bool [B, T]
    details: Details | None


class LlavaVLM(nn.Module):
    """A vision tower, a projector and a decoder."""

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__()
        if (config.inject_layers or config.inject_steps) and config.details is None:
            raise ValueError("injection needs details: there is nothing to inject without the detail view")
        if config.details is not None:
            plan(config.details, config.vision)  # refuses windows that do not fit, before anything is loaded
        self.config = config
        width = config.decoder.width
        self.tower = VisionTransformer(config.vision)
        self.projector = nn.Sequential(nn.Linear(config.vision.width, width), nn.GELU(), nn.Linear(width, width))
        self.newline = nn.Parameter(torch.randn(width) * width**-0.5) if config.merge.newline else None
        self.decoder = Decoder(config.decoder, inject=config.inject_layers)

    def encode(
        self, images: Sequence[Tensor], sizes: Sequence[tuple[int, int] | None] | None = None
    ) -> list[ImageTokens]:
        """Encode images in one batch.

        images: normalised pixels, each [T, 3, H, W]: an image's overview and tiles, or the pictures of one prompt.
        sizes: (width, height) of each image before tiling, where tiles are merged.
        """
        counts = [len(image) for image in images]
        details = self.config.details
        views = torch.cat([image if details is None else global_view(image, details) for image in images])
        feature = self.config.feature
        tokens = self.projector(self.tower(views, (feature,))[feature]).split(counts)  # each [T, N, D]
        merge, wanted = self.config.merge, sizes or [None] * len(images)
        merged = [merge_tiles(t, s, merge, self.newline) for t, s in zip(tokens, wanted, strict=True)]
        if details is None:
            return [ImageTokens(t, None) for t in merged]
        canvas = torch.cat([canvas_of(image, details.canvas) for image in images])
        stacks = self.projector(detail_stacks(self.tower, canvas, details)).split(counts)  # each [T, K, N, D]
        return [ImageTokens(t, s.transpose(0, 1).flatten(1, 2)) for t, s in zip(merged, stacks, strict=True)]

    def prompt(self, ids: Sequence[Tensor], images: Sequence[Sequence[ImageTokens]]) -> Prompt:
        """Embed sequences of token ids (int [T], `IMAGE` for each image) with the images of each.

        Raises:
            PlaceholderMismatch: a sequence's images are not as many as its placeholders.
        """
        # As published: what is text alone is not cut.
        most = self.config.merge.context if any(images) else None
        rows = [self._row(i, own)[:most] for i, own in zip(ids, images, strict=True)]
        length = max(len(row) for row in rows)
        embeddings = torch.stack([F.pad(row, (0, 0, 0, length - len(row))) for row in rows])
        lengths = torch.tensor([len(row) for row in rows], device=embeddings.device)
        real = torch.arange(length, device=embeddings.device) < lengths[:, None]
        return Prompt(embeddings, real, self._details(images, embeddings))

    def _row(self, ids: Tensor, images: Sequence[ImageTokens]) -> Tensor:
        places = (ids == IMAGE).nonzero()[:, 0].tolist()
        text = self.decoder.embed(ids[ids != IMAGE])
        if self.config.merge.visual_first:
            if bool(places) != bool(images):
                raise PlaceholderMismatch(f"{len(places)} image placeholders for {len(images)} images")
            row = torch.cat((*(image.tokens for image in images), text))
        else:
            if len(places) != len(images):
                raise PlaceholderMismatch(f"{len(places)} image placeholders for {len(images)} images")
            ends = [place - i for i, place in enumerate(places)]  # in the ids without placeholders
            cuts = text.tensor_split(ends)
            row = torch.cat([cuts[0], *(x for i, c in zip(images, cuts[1:], strict=True) for x in (i.tokens, c))])
        return row

    def _details(self, images: Sequence[Sequence[ImageTokens]], like: Tensor) -> Details | None:
        stacks = {
            row: torch.cat([i.stacks for i in own if i.stacks is not None], 1)
            for row, own in enumerate(images)
            if own and own[0].stacks is not None
        }
        if not stacks:
            return None
        longest = max(s.shape[1] for s in stacks.values())
        lengths = torch.tensor([s.shape[1] for s in stacks.values()], device=like.device)
        return Details(
            torch.tensor(list(stacks), device=like.device),
            torch.stack([F.pad(s, (0, 0, 0, longest - s.shape[1])) for s in stacks.values()]),
            torch.arange(longest, device=like.device) < lengths[:, None],
            len(images),
            self.config.inject_steps,
        )

    def forward(self, prompt: Prompt, expert: Tensor, cache: KVCache | None = None) -> Tensor:
        """Final hidden states [B, T, D] of a prompt; what stands at padding means nothing. expert: int [B], CPU."""
        positions = torch.arange(prompt.real.shape[1], device=prompt.real.device).expand(prompt.real.shape)
        # Padding is on the right, so that a causal mask hides it from all that is real.
        return self.decoder(prompt.embeddings, positions, "causal", expert, cache=cache, details=prompt.details)

    def prefill(self, prompt: Prompt, expert: Tensor, room: int) -> tuple[Tensor, DecodeState]:
        """Next-token logits [B, V] and the state to go on with, for `room` more tokens."""
        b, t = prompt.real.shape
        c = self.config.decoder
        cache = KVCache(c.layers, b, c.kv_heads, t + room, c.width // c.heads, prompt.embeddings)
        hidden = self(prompt, expert, cache)
        lengths = prompt.real.sum(1)
        last = hidden[torch.arange(b, device=hidden.device), lengths - 1]
        seen = F.pad(prompt.real, (0, room), value=True)
        steps = None if prompt.details is None else prompt.details.steps
        return self.decoder.logits(last), DecodeState(cache, seen, lengths, expert, details=steps)

    def step(self, tokens: Tensor, state: DecodeState) -> Tensor:
        """One more token of every sequence, int [B] -> next-token logits [B, V]."""
        x = self.decoder.embed(tokens)[:, None]
        mask = state.visible[:, None, None, : state.cache.filled + 1]
        hidden = self.decoder(
            x, state.position[:, None], mask, state.expert, cache=state.cache, details=state.details
        )  # fmt: skip
        state.position = state.position + 1
        return self.decoder.logits(hidden[:, -1])

    @torch.no_grad()
    def greedy(self, prompt: Prompt, expert: Tensor, steps: int, end: int | None,
               repetition: Repetition | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The likeliest token at each step: ids [B, S] and their logits [B, S, V]; stops when all rows have ended.

        A row that has ended goes on as `end`.
        """
        logits, state = self.prefill(prompt, expert, steps)
        return follow(self.step, logits, state, steps, end, repetition)
