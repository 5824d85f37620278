"""OpenAI chat completions, the question: a conversation comes down to one task on one image or pair.

Knows nothing of HTTP, queues or the model; docs/SERVING.md says how callers see it.

| the last user message | task |
| --- | --- |
| `metadata: {"task": "segment", "labels": "road, water", ...}` beside it | that task, on its text or labels |
| begins with a task token, `[CAP] [VQA] [CLS] [VG] [SEG] [CCD]` | the token's; what follows is its text or labels |
| two images | `detect_change` |
| no text; "describe", "caption", "what do you see" | `caption` |
| "find", "locate", "detect" something | `ground` |
| "segment" or "outline" some classes | `segment` |
| "classify: class, class, ..." | `classify` |
| anything else, and whatever ends with a question mark | `vqa` |
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from model_server.http.openai_wire import CallError, check_model, first_fault, read_body
from model_server.http.pictures import PictureError, tile_of
from model_server.protocol import MAX_TEXT, PerceiveRequest, Task

TOKENS: dict[str, Task] = {
    "[CAP]": "caption", "[VQA]": "vqa", "[CLS]": "classify",
    "[VG]": "ground", "[SEG]": "segment", "[CCD]": "detect_change",
}  # fmt: skip
LISTS: tuple[Task, ...] = ("classify", "segment")  # whose text is a list of labels
METADATA = ("task", "labels", "detail", "gsd_m", "modality", "priority", "deadline_s")


class _Address(BaseModel):
    url: str


class _Text(BaseModel):
    type: Literal["text"]
    text: str


class _Picture(BaseModel):
    type: Literal["image_url"]
    image_url: _Address


_Content = str | list[Annotated[_Text | _Picture, Field(discriminator="type")]]
_CONTENT: TypeAdapter[str | list[_Text | _Picture]] = TypeAdapter(_Content)


class _Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Any = None  # read where the role is the user's


class _StreamOptions(BaseModel):
    include_usage: bool = False


class ChatRequest(BaseModel):
    """The fields of a request that bear on the answer; those on sampling have no effect, answers are deterministic."""

    model: str
    messages: list[_Message] = Field(min_length=1)
    metadata: dict[str, str] | None = None
    stream: bool | None = False
    stream_options: _StreamOptions | None = None
    logprobs: bool | None = False
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    n: int | None = 1
    tools: list[Any] | None = None
    response_format: dict[str, Any] | None = None

    @property
    def limit(self) -> int | None:
        """Most tokens of the answer's text."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def usage_wanted(self) -> bool:
        """Of a stream: whether its last chunk is the usage."""
        return self.stream_options is not None and self.stream_options.include_usage


@dataclass(frozen=True)
class Asked:
    """What a conversation comes down to; `tiles` are uint8 [H, W, 3]."""

    chat: ChatRequest
    request: PerceiveRequest
    tiles: list[np.ndarray]


def read_chat(body: bytes, model: str) -> Asked:
    """The task in a request's body; `model` is the name of the loaded one.

    Only the last user message is read, since the model has no memory; where it has no image, those of the latest
    message that has some are looked at.

    Raises:
        CallError: the body is no such request, has no image to look at, or asks for what this server does not do.
        UnknownModel: it asks for another model.
    """
    chat = read_body(ChatRequest, body)
    check_model(chat.model, model)
    _refuse_what_is_not_done(chat)
    text, urls = _last_question(chat.messages)
    if not urls:
        raise CallError("no message of the user holds an image: send one as an image_url part", "messages")
    request = _request(text.strip(), len(urls), chat.metadata or {})
    wanted = 2 if request.task == "detect_change" else 1
    if len(urls) != wanted:
        raise CallError(
            f"{request.task} looks at {wanted} image{'s' * (wanted > 1)} and this message has {len(urls)}: send one "
            "image to ask about, or two of one place, the earlier first, to compare",
            "messages",
        )
    try:
        tiles = [tile_of(url) for url in urls]
    except PictureError as error:
        raise CallError(str(error), "messages") from error
    if len({tile.shape for tile in tiles}) > 1:
        raise CallError("the two images of a comparison must have one size and show the same ground", "messages")
    return Asked(chat, request, tiles)


def _refuse_what_is_not_done(chat: ChatRequest) -> None:
    if chat.tools:
        raise CallError("this model calls no tools: leave `tools` out", "tools")
    if chat.n not in (None, 1):
        raise CallError("one answer is given, the best: leave `n` out", "n")
    if (chat.response_format or {}).get("type", "text") != "text":
        raise CallError(
            "answers have the form of their task, which this cannot change: leave it out", "response_format"
        )


def _last_question(messages: Sequence[_Message]) -> tuple[str, list[str]]:
    """The text of the last user message, and the addresses of the latest images."""
    asked = [(i, message) for i, message in enumerate(messages) if message.role == "user"]
    if not asked:
        raise CallError("no message has the role user", "messages")
    parts = [_parts(i, message) for i, message in asked]
    text = "\n".join(part.text for part in parts[-1] if isinstance(part, _Text))
    shown = [[part.image_url.url for part in one if isinstance(part, _Picture)] for one in parts]
    return text, next((urls for urls in reversed(shown) if urls), [])


def _parts(index: int, message: _Message) -> list[_Text | _Picture]:
    try:
        content = _CONTENT.validate_python(message.content)
    except ValidationError as error:
        raise CallError(
            f"messages.{index}.content: {first_fault(error)[0]}; it is a text, or a list of parts text and image_url",
            "messages",
        ) from None
    return [_Text(type="text", text=content)] if isinstance(content, str) else content


# --- from words to a task --------------------------------------------------------------------------------------------

_ALL = r"(?:(?:all|every|each|any)(?: of)?(?: the)? )?"
_PICTURE = r"(?: (?:in|on|of|from) (?:the|this) (?:\w+ )?(?:image|picture|photo|photograph|scene|tile))?"
_PLEASE = r"(?:please )?"
_DESCRIBE = re.compile(
    rf"{_PLEASE}(?:describe|caption|summari[sz]e)\b.*|what (?:do|can) you see\b.*|"
    r"what (?:does|do) (?:the|this) (?:image|picture|photo|scene) show\W*",
    re.S,
)
_FULL = re.compile(r"\b(?:detail|detailed|full|fully)\b")
_FIND = re.compile(
    rf"{_PLEASE}(?:find|locate|detect|ground|mark) (?!out\b){_ALL}(?P<what>[^.\n;:!]+?){_PICTURE}\s*(?:[.\n;:!].*)?",
    re.S,
)
_SEGMENT = re.compile(
    rf"{_PLEASE}(?:segment|outline)(?: out)?:? {_ALL}(?P<what>[^.\n;!]+?){_PICTURE}\s*(?:[.\n;!].*)?", re.S
)
_WHERE = re.compile(r"where (?:is|are) (?:the )?(?P<what>[^?\n]+)\?", re.I)
_SHORT = re.compile(
    r"\banswer (?:the question )?(?:using|with|in) (?:a |one )?(?:single )?word or phrase\.?\s*\Z", re.I
)
_CLASSIFY = re.compile(rf"{_PLEASE}classify\b[^:]*(?::\s*(?P<what>[^\n]+))?", re.S)


def _request(text: str, images: int, metadata: Mapping[str, str]) -> PerceiveRequest:
    fields: dict[str, object] = {key: metadata[key] for key in METADATA if key in metadata}
    if "labels" in fields:
        fields["labels"] = _labels(str(fields["labels"]))
    if "task" not in fields:
        fields = {**_meant(text, images), **fields}
    elif fields["task"] in LISTS and not fields.get("labels"):
        fields["labels"] = _labels(text)
    elif fields["task"] != "caption":
        fields["text"] = text
    try:
        return PerceiveRequest.model_validate(fields)
    except ValidationError as error:
        raise CallError(first_fault(error)[0], "metadata" if metadata else "messages") from None


def _meant(text: str, images: int) -> dict[str, object]:
    """Task and text or labels, from a task token or plain words."""
    token, rest = text[: text.find("]") + 1].upper(), text[text.find("]") + 1 :].strip()
    if token == "[REF]":
        raise CallError("describing a region by [REF] is not served: crop the image to it, ask [CAP]", "messages")
    if task := TOKENS.get(token):
        return _told(task, rest, images)
    if images == 2:
        return {"task": "detect_change", "text": text}
    if len(text) > MAX_TEXT:
        return {"task": "vqa", "text": text}  # and refused as such
    text = _SHORT.sub("", text).rstrip()
    words = " ".join(text.lower().split())
    if not words or _DESCRIBE.fullmatch(words):
        return {"task": "caption", "detail": "full" if _FULL.search(words) else "short"}
    if not words.endswith("?"):
        if match := _FIND.fullmatch(text.lower()):
            return {"task": "ground", "text": match["what"].strip()}
        if match := _SEGMENT.fullmatch(text.lower()):
            return {"task": "segment", "labels": _labels(match["what"])}
        if match := _CLASSIFY.fullmatch(text.lower()):
            return {"task": "classify", "labels": _labels(match["what"] or "")}
    return {"task": "vqa", "text": text}


def _told(task: Task, text: str, images: int) -> dict[str, object]:
    """The same after a task token; what RSUniVLM's published prompts say there is understood too."""
    if task == "segment" and images == 2:
        return {"task": "detect_change", "text": text}
    if task == "caption":
        return {"task": task, "detail": "full" if _FULL.search(text.lower()) else "short"}
    if task == "ground" and (match := _WHERE.fullmatch(text)):
        return {"task": task, "text": match["what"]}
    if task in LISTS:
        return {"task": task, "labels": _labels(text.partition(":")[2] or text)}
    return {"task": task, "text": _SHORT.sub("", text).rstrip()}


def _labels(text: str) -> list[str]:
    """A list in words: "road, trees and water"; what follows the list as a sentence of its own is not in it."""
    text = re.split(r"\.\s+[Aa]nswer\b", text)[0]
    names = (re.sub(r"^the ", "", name.strip(" .\n\t")) for name in re.split(r",|\band\b|\n", text))
    return list(dict.fromkeys(name for name in names if name))
