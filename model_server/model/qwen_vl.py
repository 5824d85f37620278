"""Qwen2.5-VL with token-wise modulation (FUSAR-GPT): a tower at native size, TLM on its tokens, a decoder with M-RoPE.

One batch may mix images of any sizes, with anchors or without, and plain text; nothing of a request stays on the model
after it. (The published code takes one image at a time and refuses one without anchors.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model_server.model.attention import KVCache
from model_server.model.config import QwenVLConfig
from model_server.model.decoder import Decoder
from model_server.model.greedy import Repetition, follow
from model_server.model.llava import PlaceholderMismatch
from model_server.model.modulation import Anchors, TokenModulation
from model_server.model.qwen_vision import Grid, QwenVision
from model_server.model.rsvlm import DecodeState


@dataclass(frozen=True)
class QwenPrompt:
    """A batch of sequences, padded on the right."""

    embeddings: Tensor  # [B, T, D]
    positions: Tensor  # int [3, B, T]: time, row, column
    real: Tensor  # bool [B, T]


class QwenVLM(nn.Module):
    """Tower, modulation and decoder of one config."""

    def __init__(self, config: QwenVLConfig) -> None:
        super().__init__()
        self.config = config
        width = config.decoder.width
        self.tower = QwenVision(config.vision, width)
        self.modulation = TokenModulation(config.modulation, width) if config.modulation else None
        self.decoder = Decoder(config.decoder)

    def encode(self, patches: Tensor, grids: Sequence[Grid], anchors: Anchors | None = None) -> list[Tensor]:
        """Visual tokens [n, D] of each image: packed patches through the tower, modulated where there are anchors."""
        tokens = self.tower(patches, grids)
        if self.modulation is not None:
            tokens = self.modulation(tokens, grids, anchors)
        return list(tokens.split([h * w // self.config.vision.merge**2 for h, w in grids]))

    def prompt(self, ids: Sequence[Tensor], images: Sequence[Sequence[tuple[Tensor, Grid]]]) -> QwenPrompt:
        """Embed sequences of token ids with the images of each: (tokens, grid), in order of their placeholders.

        ids: int [T] each, with `image_token` once for every visual token.

        Raises:
            PlaceholderMismatch: a sequence's placeholders are not as many as its visual tokens.
        """
        rows, places = [], []
        for row, own in zip(ids, images, strict=True):
            slots = row == self.config.image_token
            count = sum(len(tokens) for tokens, _ in own)
            if int(slots.sum()) != count:
                raise PlaceholderMismatch(f"{int(slots.sum())} image placeholders for {count} visual tokens")
            x = self.decoder.embed(row)
            if own:
                x = x.masked_scatter(slots[:, None], torch.cat([tokens for tokens, _ in own]).to(x.dtype))
            rows.append(x)
            places.append(self._positions(slots, [grid for _, grid in own]))
        length = max(map(len, rows))
        embeddings = torch.stack([F.pad(x, (0, 0, 0, length - len(x))) for x in rows])
        positions = torch.stack([F.pad(p, (0, length - p.shape[1])) for p in places], 1).to(embeddings.device)
        lengths = torch.tensor([len(x) for x in rows], device=embeddings.device)
        return QwenPrompt(embeddings, positions, torch.arange(length, device=embeddings.device) < lengths[:, None])

    def _positions(self, slots: Tensor, grids: Sequence[Grid]) -> Tensor:
        """M-RoPE positions int [3, T]: text counts on in all three parts; an image stands at one time, its tokens at
        their rows and columns from there; what follows comes after the largest of them (Qwen2-VL, section 2.1)."""
        merge = self.config.vision.merge
        cut = slots.tolist()
        parts, at, place = [], 0, 0
        for h, w in grids:
            begin = cut.index(True, at)
            parts.append(torch.arange(place, place + begin - at).expand(3, -1))
            place += begin - at
            h, w = h // merge, w // merge
            rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
            parts.append(place + torch.stack((torch.zeros(h * w, dtype=torch.long), rows.flatten(), columns.flatten())))
            place += max(h, w)
            at = begin + h * w
        parts.append(torch.arange(place, place + len(cut) - at).expand(3, -1))
        return torch.cat(parts, 1)

    def forward(self, prompt: QwenPrompt, cache: KVCache | None = None) -> Tensor:
        """Final hidden states [B, T, D] of a prompt; what stands at padding means nothing."""
        expert = torch.zeros(len(prompt.real), dtype=torch.long)
        # Padding is on the right, so that a causal mask hides it from all that is real.
        return self.decoder(prompt.embeddings, prompt.positions, "causal", expert, cache=cache)

    def prefill(self, prompt: QwenPrompt, room: int) -> tuple[Tensor, DecodeState]:
        """Next-token logits [B, V] and the state to go on with, for `room` more tokens."""
        b, t = prompt.real.shape
        c = self.config.decoder
        cache = KVCache(c.layers, b, c.kv_heads, t + room, c.width // c.heads, prompt.embeddings)
        hidden = self(prompt, cache)
        last = hidden[torch.arange(b, device=hidden.device), prompt.real.sum(1) - 1]
        following = prompt.positions.masked_fill(~prompt.real, 0).amax((0, 2)) + 1  # [B]
        expert = torch.zeros(b, dtype=torch.long)
        seen = F.pad(prompt.real, (0, room), value=True)
        return self.decoder.logits(last), DecodeState(cache, seen, following, expert)

    def step(self, tokens: Tensor, state: DecodeState) -> Tensor:
        """One more token of every sequence, int [B] -> next-token logits [B, V]."""
        x = self.decoder.embed(tokens)[:, None]
        mask = state.visible[:, None, None, : state.cache.filled + 1]
        hidden = self.decoder(x, state.position[None, :, None].expand(3, -1, -1), mask, state.expert, None, state.cache)
        state.position = state.position + 1
        return self.decoder.logits(hidden[:, -1])

    @torch.no_grad()
    def greedy(self, prompt: QwenPrompt, steps: int, end: int | None,
               repetition: Repetition | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The likeliest token at each step: ids [B, S] and their logits [B, S, V]; stops when all rows have ended.

        A row that has ended goes on as `end`.
        """
        logits, state = self.prefill(prompt, steps)
        return follow(self.step, logits, state, steps, end, repetition)
