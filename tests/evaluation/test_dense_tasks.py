"""Every dense task on pictures whose answers are known: the figures are worked out by hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from dense_toy import HEIGHT, WIDTH, ScriptedDense, write_pairs, write_records, write_ships, write_water
from toy import write_toy

from model_server.evaluation import __main__ as command
from model_server.evaluation import scale
from model_server.evaluation.counting import number
from model_server.evaluation.labelled import denied, words_for
from model_server.evaluation.looking import look, windows
from model_server.evaluation.referring import references, vrsbench_iou
from model_server.evaluation.report import embeddings_section, markdown
from model_server.evaluation.results import Results, Row
from model_server.evaluation.retrieval import expected_recall
from model_server.perceiver import Query
from model_server.protocol import TaskNotServed, TileMasks, TileObjects
from model_server.text.concepts import DISTRACTORS
from model_server.training.records import LabelledBox, Record

LARGE, SMALL = (10, 10, 30, 25), (60, 40, 68, 46)


@pytest.fixture
def dense() -> ScriptedDense:
    return ScriptedDense()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    write_ships(folder, "train", [([LARGE], []), ([LARGE, SMALL], []), ([LARGE, SMALL], [])])
    write_ships(folder, "val", [([LARGE, SMALL], []), ([SMALL], [LARGE]), ([], [])])
    write_water(folder, "train", [((0, 0, 90, 50), (0, 0, 90, 50))])
    write_water(folder, "val", [((0, 0, 45, 60), (0, 0, 60, 60)), ((0, 0, 45, 60), (0, 0, 45, 60))])
    write_pairs(folder, "val", [((0, 0, 40, 30), (0, 0, 40, 40)), (None, None)])
    return folder


def measured(folder: Path, model: ScriptedDense, sets: str, tasks: str, *more: str) -> Results:
    arguments = [str(folder), "--sets", sets, "--tasks", tasks, "--out", str(folder.parent / "results.json"), *more]
    return command.evaluate(model, command.parser().parse_args(arguments))


def row(results: Results, protocol: str, metric: str) -> Row:
    (found,) = [row for row in results.rows if (row.protocol, row.metric) == (protocol, metric)]
    return found


# --- ground ----------------------------------------------------------------------------------------------------------


def test_three_of_four_ships_found_give_the_ap_and_f1_of_three_of_four(data: Path, dense: ScriptedDense) -> None:
    results = measured(data, dense, "inshore_ships", "ground")
    ap = row(results, "map", "ap50")
    assert (ap.value, ap.n) == (pytest.approx(76 / 101), 4)  # precision 1 up to recall 0.75
    assert row(results, "map", "ap50_95").value == pytest.approx(76 / 101)
    assert row(results, "map", "f1_50").value == pytest.approx(6 / 7)  # the unsure ship is below the threshold
    assert row(results, "map", "f1_25/ship").value == pytest.approx(6 / 7)
    assert ap.controls["blind"] == 0
    # Two of three training images have both ships, as the first image has; the second has them, too; the third none.
    assert row(results, "map", "f1_50").controls["constant"] == pytest.approx(8 / 10)


def test_other_words_count_as_far_as_they_are_understood(data: Path, dense: ScriptedDense) -> None:
    results = measured(data, dense, "inshore_ships", "ground")
    other = row(results, "map/held-out-phrasing", "ap50")
    assert other.value == pytest.approx(76 / 101 / 5)  # one of the five, "vessels"
    assert other.controls == {"label_words": pytest.approx(76 / 101)}


def test_what_the_labels_deny_and_the_model_asserts_is_a_hallucination(data: Path, dense: ScriptedDense) -> None:
    class Everywhere(ScriptedDense):
        def _objects(self, query: Query) -> TileObjects:
            return super()._objects(query).model_copy(update={"threshold": 0.2, "known": query.text == "ship"})

    few, many = (
        row(measured(data, model, "inshore_ships", "ground"), "absent", "hallucination")
        for model in (dense, Everywhere())
    )
    assert (few.value, few.n, few.controls) == (0, 1, {"present": 1})
    # The image without ships is of one colour, so that even the second model sees nothing on it.
    assert (many.value, many.n) == (0, 1)
    noisy = data / "inshore_ships" / "images" / "val_2.png"
    noisy.write_bytes((data / "flood" / "images" / "val_0.png").read_bytes())
    worse = measured(data, Everywhere(), "inshore_ships", "ground")
    assert row(worse, "absent", "hallucination/ship").value == 1
    assert row(measured(data, dense, "inshore_ships", "ground"), "absent", "hallucination").value == 0


def test_what_is_denied_follows_from_presence_labels_and_complete_sets_only() -> None:
    def record(name: str, **more) -> Record:
        return Record(id="r", set=name, split="val", images=(Path("x"),), width=9, height=9, **more)

    assert {"ship", "car", "vehicle"} <= set(denied(record("ucm", presence={"ship": False, "cars": False})))
    assert denied(record("ucm", presence={"ship": True})) == []
    assert denied(record("elsewhere", objects=(LabelledBox("ship", (0, 0, 1, 1)),))) == []
    trees = denied(record("neon_trees", objects=(LabelledBox("tree", (0, 0, 1, 1)),)))
    assert "ship" in trees
    assert len(set(trees) & set(DISTRACTORS)) == 6
    assert not {"tree", "forest"} & set(trees)
    assert [words_for(name) for name in ("oil_spill", "look_alike", "storage_tank")] == [
        "oil spill", "look-alike", "storage tank",
    ]  # fmt: skip


def test_ground_scale_and_modality_go_with_every_question(data: Path, dense: ScriptedDense) -> None:
    measured(data, dense, "inshore_ships,oscd", "ground,detect_change")
    assert {(query.task, query.gsd_m, query.modality) for query in dense.asked} == {
        ("ground", 0.5, "optical"), ("detect_change", 10, "optical"),
    }  # fmt: skip


# --- segment and change ----------------------------------------------------------------------------------------------


def test_masks_are_counted_over_all_images_beside_constant_and_blind_ones(data: Path, dense: ScriptedDense) -> None:
    results = measured(data, dense, "flood", "segment")
    iou = row(results, "miou", "iou")
    assert (iou.value, iou.n) == (pytest.approx((45 + 45) / (60 + 45)), 2)
    assert row(results, "miou", "iou/water").value == iou.value
    share = (60 + 45) / (2 * WIDTH)
    assert iou.controls == pytest.approx({"majority": share, "everything": share, "blind": 0})
    assert row(results, "miou", "boundary_f1").value == pytest.approx(0.5)  # one of two edges is where it should be
    other = row(results, "miou/held-out-phrasing", "iou/water")
    assert other.value == pytest.approx(iou.value / 5)  # one of the five, "flood"
    assert other.controls == {"label_words": iou.value}


def test_change_is_pooled_over_pairs_and_nothing_changes_in_still_ones(data: Path, dense: ScriptedDense) -> None:
    results = measured(data, dense, "oscd", "detect_change")
    figures = {metric: row(results, "binary", metric) for metric in ("f1", "iou", "precision", "recall")}
    assert {m: r.value for m, r in figures.items()} == pytest.approx(
        {"f1": 2 * 0.75 / 1.75, "iou": 0.75, "precision": 1, "recall": 0.75}
    )
    share = 1600 / (2 * WIDTH * HEIGHT)
    assert figures["iou"].controls["all_changed"] == pytest.approx(share)
    assert figures["f1"].controls["none_changed"] == 0
    # Without the first image all but its mean colour is gone; here that is the ground's, so nothing is lost.
    assert figures["f1"].controls["dropped_before"] == pytest.approx(figures["f1"].value)
    assert row(results, "still", "false_change/identical").value == 0
    assert row(results, "still", "false_change/relit").n == 2


# --- refer, count, retrieve ------------------------------------------------------------------------------------------


def test_phrases_are_made_only_where_the_boxes_leave_no_doubt() -> None:
    def phrases(*boxes: tuple[int, int, int, int]) -> dict[str, tuple[float, ...]]:
        objects = tuple(LabelledBox("ship", box) for box in boxes)
        record = Record("r", "s", "val", (Path("x"),), WIDTH, HEIGHT, objects=objects)
        return {ref.phrase: tuple(ref.box) for ref in references(record, ["ship"])}

    assert phrases() == {}
    assert phrases(LARGE) == {"the ship": LARGE}
    two = phrases(LARGE, SMALL)
    assert len(two) == 6
    meant = {"largest": LARGE, "smallest": SMALL, "leftmost": LARGE, "topmost": LARGE, "rightmost": SMALL,
             "bottommost": SMALL, "lower right": SMALL, "upper left": LARGE}  # fmt: skip
    for phrase, box in two.items():
        assert [box] == [wanted for word, wanted in meant.items() if word in phrase]
    alike = (10, 12, 30, 27)
    assert not any("largest" in phrase or "topmost" in phrase for phrase in phrases(LARGE, alike))


def test_referring_takes_the_best_box_for_the_phrase_as_it_is(data: Path, dense: ScriptedDense) -> None:
    results = measured(data, dense, "inshore_ships", "refer")
    strict = row(results, "iou", "acc50")
    # The scripted model reads "ship" and no more: its best box is the same as for the label alone.
    assert strict.n == 12
    assert 0 < strict.value < 1
    assert strict.controls["label_only"] == strict.value
    assert strict.controls["blind"] == 0
    assert row(results, "vrsbench", "acc70").value == strict.value


def test_vrsbench_counts_each_of_the_hundred_integers_as_a_pixel() -> None:
    record = Record("r", "s", "val", (Path("x"),), 200, 100)
    truth, box = np.array([0.0, 0, 18, 9]), np.array([0.0, 0, 38, 9])
    assert vrsbench_iou(box, truth, record) == pytest.approx(10 / 20)  # integers 0..9 and 0..19
    assert vrsbench_iou(truth, truth, record) == 1


def test_counts_are_of_the_boxes_worth_giving_beside_what_is_said(data: Path, dense: ScriptedDense) -> None:
    results = measured(data, dense, "inshore_ships", "count")
    mae = row(results, "mae", "mae")
    assert (mae.value, mae.n) == (pytest.approx(1 / 3), 3)  # of 2, 2 and 0 ships it gives 2, 1 and 0, and says 1, 1, 0
    assert mae.controls == pytest.approx({"text": 2 / 3, "blind": 4 / 3, "median": 2 / 3})
    assert row(results, "mae", "exact").value == pytest.approx(2 / 3)
    assert [number(text) for text in ("12", "twenty-two", "about 3 ships", "none")] == [12, 22, 3, 0]


def test_recall_expects_ties_to_break_at_random() -> None:
    similarity = np.array([[0.9, 0.5, 0.5, 0.1], [0.5, 0.5, 0.5, 0.5]])
    right = np.array([[False, True, False, False], [True, True, False, False]])
    assert expected_recall(similarity, right, 1) == pytest.approx((0 + 1 / 2) / 2)
    assert expected_recall(similarity, right, 2) == pytest.approx((1 / 2 + (1 - 1 / 6)) / 2)
    assert expected_recall(similarity, right, 4) == 1


def test_captions_find_their_images_and_repeated_ones_all_that_bear_them(
    tmp_path: Path, dense: ScriptedDense
) -> None:
    write_toy(tmp_path / "data", "val", 2)
    results = measured(tmp_path / "data", dense, "toy", "retrieve")
    # Two images of each scene share their two captions: only one is a caption's own, both bear it.
    assert row(results, "recall/same-text", "r1").value == 1
    assert row(results, "recall", "r5").value > row(results, "recall", "r1").value
    assert row(results, "recall", "r1/text_to_image").controls["chance"] == pytest.approx(1 / 6)
    assert row(results, "recall", "r1/image_to_text").n == 6
    assert row(results, "recall", "r10/text_to_image").value == 1


# --- around the tasks ------------------------------------------------------------------------------------------------


def test_a_large_image_is_cut_and_its_answers_are_put_together(dense: ScriptedDense) -> None:
    image = np.full((100, 300, 3), 80, np.uint8)
    image[20:60, 90:130] = (200, 0, 0)
    image[70:90, 250:290] = (210, 0, 0)
    assert windows(300, 100, 128, 64) == [(0, 0, 128, 100), (57, 0, 185, 100), (114, 0, 242, 100), (172, 0, 300, 100)]
    (whole,) = look(dense, [Query("ground", image, text="ship")], TileObjects)
    cut = [Query("ground", image, text="ship"), Query("ground", image, text="ships")]
    found = look(dense, cut, TileObjects, side=280)
    worth = [[box for box, s in zip(a.boxes, a.scores, strict=True) if s > 0.5] for a in (whole, *found)]
    # The second window sees all of what the first one cuts, at the same score.
    assert worth[0] == worth[1] == worth[2] == [(90, 20, 130, 60), (250, 70, 290, 90)]
    (masks,) = look(dense, [Query("segment", image, labels=("water", "ship"))], TileMasks, side=280)
    assert masks.probabilities.shape == (2, 100, 300)


def test_no_task_asks_again_what_another_has_asked(data: Path, dense: ScriptedDense) -> None:
    measured(data, dense, "inshore_ships", "ground,count,refer")
    # The third image is of one colour and so its own blind control.
    asked = [(q.image.tobytes(), q.text) for q in dense.asked if q.task == "ground" and q.image.std(axis=(0, 1)).any()]
    assert len(set(asked)) == len(asked)


def test_a_model_without_boxes_is_noted_and_the_rest_is_measured(data: Path) -> None:
    class Words(ScriptedDense):
        def _dense(self, query: Query):
            raise TaskNotServed(query.task, "words", ("caption", "vqa"))

    write_toy(data, "val", 1)
    results = measured(data, Words(), "toy,inshore_ships", "classify,ground,count")
    assert {row.task for row in results.rows} == {"classify"}
    assert {note.split(",")[0] for note in results.notes if "has no part for ground" in note} == {
        "toy: no ground figures", "inshore_ships: no ground figures", "inshore_ships: no count figures",
    }  # fmt: skip


def test_an_unlabelled_set_gets_a_reason_for_every_task(tmp_path: Path, dense: ScriptedDense) -> None:
    write_toy(tmp_path, "val", 1)
    write_records(tmp_path, "bare", [{"id": "b", "split": "val", "images": ["none.png"]}])
    results = measured(tmp_path, dense, "bare", ",".join(command.TASKS))
    assert results.rows == []
    assert len(results.notes) == len(command.TASKS)
    assert all(note.startswith("bare: ") for note in results.notes)


def test_the_page_has_a_line_for_ours_and_for_each_control(data: Path, dense: ScriptedDense, tmp_path: Path) -> None:
    results = measured(data, dense, "inshore_ships,flood,oscd", "ground,segment,detect_change,refer,count")
    text = "# Land cover\n\n| input | mean |\n|---|---|\n| none | 11.1 |\n\nAgainst it, more.\n"
    (tmp_path / "AEF.md").write_text(text)
    page = markdown(results, dense.info, "again", "2030-01-02", embeddings_section(tmp_path))
    assert "| flood |  | 2 | **ours** | 0.857 | 0.500 |" in page
    assert "| flood |  | 2 | blind | 0.000 | 0.000 |" in page
    assert "| flood | water |" not in page  # the same again
    assert "| oscd | identical | 2 | **ours** | 0.000 |" in page
    assert "[AEF.md](AEF.md)" in page
    assert "| none | 11.1 |" in page
    assert "Against it, more." in page
    assert "no class masks in split 'val', so no segmentation row: inshore_ships, oscd" in page


def test_coarser_pixels_are_told_to_the_model_and_their_figures_are_plotted(data: Path, tmp_path: Path) -> None:
    model = ScriptedDense()
    curves = scale.run(model, data, ("inshore_ships", "absent"), "val", None, tmp_path / "docs")
    (ships,) = curves
    assert (ships.measure, ships.n, ships.gsd_m) == ("ship AP@0.5", 3, 0.5)
    assert ships.values[0] == pytest.approx(76 / 101)
    assert {query.gsd_m for query in model.asked} == {0.5, 1.0, 2.0, 4.0}
    assert {query.image.shape[:2] for query in model.asked} == {(60, 90), (30, 45), (15, 22), (8, 11)}
    section = "\n".join(scale.scale_section(tmp_path / "docs"))
    assert "| inshore_ships | ship AP@0.5 | 3 | 0.5 | 0.752 |" in section
    assert (tmp_path / "docs" / "scale.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_writes_rows_of_every_task_and_the_whole_page(data: Path, dense_weights: Path) -> None:
    write_toy(data, "train", 2)
    write_toy(data, "val", 2)
    docs = data.parent / "docs"
    arguments = ["--sets", "toy,inshore_ships,flood,oscd", "--weights", dense_weights, "--scale"]
    outputs = ["--out", data.parent / "results.json", "--report", docs / "RESULTS.md"]
    run = subprocess.run(
        [sys.executable, "-m", "model_server.evaluation", data, *map(str, [*arguments, *outputs])],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    tasks = {row["task"] for row in json.loads((data.parent / "results.json").read_text())}
    assert tasks == set(command.TASKS)
    assert (docs / "scale.json").is_file()
    assert "## Scale" in (docs / "RESULTS.md").read_text()
