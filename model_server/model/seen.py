"""What the model keeps of an image between questions: its maps and pooled vector, and its prefixes once needed.

An image is encoded once under all its views. The fusion of the maps and the decoder's visual part are only made when
something is to be written about it, upright or under all views; then the prefix replaces the maps of all views.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from model_server.model.rsvlm import RSVLM, TURNS
from model_server.model.slots import Prefix, visual_prefix


@dataclass(eq=False)
class Seen:
    """One image after encoding; V views, the upright one first."""

    pooled: Tensor  # [1, head], the mean over the views
    maps: dict[int, Tensor]  # stride -> [V, C, H, W]; empty when all views have their prefix
    shown: Tensor | None  # uint8 [V, 3, side, side], where the detail stacks will look at it
    prefixes: dict[int, Prefix] = field(default_factory=dict)  # expert -> prefix of some of the views

    @property
    def nbytes(self) -> int:
        shown = 0 if self.shown is None else self.shown.nbytes
        kept = sum(m.nbytes for m in self.maps.values()) + sum(p.nbytes for p in self.prefixes.values())
        return self.pooled.nbytes + shown + kept

    def prefix(self, expert: int, views: int) -> Prefix | None:
        """Under the first `views` views, where it was made."""
        found = self.prefixes.get(expert)
        return found.first(views) if found is not None and found.keys.shape[2] >= views else None

    def keep(self, prefix: Prefix, last: bool) -> None:
        """`last`: nothing else will be made of the maps."""
        self.prefixes[prefix.expert] = prefix
        if last:
            self.maps, self.shown = {}, None


def see(model: RSVLM, images: Tensor) -> list[Seen]:
    """Encode uint8 images [B, 3, side, side]."""
    b, views = len(images), model.config.views
    turned = torch.cat([images, *(turn(images) for turn in TURNS[: views - 1])])  # view by view
    maps, pooled = model.backbone(turned)
    means = pooled.view(views, b, -1).mean(0)
    stacks = model.config.stacks
    strides = {*model.config.fusion.strides, max(maps), *(stacks.strides if stacks else ())}
    # Copies, as a view would keep the maps of the whole batch in memory.
    return [
        Seen(
            means[i : i + 1].clone(),
            {s: maps[s][i::b].clone() for s in strides},
            turned[i::b].clone() if stacks else None,
        )
        for i in range(b)
    ]


def prefixes(model: RSVLM, seen: Sequence[Seen], views: int, expert: int) -> list[Prefix]:
    """The prefix of each image under its first `views` views; those not there yet are made together and kept."""
    missing = list({id(one): one for one in seen if one.prefix(expert, views) is None}.values())
    if missing:
        maps = {s: torch.cat([one.maps[s][:views] for one in missing]) for s in missing[0].maps}
        features = model.fuse(maps, torch.cat([one.pooled for one in missing]).repeat_interleave(views, 0))
        shown = [one.shown[:views] for one in missing if one.shown is not None]
        if shown:
            model.add_details(features, maps, torch.cat(shown))
        for one, prefix in zip(missing, visual_prefix(model, features, expert).split(views), strict=True):
            one.keep(prefix, last=views == model.config.views and len(model.config.decoder.experts) == 1)
    return [found for one in seen if (found := one.prefix(expert, views)) is not None]
