"""Texts through the sentence encoder, each once: a question about all tiles of a scene is one text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from model_server.batching.feature_cache import ByteCache
from model_server.model.rsvlm import RSVLM, Questions
from model_server.text.names import readable

KEPT_BYTES = 32 * 2**20


@dataclass(frozen=True)
class _Text:
    states: Tensor  # [Q, S]
    vector: Tensor  # [S], zero where the text has no token


class Sentences:
    """The sentence encoder of a model with what it read last. `tokenizer` truncates and pads."""

    def __init__(self, model: RSVLM, tokenizer: Tokenizer) -> None:
        self._model, self._tokenizer = model, tokenizer
        self.cache: ByteCache[_Text] = ByteCache(KEPT_BYTES)

    def vectors(self, texts: Sequence[str]) -> Tensor:
        """Unit sentence vectors [N, S]."""
        read = self._read(texts)
        return torch.stack([read[text].vector for text in texts])

    def questions(self, texts: Sequence[str]) -> Questions:
        """As the decoder takes them, padded to the longest."""
        read = self._read(texts)
        lengths = torch.tensor([len(read[text].states) for text in texts])
        states = pad_sequence([read[text].states for text in texts], batch_first=True)
        mask = torch.arange(states.shape[1])[None] < lengths[:, None]
        return Questions(states, torch.stack([read[text].vector for text in texts]), mask.to(states.device))

    def _read(self, texts: Sequence[str]) -> dict[str, _Text]:
        found = {text: self.cache.get(text) for text in dict.fromkeys(texts)}
        missing = [text for text, known in found.items() if known is None]
        read = {text: known for text, known in found.items() if known is not None}
        if missing:
            encoded = self._tokenizer.encode_batch([readable(text) for text in missing])
            device = self._model.queries.device
            ids = torch.tensor([e.ids for e in encoded], device=device)
            mask = torch.tensor([e.attention_mask for e in encoded], device=device).bool()
            asked = self._model.read_questions(ids, mask)
            for i, text in enumerate(missing):
                read[text] = one = _Text(asked.states[i, mask[i]].clone(), asked.vectors[i].clone())
                self.cache.put(text, one, one.states.nbytes + one.vector.nbytes)
        return read
