"""SFI as oneDNN runs it fastest: one packed projection in front of the windows, and one behind them.

What a query becomes before it meets the windows is linear, and so is what the gathered maps become afterwards: the
projections of all scales are one matrix each, with those of the query, its places and its scale multiplied in. The
function is the same up to rounding; the result can neither be trained nor saved.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from model_server.model.fusion import SpatialIntegration, Windows
from model_server.model.packed import PackedLinear
from model_server.model.rsvlm import RSVLM


class PackedIntegration(nn.Module):
    """What a `SpatialIntegration` computes.

    A scale's scores are `windows (W_k^T q) + p q` with `q = (W_q x + b) / sqrt(D)`: rows `W_k^T W_q` and `p W_q`. Its
    share of the result is `W_v (a windows) + sum(a) b_v`: columns `W_v` and `b_v`.
    """

    def __init__(self, sfi: SpatialIntegration) -> None:
        super().__init__()
        self.norm = sfi.norm
        self.strides = [int(s) for s in sfi.keys]
        asked, told, biases = [], [], []
        for s in sfi.keys:
            key, value = sfi.keys[s], sfi.values[s]
            assert isinstance(key, nn.Linear)
            assert isinstance(value, nn.Linear)
            asked += [key.weight.float().T, sfi.places[s].float()]
            told.append(value.weight)
            biases.append(value.bias)
        self.sizes = [len(rows) for rows in asked]
        ask = torch.cat(asked) / math.sqrt(sfi.width)  # [sum of C_s + K_s, D]
        dtype = sfi.query.weight.dtype
        self.ask = PackedLinear((ask @ sfi.query.weight.float()).to(dtype), (ask @ sfi.query.bias.float()).to(dtype))
        self.tell = PackedLinear(torch.cat((*told, torch.stack(biases, 1)), 1))

    def forward(self, x: Tensor, windows: Windows) -> Tensor:
        """x [B, L*L, D], windows {stride: [B, L*L, K_s, C_s]} -> [B, L*L, D]."""
        asked = self.ask(self.norm(x)).split(self.sizes, -1)
        scores = [
            (windows[s] @ query[..., None])[..., 0] + places
            for s, query, places in zip(self.strides, asked[::2], asked[1::2], strict=True)
        ]
        weights = torch.cat(scores, -1).softmax(-1).split(self.sizes[1::2], -1)
        gathered = [(a[..., None, :] @ windows[s])[..., 0, :] for s, a in zip(self.strides, weights, strict=True)]
        return x + self.tell(torch.cat([*gathered, *(a.sum(-1, keepdim=True) for a in weights)], -1))


@torch.no_grad()
def pack_fusion(model: RSVLM) -> None:
    """Pack SFI and what it starts from, and MDA, in place."""
    if isinstance(model.from_last, nn.Linear):
        model.add_module("from_last", PackedLinear(model.from_last.weight, model.from_last.bias))
    if model.sfi is not None:
        model.add_module("sfi", PackedIntegration(model.sfi))
    shared = {sfi: PackedIntegration(sfi) for sfi in model.decoder.mda.values() if isinstance(sfi, SpatialIntegration)}
    for layer, sfi in model.decoder.mda.items():
        model.decoder.mda[layer] = shared[sfi] if isinstance(sfi, SpatialIntegration) else sfi
