"""Texts packed behind one visual prefix are trained exactly as each would be alone."""

from __future__ import annotations

from pathlib import Path

import torch

from model_server.checkpoints.store import load_checkpoint
from model_server.model.rsvlm import prompt_mask
from model_server.training.language import encode_questions
from model_server.training.packing import IGNORE, pack, packed_hidden
from model_server.training.texts import Text


@torch.no_grad()
def test_packed_texts_equal_each_text_alone(debug_weights: Path) -> None:
    loaded = load_checkpoint(debug_weights)
    model, tokenizer = loaded.model, loaded.tokenizer
    texts = [
        [Text("[CAP]", "", "a river"), Text("[VQA]", "Is there a ship?", "yes"), Text("[VQA]", "How many cars?", "12")],
        [Text("[VQA]", "How many cars?", "3")],
    ]
    bank = encode_questions(model.sentence, loaded.sentence_tokenizer, ["Is there a ship?", "How many cars?"])
    packed = pack(texts, tokenizer, bank, answer_weight=2.0)
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    features = model.encode(images)
    hidden = packed_hidden(model, features, packed, torch.zeros(2, dtype=torch.long))
    for row, group in enumerate(texts):
        for segment, text in enumerate(group):
            at = (packed.segment[row] == segment) & (packed.target[row] != IGNORE)
            answer = [*tokenizer.encode(text.answer), tokenizer.end]
            assert packed.target[row][at].tolist() == answer
            assert set(packed.weight[row][at].tolist()) == {2.0 if text.question else 1.0}
            questions = None
            if text.question:
                encoded = loaded.sentence_tokenizer.encode(text.question)
                ids = torch.tensor([encoded.ids])
                questions = model.read_questions(ids, torch.ones_like(ids, dtype=torch.bool))
            one = features.rows(torch.tensor([row]))
            x, visible, positions = model.prompt(one, torch.tensor([tokenizer.tasks[text.task]]), questions)
            n = len(answer) - 1
            x = torch.cat((x, model.decoder.embed(torch.tensor([answer[:-1]]))), 1)
            positions = torch.cat((positions, positions[:, -1:] + 1 + torch.arange(n)), 1)
            visible = torch.ones(1, x.shape[1], dtype=torch.bool)
            mask = prompt_mask(visible, model.visual_tokens)
            alone = model.decoder(x, positions, mask, torch.tensor([0]), one.windows)[0, -n - 1 :]
            torch.testing.assert_close(hidden[row][at], alone, atol=5e-3, rtol=5e-3)  # questions are kept in half
