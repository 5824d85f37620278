"""The ablation grid on scenes made here: what it trains on, what it prints, and that it learns."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from typer.testing import CliRunner

from model_server.text.boxes import BoxDialect, parse_boxes
from model_server.text.masks import parse_mask
from model_server.training.ablation import WITHOUT, Outcome, app, table_of, variants
from model_server.training.ablation_data import from_records, made
from model_server.training.records import read_records


def test_made_scenes_ask_all_granularities_and_hide_dots_from_the_small_image() -> None:
    examples = made(3, 64, seed=0)
    assert {e.task for e in examples} == {"[CAP]", "[VQA]", "[VG]", "[SEG]"}
    one = next(e for e in examples if e.question == "how many dots?")
    assert one.image.shape == (3, 64, 64)
    assert one.canvas.shape == (3, 128, 128)
    assert int(one.canvas.amax()) > 230 > int(one.image.amax())
    box = parse_boxes(next(e for e in examples if e.task == "[VG]").answer, BoxDialect.PERCENT, (64, 64)).boxes[0]
    assert (box.x2 - box.x1, box.y2 - box.y1) == (32, 32)
    irrigated = {e.answer: e.anchors for e in examples if e.question == "is it irrigated?"}
    for answer, anchors in irrigated.items():
        assert anchors is not None
        assert anchors[0][0, int(answer == "yes")] == 1


def test_records_give_an_example_for_each_kind_of_annotation(tmp_path: Path) -> None:
    folder = tmp_path / "one"
    folder.mkdir()
    mask = np.zeros((60, 60), np.uint8)
    mask[:20, :20] = 1
    Image.fromarray(mask).save(folder / "mask.png")
    Image.fromarray(np.zeros((60, 60, 3), np.uint8)).save(folder / "image.png")
    row = {"id": "a", "split": "train", "images": ["image.png"], "width": 60, "height": 60, "modality": "optical",
           "gsd_m": None, "sensor": None, "crs": False, "captions": ["A pond ."],
           "qa": [{"question": "Is there water?", "answer": "yes", "type": "presence"}],
           "objects": [{"label": "small_ship", "bbox": [0, 0, 3, 3]}, {"label": "ship", "bbox": [0, 30, 30, 60]}],
           "mask": "mask.png", "mask_classes": {"0": "land", "1": "open_water"}}  # fmt: skip
    (folder / "records.jsonl").write_text(json.dumps(row) + "\n")
    found = {e.task: e for e in from_records(read_records(tmp_path, ["one"], "train"), 32, 0)}
    assert (found["[CAP]"].answer, found["[VQA]"].answer) == ("A pond", "yes")
    assert (found["[VG]"].question, found["[VG]"].answer) == ("ship", "[0, 50, 50, 100]")
    grid = parse_mask(found["[SEG]"].answer)
    assert [grid.names[i] for i in grid.values[0]] == ["open water", "land", "land"]
    assert set(grid.values[1:].ravel().tolist()) == {grid.names.index("land")}


def test_the_grid_trains_every_variant_and_prints_and_writes_its_figures(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    out = tmp_path / "figures" / "ablation.json"
    result = CliRunner().invoke(app, ["--out", str(out), "--steps", "2", "--seeds", "1", "--limit", "6"])
    assert result.exit_code == 0, result.output
    figures = json.loads(out.read_text())
    assert [o["variant"] for o in figures["outcomes"]] == list(variants())
    assert len(variants()) == len(WITHOUT) + 2
    sizes = {o["variant"]: o["parameters"] for o in figures["outcomes"]}
    assert sizes["none of them"] < min(sizes[f"without {n}"] for n in WITHOUT)
    assert sizes["without detail view"] == sizes["all mechanisms"]
    tasks = ("[CAP]", "[SEG]", "[VG]", "[VQA]")
    assert all(np.isfinite(o["nats"][task]) for o in figures["outcomes"] for task in tasks)


def test_a_table_without_anchors_says_that_tlm_was_not_measured() -> None:
    one = Outcome("all mechanisms", 0, 9, 1.0, {"[CAP]": 1.0}, {"[CAP]": 0.5})
    assert "no-op" in str(table_of([one], anchored=False).caption)
    assert table_of([one], anchored=True).caption is None
