"""Stage `dense` on small pictures made here: views, losses, learning, resuming, and the checkpoint that comes out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model_server.checkpoints.store import WeightsError, load_checkpoint
from model_server.dense.perceiver import DensePerceiver
from model_server.model.config import debug
from model_server.model.dense import Found, early_maps
from model_server.model.vision import Backbone
from model_server.protocol import TileChange, TileMasks, TileObjects
from model_server.query import Query
from model_server.text.concepts import CONCEPTS, every_phrase
from model_server.training.concepts import absent, boxed, masked, present
from model_server.training.dense import DenseRun, DenseTrainer, trapezoid
from model_server.training.dense_data import (
    BOX_SETS,
    CHANGE_SETS,
    MASK_SETS,
    Boxes,
    Masks,
    PhraseBank,
    Scene,
    Share,
    Views,
    read_scenes,
)
from model_server.training.dense_losses import LEAST_CELLS, LEAST_SHARE, box_losses, box_maps, mask_losses
from model_server.training.dense_validation import figures, fit_calibration, gather
from model_server.training.dense_windows import Window, middles, relit
from model_server.training.records import Record

SIDE = 64


def start_run(folder: Path) -> None:
    """What stage `vision` leaves behind, untrained."""
    torch.manual_seed(0)
    backbone = {f"backbone.{k}": v for k, v in Backbone(debug().backbone).state_dict().items()}
    vocabulary: dict[str, list[str]] = {"labels": [], "objects": [], "concepts": []}
    torch.save({"average": backbone, "vocabulary": vocabulary}, folder / "vision.pt")


def settings(data: Path, run: Path, **other: Any) -> DenseRun:
    small = DenseRun(data=data, run=run, config="debug", steps=6, batch=3, side=SIDE, bf16=False, validate_minutes=1e6)
    return dataclasses.replace(small, **other)


def bank() -> PhraseBank:
    return PhraseBank({p: torch.nn.functional.one_hot(torch.tensor(i % 24), 24).float()
                       for i, p in enumerate(every_phrase())})  # fmt: skip


@pytest.mark.parametrize("turn", range(8))
def test_boxes_turn_with_the_picture(turn: int) -> None:
    source = np.zeros((50, 70, 3), np.uint8)
    source[20:32, 30:38] = 255
    window = Window(16, 8, 32, 64, turn)
    seen = window.image(source)[0] > 127
    rows, columns = torch.nonzero(seen, as_tuple=True)
    x1, y1, x2, y2 = window.corners(np.array([[30, 20, 38, 32]], np.float32))[0]
    edges = (int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1)
    assert np.abs(np.array(edges) - [x1, y1, x2, y2]).max() <= 1


def test_a_window_over_the_edge_is_grey_there_and_does_not_count() -> None:
    window = Window(-8, 0, 32, 32)
    source = np.full((16, 40, 3), 200, np.uint8)
    assert window.image(source)[:, 0, :8].unique().tolist() == [127]
    inside = window.plane(np.ones((16, 40), bool))
    assert inside[:16, 8:].min() == 1
    assert inside[:, :8].max() == 0
    assert inside[16:].max() == 0


def test_other_light_changes_values_and_leaves_edges_where_they_are() -> None:
    image = torch.full((3, 16, 16), 60, dtype=torch.uint8)
    image[:, :, 8:] = 180
    out = relit(image, np.random.default_rng(3))
    assert not torch.equal(out, image)
    assert all(len(out[c, :, :8].unique()) == 1 and len(out[c, :, 8:].unique()) == 1 for c in range(3))


def record(name: str, **other: Any) -> Record:
    return Record(id="x", set=name, split="train", images=(), width=9, height=9, **other)


def test_what_a_set_may_hold_without_a_label_is_never_a_counter_example() -> None:
    assert not {"tree", "road", "water"} & absent(record("estonia_aerial"))
    assert "car" not in absent(record("epfl_roads"))
    assert "ship" in absent(record("neon_trees"))
    assert {"ship"} == boxed(record("inshore_ships"))


def test_presence_of_a_whole_image_says_what_is_absent() -> None:
    said = absent(record("ucm", presence={"ship": False, "cars": True, "water": True, "sea": False}))
    assert "ship" in said
    assert not {"car", "water"} & said


def test_a_mobile_home_is_a_building_though_the_annotators_do_not_say_so() -> None:
    park = record("ucm", presence={"buildings": False, "mobile_home": True, "trees": False})
    assert "building" in present(park)
    assert "building" not in absent(park)
    assert "building" in absent(record("ucm", presence={"buildings": False, "mobile_home": False}))


def test_sea_in_radar_images_is_all_but_land_and_ships() -> None:
    classes = {0: "background", 1: "oil_spill", 2: "look_alike", 3: "ship", 4: "land"}
    known = masked(record("oil_spill_sar", mask_classes=classes, modality="sar"))
    assert known["water"] == {0, 1, 2}
    assert known["oil spill"] == {1}
    assert "ship" not in known  # tiny ones are unlabelled there


def test_no_held_out_phrase_is_trained_on() -> None:
    assert not set(every_phrase()) & set(every_phrase(held_out=True))
    assert all(c.held_out for c in CONCEPTS.values())


def test_views_ask_for_what_is_there_and_for_what_is_not(squares: Path) -> None:
    views = Views(read_scenes(squares, BOX_SETS, "train"), BOX_SETS, bank())
    batch = views.boxes(np.random.default_rng(0), 24, SIDE)
    assert batch.images.shape == (24, 3, SIDE, SIDE)
    asked = torch.cat([m.any(1) for m in batch.meant if m.shape[1]])
    assert asked.any()
    assert not asked.all()
    for boxes in batch.boxes:
        assert not len(boxes) or (float(boxes.min()) >= 0 and float(boxes.max()) <= SIDE)


def test_a_box_says_where_a_thing_is_for_sure_and_where_it_may_be() -> None:
    middle, unsure = middles(np.array([[8.0, 8.0, 40.0, 24.0]]), 64, 0.5)
    assert middle[16, 24]
    assert not unsure[16, 24]
    assert unsure[9, 9]
    assert not (middle | unsure)[:8].any()


def test_the_heat_is_one_at_the_cell_nearest_to_the_centre_only() -> None:
    heat, weight = box_maps(torch.tensor([[8.0, 8.0, 40.0, 24.0]]), 16, 16)
    assert torch.nonzero(heat[0] == 1).tolist() == [[3, 5]]  # (23.5, 15.5) is next to (24, 16)
    assert weight[0, 3, 5] == 1
    x = (torch.arange(16) * 4 + 3.5) < 8
    assert weight[0][:, x].max() == 0


def test_the_losses_are_lowest_for_the_truth() -> None:
    truth = torch.tensor([[8.0, 8.0, 40.0, 24.0]])
    batch = Boxes(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), torch.zeros(1, 2, 4), [truth],
                  [torch.tensor([[True], [False]])], [torch.tensor([True])],
                  [torch.tensor([True, True])], [torch.tensor([False, False])])  # fmt: skip
    heat, _ = box_maps(truth, 16, 16)
    x = torch.arange(16) * 4 + 3.5
    left, right = (x - 8)[None].expand(16, -1), (40 - x)[None].expand(16, -1)
    top, bottom = (x - 8)[:, None].expand(-1, 16), (24 - x)[:, None].expand(-1, 16)
    distances = torch.stack((left, top, right, bottom))[None].clamp(min=0.1)
    logits = torch.full((1, 2, 16, 16), -8.0)
    logits[0, 0][heat[0] == 1] = 8.0
    right_one = box_losses(Found(logits, distances, torch.full((1, 16, 16), 8.0)), batch)
    wrong = box_losses(Found(logits.flip(1), distances.flip(3), torch.full((1, 16, 16), 8.0)), batch)
    assert float(right_one["heat"]) < 0.01
    assert float(right_one["box"]) < 0.01
    assert all(float(wrong[k]) > float(right_one[k]) + 0.1 for k in ("heat", "box"))


def test_a_fragment_at_the_edge_is_neither_object_nor_background() -> None:
    truth = torch.tensor([[8.0, 8.0, 40.0, 24.0]])
    batch = Boxes(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), torch.zeros(1, 1, 4), [truth],
                  [torch.tensor([[True]])], [torch.tensor([False])], [torch.tensor([True])],
                  [torch.tensor([False])])  # fmt: skip
    logits = torch.full((1, 1, 16, 16), -8.0)
    logits[0, 0, 3, 5] = 8.0
    found = Found(logits, torch.ones(1, 4, 16, 16), torch.zeros(1, 16, 16))
    assert float(box_losses(found, batch)["heat"]) < 0.01
    background = dataclasses.replace(batch, meant=[torch.tensor([[False]])])
    assert float(box_losses(found, background)["heat"]) > 1


def test_a_thing_that_a_set_does_not_label_is_denied_only_where_another_object_lies() -> None:
    truth = torch.tensor([[8.0, 8.0, 40.0, 24.0]])
    batch = Boxes(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), torch.zeros(1, 1, 4), [truth],
                  [torch.tensor([[False]])], [torch.tensor([True])], [torch.tensor([False])],
                  [torch.tensor([False])])  # fmt: skip
    for place, denied in (((3, 5), True), ((12, 12), False)):
        logits = torch.full((1, 1, 16, 16), -8.0)
        logits[0, 0, *place] = 8.0
        loss = box_losses(Found(logits, torch.ones(1, 4, 16, 16), torch.zeros(1, 16, 16)), batch)["heat"]
        assert (float(loss) > 1) == denied


def test_a_thing_that_is_somewhere_is_sought_where_it_looks_likest() -> None:
    nothing, one = torch.zeros(0, 4), torch.zeros(1, 1, 16, 16)
    batch = Boxes(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), torch.zeros(1, 1, 4), [nothing],
                  [torch.zeros(1, 0, dtype=torch.bool)], [torch.zeros(0, dtype=torch.bool)],
                  [torch.tensor([False])], [torch.tensor([True])])  # fmt: skip
    heat = torch.full((1, 1, 16, 16), -4.0)
    heat[0, 0, 3, 5] = 1.0
    heat.requires_grad_(True)
    losses = box_losses(Found(heat, one.expand(1, 4, 16, 16), one[0]), batch)
    torch.stack(list(losses.values())).sum().backward()
    assert heat.grad is not None
    assert heat.grad[0, 0, 3, 5] < 0
    assert int((heat.grad != 0).sum()) == LEAST_CELLS  # and nowhere is it denied

    masks = Masks(batch.images, batch.phrases, torch.zeros(1, 1, 64, 64), torch.zeros(1, 1, 64, 64),
                  torch.tensor([[True]]))  # fmt: skip
    pixels = torch.full((1, 1, 16, 16), -4.0, requires_grad=True)
    torch.stack(list(mask_losses(pixels, masks).values())).sum().backward()
    assert pixels.grad is not None
    assert int((pixels.grad < 0).sum()) == int(LEAST_SHARE * 16 * 16)


@pytest.mark.parametrize(("turned_on", "scale"), [(True, 0.9), (False, 3.0)])
def test_only_a_view_of_most_of_an_image_shows_what_is_somewhere_in_it(turned_on: bool, scale: float) -> None:
    record = Record("r", "ucm", "train", (), 64, 64, scene="river", presence={"water": True, "airplane": True})
    scene = Scene(record, [np.zeros((64, 64, 3), np.uint8)])
    shares = {"ucm": Share(1.0, scale, scale)}
    views, rng = Views([scene], shares, bank()), np.random.default_rng(0)
    assert {"water", "airplane"} <= present(record)
    masks = views.masks(rng, 4, SIDE)
    assert bool(masks.somewhere.any()) == turned_on
    assert not masks.weight[masks.somewhere].any()
    assert bool(torch.stack(views.boxes(rng, 4, SIDE).somewhere).any()) == turned_on


def test_the_rate_rises_stays_and_falls() -> None:
    rates = [trapezoid(step, 100, 10, 0.4) for step in (0, 9, 50, 80, 99)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[1] == rates[2] == 1
    assert 1 > rates[3] > rates[4] > 0


@torch.no_grad()
def losses(trainer: DenseTrainer, data: Path) -> dict[str, float]:
    """Means over the same views of each task, whatever the trainer has seen since."""
    sums: dict[str, list[float]] = {}
    for task, sets in (("boxes", BOX_SETS), ("masks", MASK_SETS), ("change", CHANGE_SETS)):
        views = Views(read_scenes(data, sets, "train"), sets, PhraseBank(trainer.vectors))
        for seed in range(8):
            for term, value in trainer.losses(task, views, np.random.default_rng(seed)).items():
                sums.setdefault(term, []).append(float(value))
    return {term: sum(values) / len(values) for term, values in sums.items()}


def test_the_stage_learns_all_three_tasks_and_fills_a_checkpoint(
    squares: Path, tmp_path: Path, debug_weights: Path
) -> None:
    start_run(tmp_path)
    trainer = DenseTrainer(settings(squares, tmp_path, steps=300, rate=3e-3, head_rate=6e-3, ema=0.9))
    at_first = losses(trainer, squares)
    trainer.fit()
    at_last = losses(trainer, squares)
    for term, share in (("heat", 0.8), ("mask", 0.8), ("change", 0.8), ("box", 0.8)):
        assert at_last[term] < share * at_first[term], term
    lines = [json.loads(line) for line in (tmp_path / "dense.jsonl").read_text().splitlines()]
    assert any("heat" in line for line in lines)
    assert lines[-1]["val"]["sztaki_air f1"] > 0.3

    weights = tmp_path / "weights"
    weights.mkdir()
    for file in debug_weights.iterdir():
        (weights / file.name).write_bytes(file.read_bytes())
    before = load_checkpoint(weights)
    assert before.dense is None
    calibration = trainer.export(weights)
    after = load_checkpoint(weights)
    assert after.dense is not None
    assert after.dense_calibration == calibration
    assert after.digest != before.digest
    x = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    phrases = torch.randn(1, 2, 24)
    with torch.no_grad():
        early = early_maps(trainer.backbone, x, 2)
        mine, loaded = (b.segment(b.features(b.maps(early)), phrases) for b in (trainer.average, after.dense))
    torch.testing.assert_close(mine, loaded, atol=0.05, rtol=0.02)  # half precision between them
    (weights / "dense.safetensors").write_bytes(b"nothing")
    with pytest.raises(WeightsError, match=r"dense\.safetensors"):
        load_checkpoint(weights)


def test_a_run_that_was_cut_off_resumes_to_the_same_weights(squares: Path, tmp_path: Path) -> None:
    weights = []
    for stops in ([6], [3, 6]):
        run = tmp_path / str(len(stops))
        run.mkdir()
        start_run(run)
        trainer = DenseTrainer(settings(squares, run))
        for stop in stops:
            trainer = DenseTrainer(settings(squares, run))
            views = {
                task: Views(read_scenes(squares, sets, "train"), sets, PhraseBank(trainer.vectors))
                for task, sets in (("boxes", BOX_SETS), ("masks", MASK_SETS), ("change", CHANGE_SETS))
            }
            while trainer.step < stop:
                trainer.train_step(views)
            trainer.save()
        weights.append(trainer.average.box_out.weight.clone())
    torch.testing.assert_close(weights[0], weights[1], atol=1e-6, rtol=0)


def test_figures_and_thresholds_come_from_the_same_predictions(squares: Path, tmp_path: Path) -> None:
    start_run(tmp_path)
    perceiver = DenseTrainer(settings(squares, tmp_path)).perceiver()
    scenes = [s for s in read_scenes(squares, {k: v for k, v in BOX_SETS.items() if k != "ucm"}, "val")]
    scenes += read_scenes(squares, {"oscd": CHANGE_SETS["oscd"]}, "val")
    found = gather(perceiver, scenes)
    said, fitted = figures(found), fit_calibration(found)
    assert {"inshore_ships/ship ap50", "oscd f1", "still changed", "hrsid_sar/ship iou"} <= said.keys()
    assert {"default", "coarse"} <= fitted.change.keys()
    assert all(0 <= v <= 1 for table in (fitted.detect, fitted.mask, fitted.change) for v in table.values())


def test_the_threshold_of_radar_ships_is_one_that_finds_the_ship_in_the_middle_of_chips() -> None:
    middle, corner = (12.0, 12.0, 20.0, 20.0), (0.0, 0.0, 4.0, 4.0)
    seen = iter([([middle, corner], [0.4, 0.2]), ([corner, middle], [0.45, 0.41]), *3 * [([middle], [0.38])]])

    class Seeing(DensePerceiver):
        def __init__(self) -> None:
            pass

        def answer(self, queries: Sequence[Query]) -> list[TileObjects | TileMasks | TileChange]:
            assert [(q.text, q.modality) for q in queries] == [("ship", "sar")]
            boxes, scores = next(seen)
            return [TileObjects(boxes=boxes, scores=scores, threshold=0.5, known=True, scale=1.0)]

    chips = [
        Scene(Record(str(i), "opensarship", "val", (), 32, 32, "sar"), [np.zeros((32, 32, 3), np.uint8)])
        for i in range(5)
    ]
    fitted = fit_calibration(gather(Seeing(), chips))
    # The best takes all five and one beside the ship; the next lower box, at .2, costs less than a standard error.
    assert fitted.detect["ship sar"] == pytest.approx((0.38 + 0.2) / 2)
    assert "ship" not in fitted.detect


def test_a_scene_is_decoded_with_its_mask(squares: Path) -> None:
    scene = read_scenes(squares, {"epfl_roads": MASK_SETS["epfl_roads"]}, "train")[0]
    assert isinstance(scene, Scene)
    assert scene.mask is not None
    assert set(np.unique(scene.mask)) == {0, 1}
    assert len(scene.images) == 1
