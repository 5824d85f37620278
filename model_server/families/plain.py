"""Plain LLaVA and Qwen2.5-VL: general models, asked in the words that their authors use, without task tokens.

LLaVA answers a phrase with `[x1, y1, x2, y2]` in shares of the square it saw, Qwen2.5-VL with a JSON list in pixels of
the picture as it was resized. Neither draws masks or compares pictures pixel by pixel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from model_server.families.dialect import WordDialect
from model_server.protocol import PerceiveRequest, Task
from model_server.query import Query
from model_server.text.boxes import Box, BoxDialect, ParsedBoxes, parse_boxes

STEPS: dict[Task, int] = {"caption": 256, "vqa": 64, "classify": 0, "ground": 512}
Reader = Callable[[str, int, int], ParsedBoxes]  # text, width, height of the picture -> boxes on its pixels


class PlainDialect(WordDialect):
    """grounding: the words that ask for boxes, with `{}` for the phrase; read: its answer's boxes; scale: pixels seen
    per pixel of a picture of some width and height.
    """

    steps = STEPS

    def __init__(self, name: str, grounding: str, read: Reader, scale: Callable[[int, int], float]) -> None:
        self.name = name
        self._grounding, self._reader, self._seen = grounding, read, scale

    def _boxes(self, text: str, width: int, height: int) -> ParsedBoxes:
        return self._reader(text, width, height)

    def _scale(self, width: int, height: int) -> float:
        return self._seen(width, height)

    def cautions(self, request: PerceiveRequest) -> list[str]:
        return ["This is a general model: it was not trained on remote sensing imagery in particular."]

    def _messages(self, query: Query) -> list[str]:
        return [self._words(query)]

    def _words(self, query: Query) -> str:
        text = query.text.strip()
        if query.task == "caption":
            return f"Describe this image {'briefly' if query.detail == 'short' else 'in detail'}."
        if query.task == "classify":
            return f"Which of these does the image show: {', '.join(query.labels)}? Answer with one of them only."
        if query.task == "vqa":
            return f"{text}\nAnswer the question using a single word or phrase."
        return self._grounding.format(text)


def square_boxes(text: str, width: int, height: int, cropped: bool) -> ParsedBoxes:
    """LLaVA's boxes, in shares of a square: the picture padded to one about its middle, or its middle cut out."""
    side = min(width, height) if cropped else max(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    found = parse_boxes(text, BoxDialect.UNIT, (side, side))
    return replace(found, boxes=tuple(_moved(box, left, top, width, height) for box in found.boxes))


def _moved(box: Box, left: float, top: float, width: int, height: int) -> Box:
    x1, x2 = (min(max(x + left, 0.0), float(width)) for x in (box.x1, box.x2))
    y1, y2 = (min(max(y + top, 0.0), float(height)) for y in (box.y1, box.y2))
    return replace(box, x1=x1, y1=y1, x2=x2, y2=y2)
