"""Stage `region` on small pictures made here: views and texts, what trains, learning, resuming, and text read back."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from model_server.checkpoints.store import WeightsError, load_checkpoint, save_checkpoint
from model_server.evaluation.text_grounding import TextGrounder, _read
from model_server.protocol import TaskNotServed, TileObjects
from model_server.query import Query
from model_server.text.boxes import BoxDialect, parse_boxes
from model_server.training.dense_data import read_scenes
from model_server.training.region import (
    MAX_BOXES,
    NONE,
    SETS,
    RegionRun,
    RegionTrainer,
    RegionViews,
    box_text,
    expert_state,
    region_model,
    with_region_expert,
)

SIDE = 64


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two white ships on dark ground."""
    root, rng = tmp_path_factory.mktemp("region_data"), np.random.default_rng(0)
    for name in SETS:
        (root / name).mkdir()
        rows = []
        for i in range(4):
            picture = rng.integers(20, 60, (SIDE, SIDE, 3)).astype(np.uint8)
            boxes = [[4 + i, 6, 20 + i, 20], [30, 34 + i, 52, 50 + i]]
            for x1, y1, x2, y2 in boxes:
                picture[y1:y2, x1:x2] = 230
            Image.fromarray(picture).save(root / name / f"{i}.png")
            label = {"neon_trees": "tree", "estonia_aerial": "car"}.get(name, "ship")
            objects = [{"label": label, "bbox": box} for box in boxes]
            rows.append({"id": f"{name}_{i}", "split": "val" if i == 3 else "train", "images": [f"{i}.png"],
                         "width": SIDE, "height": SIDE, "objects": objects})  # fmt: skip
        (root / name / "records.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return root


@pytest.fixture(scope="module")
def weights(debug_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random checkpoint with an embedding that is as wide as a trained one: what is frozen must be able to say."""
    loaded, folder = load_checkpoint(debug_weights), tmp_path_factory.mktemp("weights")
    with torch.no_grad():
        loaded.model.decoder.embed.weight.mul_(20)
    save_checkpoint(folder, loaded.model, loaded.tokenizer, loaded.sentence_tokenizer, loaded.calibration)
    return folder


def settings(data: Path, run: Path, weights: Path, **other: Any) -> RegionRun:
    small = RegionRun(data=data, run=run, weights=weights, steps=6, batch=4, bf16=False)
    return dataclasses.replace(small, **other)


def test_boxes_are_written_in_reading_order_and_nothing_as_none() -> None:
    boxes = np.array([[40, 50, 50, 60], [30, 2, 40, 8], [2, 3, 12, 9]], np.float32)
    text = box_text(boxes, 100)
    assert text == "[2, 3, 12, 9] [30, 2, 40, 8] [40, 50, 50, 60]"
    assert box_text(boxes[:0], 100) == NONE
    many = np.tile(np.array([[1, 1, 5, 5]], np.float32), (30, 1))
    assert len(parse_boxes(box_text(many, 100), BoxDialect.PERCENT, (100, 100)).boxes) == MAX_BOXES


def test_a_view_s_text_names_the_boxes_that_are_white_in_it(data: Path) -> None:
    views = RegionViews(read_scenes(data, SETS, "train"), SIDE)
    named = nothing = 0
    for seed in range(40):
        view = views.draw(np.random.default_rng(seed))
        assert view.image.shape == (3, SIDE, SIDE)
        for text, boxes in zip(view.texts, view.boxes, strict=True):
            assert text.task == "[VG]"
            nothing += text.answer == NONE
            found = parse_boxes(text.answer, BoxDialect.PERCENT, (SIDE, SIDE)).boxes
            assert len(found) == len(boxes)
            for box in found:
                x, y = int((box.x1 + box.x2) / 2), int((box.y1 + box.y2) / 2)
                ground = view.image.float().mean(0)
                assert ground[min(y, SIDE - 1), min(x, SIDE - 1)] > ground.median()
                named += 1
    assert named > 10
    assert nothing > 5


def test_the_new_expert_is_a_copy_and_alone_can_be_trained(debug_weights: Path) -> None:
    model = load_checkpoint(debug_weights).model
    grown = with_region_expert(model)
    trained = {name for name, p in grown.named_parameters() if p.requires_grad}
    assert trained == set(expert_state(grown))
    assert all(".experts.experts.1." in name for name in trained)
    images = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        answers = [
            m.prefill(m.encode(images), torch.tensor([3]), None, torch.tensor([e]), 1)[0]
            for m, e in ((model, 0), (grown, 0), (grown, 1))
        ]
    torch.testing.assert_close(answers[0], answers[1])
    torch.testing.assert_close(answers[0], answers[2])


def test_the_stage_learns_to_write_boxes_and_leaves_the_rest_alone(data: Path, tmp_path: Path, weights: Path) -> None:
    trainer = RegionTrainer(settings(data, tmp_path, weights, steps=80, rate=1e-2, ema=0.9, every=80))
    before = trainer.validate()["nats"]
    trainer.fit()
    lines = [json.loads(line) for line in (tmp_path / "region.jsonl").read_text().splitlines()]
    assert lines[-1]["val"]["nats"] < 0.6 * before
    untouched = load_checkpoint(weights).model.state_dict()
    grown = region_model(load_checkpoint(weights).model, tmp_path / "region.pt").state_dict()
    assert all(torch.equal(grown[name], p) for name, p in untouched.items())

    grounder = TextGrounder(weights, tmp_path / "region.pt")
    image = np.full((90, 130, 3), 40, np.uint8)
    first, again, one = grounder.answer(
        [Query("ground", image, "ship"), Query("ground", image, "ship"), Query("ground", image, "the largest ship")]
    )
    assert isinstance(first, TileObjects)
    assert isinstance(one, TileObjects)
    assert first == again
    assert len(one.boxes) == min(len(first.boxes), 1)
    for x1, y1, x2, y2 in first.boxes:
        assert 0 <= x1 < x2 <= 131
        assert 0 <= y1 < y2 <= 91
    with pytest.raises(TaskNotServed):
        grounder.answer([Query("caption", image)])


def test_a_run_that_was_cut_off_resumes_to_the_same_weights(data: Path, tmp_path: Path, debug_weights: Path) -> None:
    ends = []
    for stops in ((4,), (2, 4)):
        run = tmp_path / str(len(stops))
        run.mkdir()
        for stop in stops:
            trainer = RegionTrainer(settings(data, run, debug_weights))
            while trainer.step < stop:
                trainer.train_step()
            trainer.save()
        ends.append(torch.load(run / "region.pt", weights_only=True)["average"])
    assert all(torch.allclose(ends[0][name], ends[1][name], atol=1e-6) for name in ends[0])


def test_the_best_average_is_kept_and_a_run_that_gets_no_better_ends_early(
    data: Path, tmp_path: Path, debug_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = RegionTrainer(settings(data, tmp_path, debug_weights, steps=9, every=1, patience=2))
    nats = iter([3.0, 1.0, 2.0, 1.5])
    monkeypatch.setattr(trainer, "validate", lambda: {"nats": next(nats)})
    trainer.fit()
    assert trainer.step == 4
    state = torch.load(tmp_path / "region.pt", weights_only=True)
    assert state["least"] == 1.0
    assert any(not torch.equal(state["best"][name], p) for name, p in state["average"].items())
    model = region_model(load_checkpoint(debug_weights).model, tmp_path / "region.pt").state_dict()
    assert all(torch.equal(model[name], p) for name, p in state["best"].items())
    assert RegionTrainer(settings(data, tmp_path, debug_weights, steps=9, every=1, patience=2)).waited == 2


def test_an_expert_of_other_weights_is_refused(debug_weights: Path, tmp_path: Path) -> None:
    model = load_checkpoint(debug_weights).model
    torch.save({"best": {"decoder.blocks.0.nothing": torch.zeros(1)}}, tmp_path / "region.pt")
    with pytest.raises(WeightsError, match="other weights"):
        region_model(model, tmp_path / "region.pt")


def test_written_boxes_are_read_one_by_one_with_the_sureness_of_their_tokens(debug_weights: Path) -> None:
    tokenizer = load_checkpoint(debug_weights).tokenizer
    text = "[10, 20, 50, 60] [1, 2] [0, 0, 100, 50]"
    ids = tokenizer.encode(text)
    second = tokenizer.encode("[10, 20, 50, 60]")
    sure = [np.log(0.9)] * len(second) + [np.log(0.4)] * (len(ids) - len(second))
    boxes, scores = _read(tokenizer, [*ids, tokenizer.end, *ids], [*sure, 0.0, *sure], 200)
    assert boxes.tolist() == [[20, 40, 100, 120], [0, 0, 200, 100]]
    assert scores == pytest.approx([0.9, 0.4])
    assert len(_read(tokenizer, tokenizer.encode(NONE), [0.0] * 9, 200)[0]) == 0
