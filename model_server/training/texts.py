"""What the decoder is taught to say about each image: captions, and questions with their answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from model_server.text.names import readable
from model_server.text.questions import QA, presence_question, presence_questions, rephrase, scene_question
from model_server.training.records import Record
from model_server.training.targets import ALIKE, words

# Scenes that are things one can ask after: "Is there a bridge?"
_THINGS = (
    "airport baseball_diamond baseball_field beach bridge church desert farmland forest freeway golf_course harbor "
    "intersection meadow mountain overpass park parking_lot playground pond port railway_station river runway "
    "stadium storage_tanks tennis_court viaduct mobile_home_park"
).split()


@dataclass(frozen=True)
class Text:
    """One text about one image: `question` is empty for a caption."""

    task: str  # task token
    question: str
    answer: str


@dataclass(frozen=True)
class ImageTexts:
    """All texts of an image, and how many of each a step takes."""

    captions: tuple[Text, ...]
    questions: tuple[Text, ...]
    take_captions: int
    take_questions: int

    def sample(self, rng: Random) -> list[Text]:
        """The texts of one step: distinct ones, fewer where the image has fewer."""
        return [
            *rng.sample(self.captions, min(self.take_captions, len(self.captions))),
            *rng.sample(self.questions, min(self.take_questions, len(self.questions))),
        ]


def caption_text(caption: str) -> str:
    """A caption as the decoder writes it: without the final stop, which is put back when it is shown."""
    return caption.strip().rstrip(" .")


def scene_presence(record: Record, rng: Random, scenes: Sequence[str]) -> list[QA]:
    """Whether the thing that a scene is named after is there: one yes and one no.

    The no is taken from scenes that are not alike and whose words no caption of the image mentions.
    """
    if not record.scene:
        return []
    mine, out = readable(record.scene), []
    if record.scene in _THINGS:
        out.append(QA(presence_question(record.scene, rng), "yes", "presence"))
    near = {name for group in ALIKE if mine in group for name in group}
    said = {w.rstrip("s") for c in record.captions for w in words(c)}
    absent = [s for s in scenes if readable(s) not in near and not {w.rstrip("s") for w in words(readable(s))} & said]
    if absent:
        out.append(QA(presence_question(rng.choice(absent), rng), "no", "presence"))
    return out


def texts_of(record: Record, rng: Random, scenes: Sequence[str]) -> ImageTexts:
    """Every text a training record gives, questions in several phrasings of the training bank."""
    questions = [qa for _ in range(2) for qa in presence_questions(record, rng)]
    for qa in record.qa:
        questions += [qa, QA(rephrase(qa.question, rng), qa.answer, qa.type)]
    if record.scene:
        questions += [scene_question(record.scene, rng) for _ in range(2)]
        questions += [qa for _ in range(2) for qa in scene_presence(record, rng, scenes)]
    captions = tuple(Text("[CAP]", "", caption_text(c)) for c in record.captions if c.strip())
    asked = tuple(Text("[VQA]", qa.question, qa.answer) for qa in questions)
    if record.presence:  # richly annotated
        return ImageTexts(captions, asked, 3, 8)
    return ImageTexts(captions, asked, 3, 1) if captions else ImageTexts((), asked, 0, 24)


def all_texts(records: Sequence[Record], seed: int) -> list[ImageTexts]:
    """Texts of every record, the same for the same seed."""
    scenes = sorted({r.scene for r in records if r.scene and r.scene in _THINGS})
    return [texts_of(record, Random(f"{seed}-{record.id}"), scenes) for record in records]
