"""How many tokens a call took, as the loaded model counts them. No torch."""

from __future__ import annotations

from typing import Protocol, TypedDict, runtime_checkable

from model_server.protocol import PerceiveRequest


class Usage(TypedDict):
    """As OpenAI names them."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


@runtime_checkable
class CountsTokens(Protocol):
    """A loaded model that knows its vocabularies."""

    def prompt_tokens(self, request: PerceiveRequest, images: int) -> int: ...

    def answer_tokens(self, text: str) -> int: ...


def usage_of(model: object, request: PerceiveRequest, images: int, answer: str) -> Usage | None:
    """Tokens of the question on so many images and of the answer, its end included; None: the model counts none."""
    if not isinstance(model, CountsTokens):
        return None
    prompt, completion = model.prompt_tokens(request, images), model.answer_tokens(answer) + 1
    return Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)
