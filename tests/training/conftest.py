"""Small labelled sets that several stages are trained on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from model_server.training.dense_data import BOX_SETS, CHANGE_SETS, MASK_SETS
from model_server.training.dense_validation import CHIPS
from model_server.training.language import SETS

SIDE = 64  # of every picture
COLOURS = {"forest": (20, 120, 30), "beach": (220, 200, 140), "river": (30, 60, 180)}


@pytest.fixture(scope="session")
def coloured_scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plain-coloured scenes in all four sets, with captions, presence and questions."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for name in SETS:
        folder = root / name
        (folder / "images").mkdir(parents=True)
        rows = []
        for i in range(18):
            scene = list(COLOURS)[i % 3]
            pixels = np.clip(np.array(COLOURS[scene]) + rng.normal(0, 12, (64, 64, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "images" / f"{i}.png")
            row = {"id": f"{name}_{i}", "split": "val" if i >= 12 else "train", "images": [f"images/{i}.png"],
                   "width": 64, "height": 64, "modality": "optical", "gsd_m": 1.0, "crs": False}  # fmt: skip
            if name in ("ucm", "rsicd_aid"):
                row |= {"scene": scene, "captions": [f"there is a {scene} .", f"this is a {scene} .", f"a {scene} ."]}
            if name != "rsicd_aid":
                answer = "yes" if scene == "river" else "no"
                row["qa"] = [{"question": "Is there a water area?", "answer": answer, "type": "presence"}]
                row["qa"] += [
                    {"question": "How many roads are there?", "answer": "3", "type": "count"},
                    {"question": "How many buildings are there?", "answer": "0", "type": "count"},
                    {"question": "Are there more roads than buildings?", "answer": "yes", "type": "comparison"},
                ]
            if name == "ucm":
                row["presence"] = {"water": scene == "river", "trees": scene == "forest"}
            rows.append(json.dumps(row))
        (folder / "records.jsonl").write_text("\n".join(rows) + "\n")
    return root


def write_set(root: Path, name: str, rng: np.random.Generator) -> None:
    """White squares on dark ground: ships with boxes, roads with masks, or changes."""
    folder = root / name
    folder.mkdir(parents=True)
    rows = []
    for i in range(6):
        ground = rng.integers(20, 60, (SIDE, SIDE, 3)).astype(np.uint8)
        picture, mask = ground.copy(), np.zeros((SIDE, SIDE), np.uint8)
        x, y = (int(v) for v in rng.integers(4, 36, 2))
        picture[y : y + 20, x : x + 20] = 230
        mask[y : y + 20, x : x + 20] = 1
        row = {"id": f"{name}_{i}", "split": "val" if i >= 4 else "train", "images": [f"{i}.png"],
               "width": SIDE, "height": SIDE, "modality": "sar" if "sar" in name else "optical"}  # fmt: skip
        Image.fromarray(picture).save(folder / f"{i}.png")
        Image.fromarray(mask if name in MASK_SETS else mask * 255).save(folder / f"{i}_mask.png")
        if name in CHANGE_SETS and name != "ucm":
            Image.fromarray(ground).save(folder / f"{i}_before.png")
            row |= {"images": [f"{i}_before.png", f"{i}.png"], "change_mask": f"{i}_mask.png"}
        elif name in MASK_SETS and name not in ("ucm", "inshore_ships", "estonia_aerial", "neon_trees"):
            label = {"epfl_roads": "road", "flood": "water", "amazon_forest": "forest"}.get(name, "ship")
            row |= {"mask": f"{i}_mask.png", "mask_classes": {"0": "background", "1": label}}
        if name in BOX_SETS and name != "ucm":
            label = {"neon_trees": "tree", "estonia_aerial": "car"}.get(name, "ship")
            row["objects"] = [{"label": label, "bbox": [x, y, x + 20, y + 20]}]
        if name == "oscd":
            row["gsd_m"] = 10.0
        if name == "ucm":
            row |= {"scene": "forest", "presence": {"ship": False, "trees": True, "water": False, "sea": False}}
        rows.append(json.dumps(row))
    (folder / "records.jsonl").write_text("\n".join(rows) + "\n")


@pytest.fixture(scope="session")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same squares in every set of the dense stage."""
    root, rng = tmp_path_factory.mktemp("dense_data"), np.random.default_rng(0)
    for name in sorted({*BOX_SETS, *MASK_SETS, *CHANGE_SETS, CHIPS}):
        write_set(root, name, rng)
    return root
