"""A tiny data set of plain colours, and a model that answers by looking at the colour."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from model_server.perceiver import Query
from model_server.protocol import ModelInfo, RankedAnswer, TileAnswer, TileCaption, TileClasses, TileVqa

SCENES = {"river": (20, 40, 200), "forest": (20, 160, 30), "bare_land": (200, 170, 90)}


def write_toy(folder: Path, split: str, images: int, name: str = "toy") -> None:
    """`images` pictures of each scene, with captions, presence labels and questions."""
    rng = np.random.default_rng(len(split))
    (folder / name / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for scene, colour in SCENES.items():
        for i in range(images):
            path = f"images/{split}_{scene}_{i}.png"
            noise = rng.integers(-10, 11, size=(12, 16, 3))
            Image.fromarray((np.array(colour) + noise).astype(np.uint8)).save(folder / name / path)
            words = scene.replace("_", " ")
            qa = [
                {"question": "Is a river present?", "answer": "yes" if scene == "river" else "no", "type": "presence"},
                {"question": "How many rivers are there?", "answer": str(int(scene == "river")), "type": "count"},
                {
                    "question": "Are there more rivers than forests?",
                    "answer": "yes" if scene == "river" else "no",
                    "type": "comparison",
                },
            ]
            row = {
                "id": f"{name}_{split}_{scene}_{i}",
                "split": split,
                "images": [path],
                "width": 16,
                "height": 12,
                "scene": scene,
                "captions": [f"this is a {words} .", f"a wide {words} seen from above ."],
                "presence": {"water": scene == "river", "trees": scene == "forest", "sea": False},
                "qa": qa,
            }
            lines.append(json.dumps(row))
    with (folder / name / "records.jsonl").open("a") as file:
        file.write("\n".join(lines) + "\n")


class ScriptedModel:
    """Knows the scene by its colour, unless the picture is a single colour, which is what the blind see."""

    info = ModelInfo(
        model="scripted",
        weights_digest="sha256:0123456789abcdef0123",
        attention_backend="none",
        precision="none",
        device="none",
    )

    def __init__(self) -> None:
        self.encoded = 0

    def answer(self, queries: Sequence[Query]) -> list[TileAnswer]:
        assert len(queries) <= 32
        return [self._one(query) for query in queries]

    def image_features(self, images: Sequence[np.ndarray]) -> np.ndarray:
        self.encoded += len(images)
        means = np.array([image.reshape(-1, 3).mean(axis=0) for image in images], np.float32)
        return means / np.linalg.norm(means, axis=1, keepdims=True)

    def image_vectors(self, images: Sequence[np.ndarray]) -> np.ndarray:
        means = np.array([image.reshape(-1, 3).mean(axis=0) for image in images], np.float32)
        return means / np.linalg.norm(means, axis=1, keepdims=True)

    def text_vectors(self, texts: Sequence[str]) -> np.ndarray:
        """The colour of the first scene that a text names."""
        colours = [next(c for scene, c in SCENES.items() if scene.replace("_", " ") in text) for text in texts]
        return self.image_vectors([np.array(colour, np.uint8)[None, None] for colour in colours])

    def _one(self, query: Query) -> TileCaption | TileVqa | TileClasses:
        scene = self._scene(query.image)
        if query.task == "caption":
            return TileCaption(caption=f"this is a {scene}" if scene else "nothing to see", confidence=0.5)
        if query.task == "classify":
            labels = list(query.labels)
            hit = labels.index(scene) if scene in labels else 0
            return TileClasses(labels=labels, scores=[0.9 if i == hit else 0.05 for i in range(len(labels))])
        text = query.text.lower()
        kind = "count" if "how many" in text or "number of rivers" in text else "yes_no"
        there = scene == "river" if "river" in text or "water" in text else scene == "forest" and "sea" not in text
        answer = str(int(there)) if kind == "count" else "yes" if there else "no"
        alternatives = [RankedAnswer(answer=answer, confidence=0.8)]
        return TileVqa(answer=answer, kind=kind, confidence=0.8, abstained=scene is None, alternatives=alternatives)

    @staticmethod
    def _scene(image: np.ndarray) -> str | None:
        if image.reshape(-1, 3).std(axis=0).max() == 0:
            return None
        mean = image.reshape(-1, 3).mean(axis=0)
        nearest = min(SCENES, key=lambda scene: float(np.abs(mean - np.array(SCENES[scene])).sum()))
        return nearest.replace("_", " ")
