"""A first look at a folder of images: what each shows, how sure that is, and which ones a person should see first.

python examples/triage.py             the bundled scenes
python examples/triage.py FOLDER      images of your own

Each is inspected, classified, captioned and asked about; water and forest are mapped where the answer was yes.
The table goes to out/triage.csv, what leaves most doubts first.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import rs_tools as rs
from rs_tools.errors import AccessError, ImageError, PerceptionError
from rs_tools.imagery.access import AccessPolicy
from rs_tools.summary import headline

SCENES = Path(__file__).resolve().parent / "data"
TABLE = Path("out/triage.csv")
QUESTIONS = {"water": "Is there water?", "forest": "Is there a forest?", "buildings": "Are there buildings?"}
MAPPED = ("water", "forest")
SURE = 0.5  # a class or a caption below it is a doubt
TRACE = 0.01  # so is a yes whose mask has less than this share


def look_at(image: Path) -> dict[str, Any]:
    """What the tools say of an image, and the doubts that they leave: weak answers, abstentions and warnings."""
    scene = rs.open(image)
    facts, scenery, caption = scene.inspect(), scene.classify(), scene.caption()
    answers = {thing: scene.vqa(question) for thing, question in QUESTIONS.items()}
    there = [thing for thing in MAPPED if answers[thing].answer == "yes" and not answers[thing].abstained]
    masks = {"mask": scene.segment(there)} if there else {}
    row = {"width": facts.width, "height": facts.height, "gsd_m": facts.gsd_m, "modality": facts.modality}
    row |= {"class": scenery.label, "class_score": round(scenery.score, 2)}
    row |= {"caption": caption.caption, "caption_confidence": round(caption.confidence, 2)}
    doubts = [f"class {scenery.label or '(none)'} has only {scenery.score:.2f}"] if scenery.score < SURE else []
    doubts += [f"caption has only {caption.confidence:.2f}"] if caption.confidence < SURE else []
    for thing, said in answers.items():
        row |= {thing: "unsure" if said.abstained else said.answer, f"{thing}_confidence": round(said.confidence, 2)}
        doubts += [f"{thing}: not certain enough to say"] if said.abstained else []
    for one in masks["mask"].classes if masks else ():
        row |= {f"{one.label}_share": round(one.share, 4), f"{one.label}_m2": one.area_m2}  # None without a place
        doubts += [f"{one.label}: yes, but its mask has {one.share:.1%}"] if one.share < TRACE else []
    results = {"image": facts, "class": scenery, "caption": caption, **answers, **masks}
    for name, result in results.items():
        print(f"  {name:10}" + headline(result).replace("\n", "\n" + " " * 12))
        doubts += [warning for warning in result.warnings if warning not in doubts]
    return row | {"doubts": doubts}


def triage(folder: Path) -> None:
    rows: list[dict[str, Any]] = []
    for image in AccessPolicy([folder]).images():
        print(f"\n{image.name}")
        try:
            rows.append({"image": str(image)} | look_at(image))
        except (AccessError, ImageError) as error:  # one bad file does not stop the rest
            rows.append({"image": str(image), "doubts": [f"refused: {error}"]})
    rows.sort(key=lambda row: ("class" in row, -len(row["doubts"])))
    print("\nTo look at closer (an error that the model is sure of leaves no doubt):")
    for row in rows:
        print(f"  {Path(row['image']).name}", *(row["doubts"] or ["no doubt"]), sep="\n    - ")
    TABLE.parent.mkdir(exist_ok=True)
    with TABLE.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        table.writeheader()
        table.writerows(row | {"doubts": " | ".join(row["doubts"])} for row in rows)
    print(f"\nWritten: {TABLE}, {len(rows)} images")


if __name__ == "__main__":
    try:
        triage(Path(sys.argv[1]) if len(sys.argv) > 1 else SCENES)
    except PerceptionError as error:  # no such folder, no model server: it says what to try
        raise SystemExit(f"triage: {error}") from error
