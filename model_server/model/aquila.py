"""Aquila (arXiv 2411.06074): a ConvNeXt pyramid, SFI and a decoder with MDA. No code and no weights are published.

Where the paper is silent, this was chosen: an image's tokens stand before the text (so that MDA finds them), seen
causally as any other token; SFI runs at the projectors' width and one linear layer lifts its tokens to the decoder's;
MDA's queries come from the decoder's hidden states and meet the keys at the projectors' width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model_server.model.attention import KVCache
from model_server.model.config import AquilaConfig
from model_server.model.decoder import Decoder
from model_server.model.fusion import MapWindows, SpatialIntegration, Windows
from model_server.model.greedy import follow
from model_server.model.pyramid import ConvNeXtPyramid
from model_server.model.rsvlm import DecodeState


@dataclass(frozen=True)
class Scenes:
    """Encoded images, one a sequence."""

    tokens: Tensor  # [B, L*L, D]
    windows: Windows  # stride -> [B, L*L, k_s*k_s, C], for MDA


@dataclass(frozen=True)
class ScenePrompt:
    """Sequences of an image and its text, padded on the right."""

    embeddings: Tensor  # [B, T, D]
    lengths: Tensor  # int [B]
    windows: Windows


class AquilaVLM(nn.Module):
    """Pyramid, projectors, SFI and decoder of one config."""

    def __init__(self, config: AquilaConfig) -> None:
        super().__init__()
        fusion, width = config.fusion, config.decoder.width
        cell = max(fusion.strides) * fusion.grid
        if config.image_size % cell:
            raise ValueError(f"image_size must be a multiple of {cell} (stride times grid); it is {config.image_size}")
        self.config = config
        inner = fusion.width or width
        self.backbone = ConvNeXtPyramid(config.backbone)
        self.projectors = nn.ModuleDict(
            {
                str(s): nn.Sequential(nn.Linear(self.backbone.widths[s], inner), nn.GELU(), nn.Linear(inner, inner))
                for s in fusion.strides
            }
        )
        widths = dict.fromkeys(fusion.strides, inner)
        keys = {s: (config.image_size // s // fusion.grid) ** 2 for s in fusion.strides}
        self.cut = MapWindows(widths, fusion.grid)
        self.queries = nn.Parameter(torch.randn(fusion.grid**2, inner) * 0.02)
        self.sfi = SpatialIntegration(widths, keys, inner) if fusion.sfi else None
        self.lift = nn.Linear(inner, width)
        mda = SpatialIntegration.repeated(
            fusion.mda_layers, lambda: SpatialIntegration(widths, keys, width, inner), fusion.mda_shared
        )
        self.decoder = Decoder(config.decoder, mda)

    def encode(self, images: Tensor) -> Scenes:
        """Normalised pixels, float [B, 3, S, S] of the config's size."""
        maps = self.backbone(images)
        projected = {
            int(s): project(maps[int(s)].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            for s, project in self.projectors.items()
        }
        windows = self.cut(projected)
        x = self.queries.expand(len(images), -1, -1)
        return Scenes(self.lift(x if self.sfi is None else self.sfi(x, windows)), windows)

    def prompt(self, scenes: Scenes, ids: Sequence[Tensor]) -> ScenePrompt:
        """Put the text (token ids, int [T]) of each sequence behind its image."""
        n = scenes.tokens.shape[1]
        lengths = torch.tensor([n + len(row) for row in ids], device=scenes.tokens.device)
        text = nn.utils.rnn.pad_sequence([self.decoder.embed(row) for row in ids], batch_first=True)
        return ScenePrompt(torch.cat((scenes.tokens, text), 1), lengths, scenes.windows)

    def forward(self, prompt: ScenePrompt, expert: Tensor, cache: KVCache | None = None) -> Tensor:
        """Final hidden states [B, T, D]; what stands at padding means nothing. expert: int [B], CPU."""
        x = prompt.embeddings
        positions = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
        return self.decoder(x, positions, "causal", expert, prompt.windows, cache)

    def prefill(self, prompt: ScenePrompt, expert: Tensor, room: int) -> tuple[Tensor, DecodeState]:
        """Next-token logits [B, V] and the state to go on with, for `room` more tokens."""
        b, t, _ = prompt.embeddings.shape
        c = self.config.decoder
        cache = KVCache(c.layers, b, c.kv_heads, t + room, c.width // c.heads, prompt.embeddings)
        hidden = self(prompt, expert, cache)
        last = hidden[torch.arange(b, device=hidden.device), prompt.lengths - 1]
        real = torch.arange(t, device=hidden.device) < prompt.lengths[:, None]
        return self.decoder.logits(last), DecodeState(cache, F.pad(real, (0, room), value=True), prompt.lengths, expert)

    def step(self, tokens: Tensor, state: DecodeState) -> Tensor:
        """One more token of every sequence, int [B] -> next-token logits [B, V]."""
        x = self.decoder.embed(tokens)[:, None]
        mask = state.visible[:, None, None, : state.cache.filled + 1]
        hidden = self.decoder(x, state.position[:, None], mask, state.expert, None, state.cache)
        state.position = state.position + 1
        return self.decoder.logits(hidden[:, -1])

    @torch.no_grad()
    def greedy(self, prompt: ScenePrompt, expert: Tensor, steps: int, end: int | None) -> tuple[Tensor, Tensor]:
        """The likeliest token at each step: ids [B, S] and their logits [B, S, V]."""
        logits, state = self.prefill(prompt, expert, steps)
        return follow(self.step, logits, state, steps, end)
