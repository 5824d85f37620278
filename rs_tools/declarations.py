"""The eight tools as callers see them: names, titles, descriptions and parameters, one declaration for every surface.

MCP and LangChain both read them from here. A parameter is a string, a number, a boolean or a plain list of these, never
a union or a reference, because many clients mangle anything else. The words are few: an agent reads all of them before
it asks anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator
from pydantic_core import ErrorDetails

from rs_tools.results import (
    CaptionResult,
    ClassifyResult,
    DetectChangeResult,
    GroundResult,
    InspectResult,
    ListResult,
    Model,
    Result,
    SegmentResult,
    VqaResult,
)

Image = Annotated[
    str, Field(description="Path as list_images gives it, https address of an allowed host, or an upload's handle")
]
Region = Annotated[
    list[float],
    Field(default_factory=list, description="[x1, y1, x2, y2] in pixels, as bbox_px; empty: all of it"),
]
Bands = Annotated[
    list[int], Field(default_factory=list, description="1 (grey) or 3 (RGB) band numbers; empty: the file's own")
]
Embeddings = Annotated[str, Field(description="AlphaEarth raster, if any")]
Preview = Annotated[bool, Field(description="Also return a small picture of the answer")]


class Arguments(Model):
    """What a caller gave."""

    @model_validator(mode="before")
    @classmethod
    def _null_is_not_given(cls, given: Any) -> Any:
        """Some clients fill what they do not use with null."""
        return {name: value for name, value in given.items() if value is not None} if isinstance(given, dict) else given

    @field_validator("*")
    @classmethod
    def _is_text(cls, value: Any) -> Any:
        """Half of a surrogate pair, which JSON can carry, is in no file name and can be sent to no model."""
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and any("\ud800" <= sign <= "\udfff" for sign in text):
                raise ValueError("it holds half a character (a lone surrogate); send whole Unicode text")
        return value


class InspectImage(Arguments):
    image: Image
    bands: Bands


class ListImages(Arguments):
    folder: Annotated[str, Field(description="Folder to list; empty for all that may be read")] = ""


class Caption(Arguments):
    image: Image
    region: Region
    detail: Annotated[
        Literal["short", "full"], Field(description="short: one sentence; full: more of what is seen")
    ] = "short"
    bands: Bands
    embeddings: Embeddings = ""


class Vqa(Arguments):
    image: Image
    question: Annotated[
        str, Field(description="One question in English about what is visible, such as 'Is there a river?'")
    ]
    region: Region
    bands: Bands
    embeddings: Embeddings = ""


class Ground(Arguments):
    image: Image
    query: Annotated[
        str, Field(description="A kind of thing ('ship'), or one of them by size or place ('the largest ship')")
    ]
    region: Region
    max_objects: Annotated[int, Field(description="How many to list, 1 to 1000, best first; count tells of all")] = 100
    min_score: Annotated[float, Field(description="Least score, 0 to 1; 0: the model's own threshold")] = 0.0
    bands: Bands
    preview: Preview = False
    embeddings: Embeddings = ""


class Segment(Arguments):
    image: Image
    classes: Annotated[
        list[str], Field(description="1 to 16 kinds of cover to tell apart, such as ['water', 'forest', 'road']")
    ]
    region: Region
    bands: Bands
    preview: Preview = False


class DetectChange(Arguments):
    before: Annotated[str, Field(description="Path of the earlier image; the answer is in its pixels")]
    after: Annotated[
        str, Field(description="Path of the later image of the same place and kind; size and grid may differ")
    ]
    query: Annotated[str, Field(description="Kind of change you look for; a note only: every change is reported")] = ""
    region: Region
    bands: Bands
    preview: Preview = False


class Classify(Arguments):
    image: Image
    labels: Annotated[
        list[str],
        Field(default_factory=list, description="2 to 200 classes in your words; empty for the model's own classes"),
    ]
    top_k: Annotated[int, Field(description="How many of the likeliest classes to list")] = 5
    region: Region
    bands: Bands
    embeddings: Embeddings = ""


@dataclass(frozen=True)
class Declaration:
    """One tool. Its name is that of the method of `Tools` that answers, and the arguments are its parameters.

    Attributes:
        files: answers may come with files.
        looks: the model looks at pixels, and the method takes `progress`.
    """

    name: str
    title: str
    description: str
    arguments: type[Arguments]
    result: type[Result]
    files: bool = False
    looks: bool = True

    @cached_property
    def input_schema(self) -> dict[str, Any]:
        """The JSON schema of the arguments, closed and without titles."""
        return without(self.arguments.model_json_schema(), "title")

    def refusal(self, errors: Sequence[ErrorDetails]) -> str:
        """What is wrong with arguments that do not fit, and which there are.

        An argument that no tool takes is refused too: `bbox` in place of `region` would answer for the whole image.
        """
        wrong = "; ".join(f"{'.'.join(map(str, one['loc']))}: {_reason(one)}" for one in errors)
        required = self.input_schema.get("required", [])
        takes = ", ".join(
            f"{name} ({one['type']}{', required' if name in required else ''})"
            for name, one in self.input_schema["properties"].items()
        )
        return f"{self.name} cannot use these arguments ({wrong}). It takes {takes}."


def _reason(error: ErrorDetails) -> str:
    return "there is no such argument" if error["type"] == "extra_forbidden" else error["msg"]


def without(schema: dict[str, Any], *words: str) -> dict[str, Any]:
    """A JSON schema without these keywords, however deep. Fields of these names stay."""

    def rid(part: Any, of_fields: bool = False) -> Any:
        if isinstance(part, list):
            return [rid(one) for one in part]
        if isinstance(part, dict):
            kept = {k: v for k, v in part.items() if of_fields or k not in words}
            return {k: rid(v, of_fields=k == "properties" and not of_fields) for k, v in kept.items()}
        return part

    return rid(schema)


DECLARATIONS = (
    Declaration(
        "inspect_image",
        "Inspect an image",
        "Facts of an image: size, bands, data type, nodata, CRS, WGS84 bounds, ground area, metres per pixel, likely "
        "modality. Asks no model. Use it first, to choose regions and bands and know the size of things in it.",
        InspectImage,
        InspectResult,
        looks=False,
    ),
    Declaration(
        "list_images",
        "List readable images",
        "The images that the other tools can read, with their sizes, and the folders that may be read. Use it when you "
        "have no exact path.",
        ListImages,
        ListResult,
        looks=False,
    ),
    Declaration(
        "caption",
        "Describe an image",
        "Say in words what an image or a region shows: a first overview. For one fact use vqa, for positions ground, "
        "for areas segment. Beyond 1024 pixels a side it looks at the whole and at parts, and says what parts add.",
        Caption,
        CaptionResult,
    ),
    Declaration(
        "vqa",
        "Answer a question about an image",
        "Answer a question about an image or a region: presence, count, area, scene, position. abstained=true marks a "
        "guess not to rely on. Use it to check what ground or detect_change found: give its bbox_px as region. A large "
        "image is searched tile by tile, which can take minutes; evidence says where it was found.",
        Vqa,
        VqaResult,
        files=True,
    ),
    Declaration(
        "ground",
        "Find objects",
        "Find every instance of a thing with bounds (ship, car, building, tree, aircraft): boxes in pixels and on "
        "Earth, scores, a count, and all of them as GeoJSON. For water, forest or roads use segment. Says so when "
        "nothing is found or the phrase is unknown. Next: vqa or caption with a bbox_px as region. Large images take "
        "minutes.",
        Ground,
        GroundResult,
        files=True,
    ),
    Declaration(
        "segment",
        "Map ground cover",
        "Give each pixel one of the classes or none: pixels, share and m2 of each class, the mask as GeoTIFF, outlines "
        "as GeoJSON. For cover (water, flood, road, forest, oil slick on radar); to count things use ground. Warns "
        "about classes that the model does not know. Large images take minutes.",
        Segment,
        SegmentResult,
        files=True,
    ),
    Declaration(
        "detect_change",
        "Compare two images",
        "What changed between two images of one place: whether, where (regions with outlines and scores), how much "
        "(share, m2), how far the two overlap, with mask and outlines as files. Next: vqa, ground or caption with a "
        "region's bbox_px on before, and on after where both have one grid, to learn what was and is there.",
        DetectChange,
        DetectChangeResult,
        files=True,
    ),
    Declaration(
        "classify",
        "Classify the scene",
        "Which of the given classes an image or a region belongs to. The calibrated probabilities add up to one over "
        "the classes given: one always wins, so give one that can be right.",
        Classify,
        ClassifyResult,
    ),
)
