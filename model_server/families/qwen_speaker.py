"""A loaded Qwen2.5-VL, modulated or plain, with its tokenizer, chat template and image processing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from model_server.checkpoints.adapters.fusar_inputs import WIDTH, PromptWriter, cut_patches
from model_server.families.asking import Ask, Said
from model_server.families.seen import SeenPictures, Shown
from model_server.families.speaking import greedy, weigh
from model_server.families.words import Words
from model_server.model.modulation import Anchors
from model_server.model.qwen_vision import Grid
from model_server.model.qwen_vl import QwenPrompt, QwenVLM

ROWS = 4  # messages answered together, and pictures encoded together
Size = Callable[[int, int], tuple[int, int]]  # width and height of a picture -> those at which it is looked at


class QwenSpeaker:
    """Answers messages about one picture each in one batch.

    context: positions the decoder was trained for; what is said ends there.
    """

    def __init__(self, model: QwenVLM, words: Words, writer: PromptWriter, size: Size, context: int) -> None:
        self.model, self.words, self.writer, self.size, self.context = model, words, writer, size, context
        self._seen: SeenPictures[tuple[Tensor, Grid]] = SeenPictures(_bytes)
        weight = model.decoder.embed.weight
        self.device, self.dtype = weight.device, weight.dtype
        self.precision = str(weight.dtype).removeprefix("torch.")

    @torch.inference_mode()
    def say(self, asks: Sequence[Ask]) -> list[Said]:
        said: dict[int, Said] = {}
        free = [i for i, ask in enumerate(asks) if not ask.options]
        free.sort(key=lambda i: asks[i].steps)  # those that say much do not keep the others waiting
        for start in range(0, len(free), ROWS):
            group = free[start : start + ROWS]
            said.update(zip(group, self._speak([asks[i] for i in group]), strict=True))
        said.update({i: self._weigh(ask) for i, ask in enumerate(asks) if ask.options})
        return [said[i] for i in range(len(asks))]

    def _speak(self, asks: Sequence[Ask]) -> list[Said]:
        prompt = self._prompt(asks)
        steps = max(1, min(max(ask.steps for ask in asks), self.context - prompt.real.shape[1]))
        logits, state = self.model.prefill(prompt, steps)
        found = greedy(self.model.step, logits, state, steps, sorted(self.words.ends))
        return [Said(self.words.text(u.ids), u.logprob, u.tokens) for u in found]

    def _weigh(self, ask: Ask) -> Said:
        options = [self.words.answer(option) for option in ask.options]
        logits, state = self.model.prefill(self._prompt([ask]), max(map(len, options)) + 1)
        found = weigh(self.model.step, logits, state, options, sorted(self.words.ends))
        return Said.weighed(ask.options, options, found)

    def _prompt(self, asks: Sequence[Ask]) -> QwenPrompt:
        shown = [ask.images[:1] if ask.anchors is None else (ask.images[0], ask.anchors) for ask in asks]
        seen = self._seen.of(shown, self._encode, ROWS)
        ids = [self.writer.ids(ask.message, grid).to(self.device) for ask, (_, grid) in zip(asks, seen, strict=True)]
        return self.model.prompt(ids, [[one] for one in seen])

    def _encode(self, shown: Sequence[Shown]) -> list[tuple[Tensor, Grid]]:
        cut = [
            cut_patches(
                Image.fromarray(picture), self.model.config, self.writer.mean, self.writer.std,
                self.size(picture.shape[1], picture.shape[0]),
            )
            for picture, *_ in shown
        ]  # fmt: skip
        patches, grids = zip(*cut, strict=True)
        known = Anchors.of([_anchors(*anchors) for _, *anchors in shown], WIDTH).to(self.device)
        tokens = self.model.encode(torch.cat(patches).to(self.device, self.dtype), grids, known)
        return list(zip(tokens, grids, strict=True))


def _anchors(known: np.ndarray | None = None) -> tuple[Tensor, Tensor] | None:
    """Vectors [S, 64] and places [S, 2] of one image; None where there are none."""
    if known is None or not len(known):
        return None
    vectors, places = torch.from_numpy(known.copy()).split([WIDTH, 2], 1)
    return vectors, places


def _bytes(image: tuple[Tensor, Grid]) -> int:
    return image[0].nbytes
