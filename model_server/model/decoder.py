"""The language decoder: blocks of the Llama and Qwen2 family (RMSNorm, RoPE, grouped heads, SwiGLU experts) with MDA
and recurrent visual injection between them. With one expert it computes what Llama and Qwen2 compute.

It works on embeddings; what they stand for (visual tokens, a question, text) is the caller's business.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model_server.model.attention import KVCache, Mask, attend, rotary_table, rotate
from model_server.model.config import DecoderConfig
from model_server.model.experts import build_experts
from model_server.model.fusion import SpatialIntegration, Windows
from model_server.model.injection import Details, Injection, StepDetails


class Block(nn.Module):
    """Pre-norm attention and experts."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        w, self.heads, self.kv_heads = config.width, config.heads, config.kv_heads
        self.head_width = w // config.heads
        kv = self.kv_heads * self.head_width
        self.norm1 = nn.RMSNorm(w, config.norm_eps)
        self.qkv = nn.Linear(w, w + 2 * kv, bias=config.qkv_bias)
        self.out = nn.Linear(w, w, bias=False)
        self.norm2 = nn.RMSNorm(w, config.norm_eps)
        self.experts = build_experts(config)
        self.dropout = config.dropout

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Mask, expert: Tensor,
                cache: KVCache | None, layer: int) -> Tensor:  # fmt: skip
        """x [B, T, W] -> [B, T, W]; mask bool [B, 1, T, S], "causal", or None = look at everything."""
        q, k, v = self._heads(x, rope)
        if cache is not None:
            k, v = cache.write(layer, k, v)
        y = attend(q, k, v, mask).transpose(1, 2).reshape(x.shape)
        x = x + F.dropout(self.out(y), self.dropout, self.training)
        return x + F.dropout(self.experts(self.norm2(x), expert), self.dropout, self.training)

    def remember(self, x: Tensor, rope: tuple[Tensor, Tensor], cache: KVCache, layer: int) -> None:
        """Write the keys and values of x [B, T, W]."""
        _, k, v = self._heads(x, rope)
        cache.write(layer, k, v)

    def _heads(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, heads, T, d]."""
        b, t, w = x.shape
        kv = self.kv_heads * self.head_width
        q, k, v = self.qkv(self.norm1(x)).split([w, kv, kv], -1)
        q, k, v = (y.view(b, t, -1, self.head_width).transpose(1, 2) for y in (q, k, v))
        return rotate(q, *rope), rotate(k, *rope), v


class Decoder(nn.Module):
    """Blocks over embeddings; before chosen layers the visual tokens look at the image again: at its maps (Aquila, MDA)
    or at its detail stacks (FUSE-RSVLM, `inject` names the layers)."""

    def __init__(self, config: DecoderConfig, mda: Mapping[int, SpatialIntegration] | None = None,
                 inject: Sequence[int] = ()) -> None:  # fmt: skip
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.width)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, config.norm_eps)
        self.mda = nn.ModuleDict({str(layer): sfi for layer, sfi in (mda or {}).items()})
        self.inject = nn.ModuleDict({str(layer): Injection(config.width) for layer in inject})
        self.head = None if config.tied else nn.Linear(config.width, config.vocab_size, bias=False)

    def forward(self, x: Tensor, positions: Tensor, mask: Mask, expert: Tensor,
                windows: Windows | None = None, cache: KVCache | None = None,
                details: Details | StepDetails | None = None) -> Tensor:  # fmt: skip
        """Hidden states [B, T, W] of embeddings x [B, T, W] at integer positions [B, T], or [3, B, T] for M-RoPE.

        mask: bool, broadcastable to [B, 1, T, S]; "causal"; or None = look at everything.
        windows, details: given when x begins with the visual tokens, for MDA and injection; on later steps over a cache
        `windows` is None, and so is `details` unless it is what steps see. expert: int [B] on the CPU, each sequence's
        expert row.
        """
        c = self.config
        rope = rotary_table(positions, c.width // c.heads, c.rope_base, c.rope_sections)
        for layer, block in enumerate(self.blocks):
            x = block(self._looked(x, layer, windows, details), rope, mask, expert, cache, layer)
        if cache is not None:
            cache.advance(x.shape[1])
        return self.norm(x)

    def remember(self, x: Tensor, positions: Tensor, mask: Mask, expert: Tensor, windows: Windows | None,
                 cache: KVCache, details: Details | None = None) -> None:  # fmt: skip
        """Fill a cache as `forward` does, where nobody wants hidden states: the last block's own are not made."""
        c = self.config
        rope = rotary_table(positions, c.width // c.heads, c.rope_base, c.rope_sections)
        for layer, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            x = self._looked(x, layer, windows, details)
            if layer == c.layers - 1:
                block.remember(x, rope, cache, layer)
            else:
                x = block(x, rope, mask, expert, cache, layer)
        cache.advance(x.shape[1])

    def _looked(self, x: Tensor, layer: int, windows: Windows | None, details: Details | StepDetails | None) -> Tensor:
        """x after its visual tokens have looked at the image again, where they do so before this layer."""
        if windows is not None and str(layer) in self.mda:
            n = next(iter(windows.values())).shape[1]
            x = torch.cat((self.mda[str(layer)](x[:, :n], windows), x[:, n:]), 1)
        if details is not None and str(layer) in self.inject:
            x = self.inject[str(layer)](x, details)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., W] -> [..., vocabulary]."""
        return F.linear(hidden, self.embed.weight) if self.head is None else self.head(hidden)
