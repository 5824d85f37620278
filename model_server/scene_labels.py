"""Which scene a pooled image is, over the taxonomy or over any list of labels, and what is surely to be seen in it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model_server.model.rsvlm import RSVLM
from model_server.protocol import TileClasses
from model_server.sentences import Sentences
from model_server.text.names import readable

SURE = 0.8  # what a full description names


class SceneLabels:
    """The heads of a model with the names that it learned; `temperature` is the calibration's."""

    def __init__(self, model: RSVLM, sentences: Sentences) -> None:
        self._heads, self._config, self._sentences = model.heads, model.config, sentences
        self._merged = dict(model.config.merged_labels)
        self.taxonomy = tuple(name for name in model.config.labels if name not in self._merged)

    def classes(self, pooled: Tensor, labels: tuple[str, ...], temperature: float) -> list[TileClasses]:
        """Each row of pooled [B, head] over one list of labels; none = the taxonomy."""
        scores = self._scores(pooled, labels or self.taxonomy, temperature, merge=not labels)
        return [TileClasses(labels=list(labels or self.taxonomy), scores=row) for row in scores]

    def findings(self, pooled: Tensor, temperature: float) -> list[str]:
        """Sentences on the scene and the objects of an image, pooled [1, head], that the heads are sure of."""
        scores = self._scores(pooled, self.taxonomy, temperature, merge=True)[0]
        best = max(range(len(scores)), key=scores.__getitem__)
        seen = self._heads.objects(pooled).sigmoid()[0].tolist()
        objects = [name for name, p in zip(self._config.objects, seen, strict=True) if p >= SURE]
        out = [f"The scene looks like {self.taxonomy[best]}."] if scores[best] >= SURE else []
        return [*out, f"Visible: {', '.join(objects)}."] if objects else out

    def _scores(self, pooled: Tensor, labels: Sequence[str], temperature: float, merge: bool) -> list[list[float]]:
        """Probabilities [B, N] over a list of labels; `merge` adds what near-synonyms of the taxonomy got."""
        merged = self._merged if merge else {}
        names = [*labels, *merged]
        row = {name: i for i, name in enumerate(self._config.labels)}
        known = torch.tensor([row.get(readable(name), -1) for name in names], device=pooled.device)
        logits = self._heads.label_logits(pooled, self._sentences.vectors(names), known)
        probabilities = (logits / temperature).softmax(-1)
        out = probabilities[:, : len(labels)].clone()
        for i, name in enumerate(merged, start=len(labels)):
            out[:, list(labels).index(merged[name])] += probabilities[:, i]
        return out.tolist()
