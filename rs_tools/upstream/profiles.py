"""How families of models are asked for each task, what they can do, and how they write boxes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from model_server.protocol import PerceiveRequest, Task
from model_server.text.boxes import BoxDialect

_WORDS: tuple[Task, ...] = ("caption", "vqa", "classify")
_SHORT = "Answer the question using a single word or phrase."


@dataclass(frozen=True)
class Profile:
    """One family.

    Attributes:
        name: what a caller chooses it by.
        tasks: that it has a text form for.
        boxes: the dialect that it writes boxes in.
        ground: asks for boxes; `{phrase}`, `{width}` and `{height}` are filled in.
        before: what stands before the words of a task.
        limits: what a reader of its boxes should know.
        unit: a picture is resized so that its sides are multiples of so many pixels; the model then sees what is sent.
        body: fields of the request that the family wants.
    """

    name: str
    tasks: tuple[Task, ...]
    boxes: BoxDialect
    ground: str
    limits: str
    before: dict[Task, str] = field(default_factory=dict)
    unit: int = 1
    body: dict[str, int] = field(default_factory=dict)

    def prompts(self, request: PerceiveRequest, size: tuple[int, int]) -> list[str]:
        """The messages that answer a request on one picture of (width, height), or on one pair: segmentation takes
        one for each class."""
        words = _segment(request.labels) if request.task == "segment" else [self._words(request, size)]
        before = self.before.get(request.task, "")
        return [f"{before}{text}" for text in words]

    def _words(self, request: PerceiveRequest, size: tuple[int, int]) -> str:
        match request.task:
            case "caption":
                return "Describe this image in detail." if request.detail == "full" else "Describe this image briefly."
            case "vqa":
                return f"{request.text.strip()}\n{_SHORT}"
            case "classify":
                listed = ", ".join(request.labels)
                return f"Classify the image as one of these classes: {listed}. Answer with the class alone."
            case "ground":
                return self.ground.format(phrase=request.text.strip(), width=size[0], height=size[1])
            case _:
                kind = f"{request.text.strip()} area" if request.text.strip() else "area"
                return f"Please segment the {kind} that have changed in the second image."


def _segment(labels: Sequence[str]) -> list[str]:
    return [f"{label.strip()}." for label in labels]


_JSON = '[{{"bbox_2d": [x1, y1, x2, y2], "label": "{phrase}"}}]'
_DETERMINED = {"temperature": 0, "max_tokens": 2048}

PROFILES: dict[str, Profile] = {
    one.name: one
    for one in (
        Profile(
            name="rsunivlm",  # its published words; our own server reads them too, and answers in JSON
            tasks=(*_WORDS, "ground", "segment", "detect_change"),
            boxes=BoxDialect.PERCENT,
            ground="Where is the {phrase}?",
            before={
                "caption": "[CAP] ", "vqa": "[VQA] ", "classify": "[CLS] ",
                "ground": "[VG] ", "segment": "[SEG] ", "detect_change": "[SEG] ",
            },
            limits="This format has boxes to a hundredth of the picture's sides, and masks on a coarse grid.",
            body=_DETERMINED,
        ),
        Profile(
            name="geochat",
            tasks=(*_WORDS, "ground"),
            boxes=BoxDialect.GEOCHAT,
            ground="[refer] where are <p>{phrase}</p>?",
            limits="This format has boxes to a hundredth of the picture's sides; their angle is dropped.",
            body=_DETERMINED,
        ),
        Profile(
            name="qwen-vl",  # Qwen2.5-VL: pixels of the picture as it sees it, whose sides are multiples of 28
            tasks=(*_WORDS, "ground"),
            boxes=BoxDialect.QWEN,
            ground='Locate every object that matches "{phrase}" and output the bbox coordinates in JSON format, as '
            + _JSON + ". If there is none, answer None.",
            limits="Boxes are in whole pixels of the picture as the model saw it.",
            unit=28,
            body=_DETERMINED,
        ),
        Profile(
            name="generic",
            tasks=(*_WORDS, "ground"),
            boxes=BoxDialect.QWEN,
            ground="Find every {phrase} in the image.\nThe image is {width} pixels wide and {height} high. Answer with "
            "a JSON list alone, " + _JSON + ", in pixels of this image from its top-left corner; an empty list [] if "
            "there is none.",
            limits="Boxes are as a general model guesses them: many such models were not trained to place boxes.",
        ),
    )
}  # fmt: skip
