"""What dialects have in common: messages about pictures, and words read as captions, answers, classes and boxes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from model_server.families.asking import Ask, Said
from model_server.families.reading import answer, caption, classes, objects
from model_server.protocol import PerceiveRequest, Task, TaskNotServed, TileAnswer
from model_server.query import Query
from model_server.text.boxes import ParsedBoxes


class WordDialect(ABC):
    """A family that answers in words and boxes; one that draws masks adds them. `steps`: most tokens of an answer."""

    name: str
    tasks: tuple[Task, ...] = ("caption", "vqa", "classify", "ground")
    steps: ClassVar[dict[Task, int]]
    anchored = False

    @abstractmethod
    def _messages(self, query: Query) -> list[str]:
        """What is said to the model: one message, or one for each class of a segmentation."""

    @abstractmethod
    def _boxes(self, text: str, width: int, height: int) -> ParsedBoxes:
        """The boxes that an answer names, on the pixels of a picture of this size. Raises MalformedText."""

    @abstractmethod
    def _scale(self, width: int, height: int) -> float:
        """Pixels that the model sees per pixel of a picture of this size."""

    def _expert(self, task: Task) -> int:
        """Row of the feed-forward expert."""
        return 0

    def route(self, task: Task) -> tuple[str, str]:
        return "", "shared"

    def ask(self, query: Query) -> list[Ask]:
        images = (query.image,) if query.after is None else (query.image, query.after)
        steps, expert = self.steps[query.task], self._expert(query.task)
        options = query.labels if query.task == "classify" else ()
        anchors = query.anchors if self.anchored else None
        return [Ask(images, message, steps, expert, options, anchors) for message in self._messages(query)]

    def read(self, query: Query, said: Sequence[Said]) -> TileAnswer:
        height, width = query.image.shape[:2]
        match query.task:
            case "caption":
                return caption(said[0])
            case "vqa":
                return answer(said[0])
            case "classify":
                return classes(query.labels, said[0])
            case "ground":
                return objects(self._boxes(said[0].text, width, height).boxes, said[0], self._scale(width, height))
            case _:
                raise TaskNotServed(query.task, self.name, self.tasks)

    def cautions(self, request: PerceiveRequest) -> list[str]:
        return []
