"""Several texts behind one visual prefix: a training sequence and its mask.

Each text [question | task token | answer] sees the visual tokens and itself, never its neighbours, and its positions
begin after the visual ones, exactly as if it stood alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model_server.model.rsvlm import RSVLM, Features
from model_server.text.tokenizer import TextTokenizer
from model_server.training.texts import Text

IGNORE = -100


@dataclass
class EncodedQuestion:
    """States [Q, S] and vector [S] of one question, from the frozen sentence encoder (half precision)."""

    states: Tensor
    vector: Tensor


@dataclass
class Packed:
    """Texts of B images, padded to L places."""

    ids: Tensor  # int [B, L], token ids; padding elsewhere
    states: Tensor  # [B, L, S], question token states where `is_state`
    is_state: Tensor  # bool [B, L]
    is_vector: Tensor  # bool [B, L], the place of the sentence vector (kept in `states`)
    segment: Tensor  # int [B, L], which text; -1 padding
    position: Tensor  # int [B, L], counted from the end of the visual part
    target: Tensor  # int [B, L], the next token, or IGNORE
    weight: Tensor  # float [B, L]


def pack(texts: Sequence[Sequence[Text]], tokenizer: TextTokenizer, questions: Mapping[str, EncodedQuestion],
         answer_weight: float) -> Packed:  # fmt: skip
    """Lay the texts of each image one behind the other."""
    width = next((q.vector.shape[0] for q in questions.values()), 1)
    rows = []
    for group in texts:
        cells = []  # (id, kind, state, segment, position, target, weight)
        for s, text in enumerate(group):
            place = 0
            if text.question:
                q = questions[text.question]
                cells.append((tokenizer.pad, 1, q.vector, s, place, IGNORE, 0.0))
                for i in range(len(q.states)):
                    cells.append((tokenizer.pad, 2, q.states[i], s, place + 1 + i, IGNORE, 0.0))
                place += 1 + len(q.states)
            answer = [*tokenizer.encode(text.answer), tokenizer.end]
            weight = answer_weight if text.question else 1.0
            for i, (token, target) in enumerate(zip([tokenizer.tasks[text.task], *answer], answer, strict=False)):
                cells.append((token, 0, None, s, place + i, target, weight))
        rows.append(cells)
    b, length = len(rows), max(max(map(len, rows)), 1)
    out = Packed(
        ids=torch.full((b, length), tokenizer.pad), states=torch.zeros(b, length, width),
        is_state=torch.zeros(b, length, dtype=torch.bool), is_vector=torch.zeros(b, length, dtype=torch.bool),
        segment=torch.full((b, length), -1), position=torch.zeros(b, length, dtype=torch.long),
        target=torch.full((b, length), IGNORE), weight=torch.zeros(b, length),
    )  # fmt: skip
    for r, cells in enumerate(rows):
        n = len(cells)
        if not n:
            continue
        ids, kinds, states, segments, positions, targets, weights = zip(*cells, strict=True)
        kind = torch.tensor(kinds)
        out.ids[r, :n], out.segment[r, :n] = torch.tensor(ids), torch.tensor(segments)
        out.position[r, :n], out.target[r, :n] = torch.tensor(positions), torch.tensor(targets)
        out.weight[r, :n] = torch.tensor(weights)
        out.is_vector[r, :n], out.is_state[r, :n] = kind == 1, kind == 2
        given = [s for s in states if s is not None]
        if given:
            out.states[r, :n][kind > 0] = torch.stack(given).float()
    return out


def packed_hidden(model: RSVLM, features: Features, packed: Packed, expert: Tensor) -> Tensor:
    """Hidden states [B, L, D] of the packed texts behind their images."""
    text = model.decoder.embed(packed.ids)
    text = torch.where(packed.is_state[..., None], model.question_states(packed.states).to(text.dtype), text)
    text = torch.where(packed.is_vector[..., None], model.question_vector(packed.states).to(text.dtype), text)
    visual = features.visual
    p = visual.shape[1]
    x = torch.cat((visual, text.to(visual.dtype)), 1)
    positions = torch.cat((torch.arange(p).expand(x.shape[0], p), packed.position + p), 1)
    mask = packed_mask(packed.segment, p)
    hidden = model.decoder(x, positions, mask, expert, features.windows, details=model.details(features))
    return hidden[:, p:]


def packed_mask(segment: Tensor, visual: int) -> Tensor:
    """bool [B, 1, P+L, P+L]: visual sees visual; a text sees visual and, causally, itself."""
    b, length = segment.shape
    t = visual + length
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    own = (segment[:, :, None] == segment[:, None, :]) & (segment >= 0)[:, None, :] & causal
    mask = torch.zeros(b, t, t, dtype=torch.bool)
    mask[:, :, :visual] = True
    mask[:, visual:, visual:] = own | torch.eye(length, dtype=torch.bool)
    return mask[:, None]
