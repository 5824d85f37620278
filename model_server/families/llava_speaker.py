"""A loaded LLaVA-style network with its tokenizer and image processing (RSUniVLM, MF-RSVLM, LLaVA)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from model_server.families.asking import Ask
from model_server.families.pictures import Processing
from model_server.families.seen import SeenPictures, Shown
from model_server.families.speaker import BatchSpeaker
from model_server.families.words import Words
from model_server.model.llava import IMAGE, ImageTokens, LlavaVLM, Prompt
from model_server.model.rsvlm import DecodeState
from model_server.model.transfer import sent

ROWS = 8  # messages answered together, and pictures encoded together
PromptText = Callable[[str, int], str]  # message, number of pictures -> the whole text before the answer


class LlavaSpeaker(BatchSpeaker[Prompt]):
    """Answers messages about any number of pictures each, by any experts, in one batch."""

    def __init__(self, model: LlavaVLM, words: Words, processing: Processing, prompt: PromptText,
                 context: int) -> None:  # fmt: skip
        super().__init__(model.decoder, model.step, words, context, ROWS)
        self.model, self.processing, self.prompt = model, processing, prompt
        self._seen: SeenPictures[ImageTokens] = SeenPictures(_bytes)

    def _prompt(self, asks: Sequence[Ask]) -> Prompt:
        tokens = iter(self._seen.of([(image,) for ask in asks for image in ask.images], self._encode, ROWS))
        ids = [
            torch.tensor(self.words.prompt(self.prompt(ask.message, len(ask.images))), device=self.device)
            for ask in asks
        ]
        return self.model.prompt(ids, [[next(tokens) for _ in ask.images] for ask in asks])

    def _prefill(self, prompt: Prompt, asks: Sequence[Ask], room: int) -> tuple[Tensor, DecodeState]:
        return self.model.prefill(prompt, torch.tensor([ask.expert for ask in asks]), room)

    def _counted(self, asks: Sequence[Ask]) -> list[list[int]]:
        picture = self.words.picture
        if picture is None:
            return super()._counted(asks)
        prompts = [self.words.prompt(self.prompt(ask.message, len(ask.images))) for ask in asks]
        return [[picture if i == IMAGE else i for i in ids] for ids in prompts]

    def _encode(self, shown: Sequence[Shown]) -> list[ImageTokens]:
        views = [sent(self.processing.views(picture).to(self.dtype), self.device) for picture, *_ in shown]
        return self.model.encode(views, [(picture.shape[1], picture.shape[0]) for picture, *_ in shown])


def _bytes(image: ImageTokens) -> int:
    return sum(tensor.nbytes for tensor in (image.tokens, image.stacks) if tensor is not None)
