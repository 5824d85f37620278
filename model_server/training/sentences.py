"""Sentence vectors of labels and captions, computed once: the sentence encoder is frozen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from model_server.model.config import ModelConfig
from model_server.model.sentence import SentenceEncoder
from model_server.training.records import Record
from model_server.training.start import sentence_parts
from model_server.training.targets import Vocabulary


@torch.no_grad()
def sentence_vectors(encoder: SentenceEncoder, tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
    """Unit vectors [N, S]; sorted by length inside, so that batches waste little padding."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    out = torch.zeros(len(texts), encoder.tokens.embedding_dim)
    for i in range(0, len(order), 256):
        rows = order[i : i + 256]
        encoded = tokenizer.encode_batch([texts[r] for r in rows])
        ids = torch.tensor([e.ids for e in encoded])
        mask = torch.tensor([e.attention_mask for e in encoded]).bool()
        out[rows] = encoder(ids, mask)[1]
    return out


@dataclass(frozen=True)
class SentenceBank:
    """Vectors of every label and of every distinct training caption, and which captions belong to which image."""

    label_vectors: Tensor  # [labels, S]
    caption_vectors: Tensor  # [captions, S]
    rows: list[list[int]]  # per image, rows of caption_vectors

    @classmethod
    def build(cls, config: ModelConfig, records: Sequence[Record], vocabulary: Vocabulary) -> SentenceBank:
        encoder, tokenizer = sentence_parts(config)
        captions = sorted({c for r in records for c in r.captions})
        row = {c: i for i, c in enumerate(captions)}
        return cls(
            sentence_vectors(encoder, tokenizer, vocabulary.labels),
            sentence_vectors(encoder, tokenizer, captions or [""]),
            [[row[c] for c in r.captions] for r in records],
        )

    def sample(self, images: np.ndarray, rng: np.random.Generator) -> Tensor:
        """One random caption vector for each image [B, S]; zeros where it has none."""
        out = torch.zeros(len(images), self.caption_vectors.shape[1])
        for i, image in enumerate(images):
            if self.rows[image]:
                out[i] = self.caption_vectors[self.rows[image][int(rng.integers(len(self.rows[image])))]]
        return out
