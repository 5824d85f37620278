"""Image-level heads on the pooled vector: the contrastive dual encoder, scene labels, objects, caption words.

The dual encoder (the survey's first mechanism) puts an image and a sentence into one space. A label's logit is
its similarity there plus, for labels that the model learned by name, a linear term; training drops that term
for some labels at random, so that learned and new labels can be compared in one list.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ImageHeads(nn.Module):
    """Everything that is read off the pooled vector [B, P]."""

    def __init__(self, pooled: int, sentence: int, width: int, labels: int, objects: int, concepts: int) -> None:
        super().__init__()
        self.image = nn.Linear(pooled, width)
        self.sentence = nn.Linear(sentence, width)
        self.scale = nn.Parameter(torch.tensor(2.7))  # log of the similarity's factor, e^2.7 = 15
        self.labels = nn.Linear(pooled, labels)
        self.objects = nn.Linear(pooled, objects)
        self.concepts = nn.Linear(pooled, concepts)
        nn.init.normal_(self.labels.weight, std=0.01)
        nn.init.constant_(self.concepts.bias, -4.0)  # most words are absent from most captions

    def image_vectors(self, pooled: Tensor) -> Tensor:  # [B, P] -> unit [B, E]
        return F.normalize(self.image(pooled), dim=-1)

    def sentence_vectors(self, sentences: Tensor) -> Tensor:  # [N, S] -> unit [N, E]
        return F.normalize(self.sentence(sentences), dim=-1)

    def similarity(self, pooled: Tensor, sentences: Tensor) -> Tensor:
        """Scaled cosine similarity of images [B, P] and sentence vectors [N, S] -> [B, N]."""
        return self.scale.exp() * self.image_vectors(pooled) @ self.sentence_vectors(sentences).T

    def label_logits(self, pooled: Tensor, sentences: Tensor, known: Tensor, keep: Tensor | None = None) -> Tensor:
        """Logits [B, N] of N labels given as sentence vectors [N, S].

        known: int [N], the label's row in the learned table or -1. keep: bool [N], False drops the learned term.
        """
        learned = known >= 0
        if keep is not None:
            learned = learned & keep
        table = self.labels(pooled)[:, known.clamp(min=0)]  # [B, N]
        return self.similarity(pooled, sentences) + torch.where(learned, table, torch.zeros_like(table))
