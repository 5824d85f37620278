"""A loaded Qwen2.5-VL, modulated or plain, with its tokenizer, chat template and image processing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from model_server.checkpoints.adapters.fusar_inputs import WIDTH, PromptWriter, cut_patches
from model_server.families.asking import Ask
from model_server.families.seen import SeenPictures, Shown
from model_server.families.speaker import BatchSpeaker
from model_server.families.words import Words
from model_server.model.modulation import Anchors
from model_server.model.qwen_vision import Grid
from model_server.model.qwen_vl import QwenPrompt, QwenVLM
from model_server.model.rsvlm import DecodeState
from model_server.model.transfer import sent

ROWS = 4  # messages answered together, and pictures encoded together
Size = Callable[[int, int], tuple[int, int]]  # width and height of a picture -> those at which it is looked at


class QwenSpeaker(BatchSpeaker[QwenPrompt]):
    """Answers messages about one picture each, modulated by what is known of its place, in one batch."""

    def __init__(self, model: QwenVLM, words: Words, writer: PromptWriter, size: Size, context: int) -> None:
        super().__init__(model.decoder, model.step, words, context, ROWS)
        self.model, self.writer, self.size = model, writer, size
        self._seen: SeenPictures[tuple[Tensor, Grid]] = SeenPictures(_bytes)

    def _prompt(self, asks: Sequence[Ask]) -> QwenPrompt:
        shown = [ask.images[:1] if ask.anchors is None else (ask.images[0], ask.anchors) for ask in asks]
        seen = self._seen.of(shown, self._encode, ROWS)
        ids = [self.writer.ids(ask.message, grid).to(self.device) for ask, (_, grid) in zip(asks, seen, strict=True)]
        return self.model.prompt(ids, [[one] for one in seen])

    def _prefill(self, prompt: QwenPrompt, asks: Sequence[Ask], room: int) -> tuple[Tensor, DecodeState]:
        return self.model.prefill(prompt, room)

    def _counted(self, asks: Sequence[Ask]) -> list[list[int]]:
        merge = self.model.config.vision.merge  # of the smallest picture: a placeholder counts once
        return [self.writer.ids(ask.message, (merge, merge)).tolist() for ask in asks]

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
        tokens = self.model.encode(sent(torch.cat(patches).to(self.dtype), self.device), grids, known)
        return list(zip(tokens, grids, strict=True))


def _anchors(known: np.ndarray | None = None) -> tuple[Tensor, Tensor] | None:
    """Vectors [S, 64] and places [S, 2] of one image; None where there are none."""
    if known is None or not len(known):
        return None
    vectors, places = torch.from_numpy(known.copy()).split([WIDTH, 2], 1)
    return vectors, places


def _bytes(image: tuple[Tensor, Grid]) -> int:
    return image[0].nbytes
