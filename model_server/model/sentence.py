"""The sentence encoder: a BERT body whose mean-pooled output places phrases of near meaning close together.

In `nano` it is MiniLM-L6 (all-MiniLM-L6-v2, Apache-2.0), frozen. Questions reach the decoder as its token
states, labels and phrases as its sentence vectors, so that words never seen with an image are understood.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model_server.model.config import SentenceConfig


class SentenceLayer(nn.Module):
    """Post-norm transformer layer (Devlin et al. 2018)."""

    def __init__(self, config: SentenceConfig) -> None:
        super().__init__()
        w = config.width
        self.heads = config.heads
        self.qkv = nn.Linear(w, 3 * w)
        self.out = nn.Linear(w, w)
        self.norm1 = nn.LayerNorm(w, eps=1e-12)
        self.up = nn.Linear(w, config.ffn)
        self.down = nn.Linear(config.ffn, w)
        self.norm2 = nn.LayerNorm(w, eps=1e-12)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:  # x [B, T, W], bias [B, 1, 1, T]
        b, t, w = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # each [B, heads, T, W/heads]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        x = self.norm1(x + self.out(y.transpose(1, 2).reshape(b, t, w)))
        return self.norm2(x + self.down(F.gelu(self.up(x))))


class SentenceEncoder(nn.Module):
    """Token ids to token states and one unit vector a sentence."""

    def __init__(self, config: SentenceConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.width)
        self.positions = nn.Embedding(config.max_tokens, config.width)
        self.norm = nn.LayerNorm(config.width, eps=1e-12)
        self.layers = nn.ModuleList(SentenceLayer(config) for _ in range(config.layers))

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """ids int [B, T], mask bool [B, T] (True = token) -> states [B, T, W], unit sentence vectors [B, W]."""
        places = torch.arange(ids.shape[1], device=ids.device)
        x = self.norm(self.tokens(ids) + self.positions(places))
        bias = torch.zeros(mask.shape, dtype=x.dtype, device=x.device).masked_fill(~mask, torch.finfo(x.dtype).min)
        for layer in self.layers:
            x = layer(x, bias[:, None, None, :])
        weight = mask[..., None].to(x.dtype)
        pooled = (x * weight).sum(1) / weight.sum(1).clamp(min=1)
        return x, F.normalize(pooled, dim=-1)
