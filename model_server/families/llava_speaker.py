"""A loaded LLaVA-style network with its tokenizer and image processing (RSUniVLM, MF-RSVLM, LLaVA)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from model_server.families.asking import Ask, Said
from model_server.families.pictures import Processing
from model_server.families.seen import SeenPictures, Shown
from model_server.families.speaking import greedy, weigh
from model_server.families.words import Words
from model_server.model.llava import ImageTokens, LlavaVLM, Prompt

ROWS = 8  # messages answered together, and pictures encoded together
PromptText = Callable[[str, int], str]  # message, number of pictures -> the whole text before the answer


class LlavaSpeaker:
    """Answers messages of any kinds in one batch.

    context: positions the decoder was trained for; what is said ends there.
    """

    def __init__(self, model: LlavaVLM, words: Words, processing: Processing, prompt: PromptText,
                 context: int) -> None:  # fmt: skip
        self.model, self.words, self.processing, self.prompt = model, words, processing, prompt
        self.context = context
        self._seen: SeenPictures[ImageTokens] = SeenPictures(_bytes)
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
        steps = self._room(prompt, max(ask.steps for ask in asks))
        logits, state = self.model.prefill(prompt, torch.tensor([ask.expert for ask in asks]), steps)
        found = greedy(self.model.step, logits, state, steps, sorted(self.words.ends))
        return [Said(self.words.text(u.ids), u.logprob, u.tokens) for u in found]

    def _weigh(self, ask: Ask) -> Said:
        options = [self.words.answer(option) for option in ask.options]
        prompt = self._prompt([ask])
        logits, state = self.model.prefill(prompt, torch.tensor([ask.expert]), max(map(len, options)) + 1)
        found = weigh(self.model.step, logits, state, options, sorted(self.words.ends))
        return Said.weighed(ask.options, options, found)

    def _room(self, prompt: Prompt, steps: int) -> int:
        return max(1, min(steps, self.context - prompt.real.shape[1]))

    def _prompt(self, asks: Sequence[Ask]) -> Prompt:
        tokens = iter(self._seen.of([(image,) for ask in asks for image in ask.images], self._encode, ROWS))
        ids = [
            torch.tensor(self.words.prompt(self.prompt(ask.message, len(ask.images))), device=self.device)
            for ask in asks
        ]
        return self.model.prompt(ids, [[next(tokens) for _ in ask.images] for ask in asks])

    def _encode(self, shown: Sequence[Shown]) -> list[ImageTokens]:
        views = [self.processing.views(picture).to(self.device, self.dtype) for picture, *_ in shown]
        return self.model.encode(views, [(picture.shape[1], picture.shape[0]) for picture, *_ in shown])


def _bytes(image: ImageTokens) -> int:
    return sum(tensor.nbytes for tensor in (image.tokens, image.stacks) if tensor is not None)
