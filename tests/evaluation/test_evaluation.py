import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from toy import ScriptedModel, write_toy

from model_server.evaluation import __main__ as command
from model_server.evaluation.answering import evaluate_answers
from model_server.evaluation.caption_metrics import tokenize
from model_server.evaluation.captioning import best_constant, evaluate_captions
from model_server.evaluation.classification import evaluate_classes
from model_server.evaluation.dataset import read_set
from model_server.evaluation.report import markdown, print_tables
from model_server.evaluation.results import Results, Row
from model_server.training.records import DataError

KEYS = {"set", "split", "task", "protocol", "metric", "value", "n", "controls"}


def _evaluate(data_dir: Path, model: ScriptedModel, *more: str) -> Results:
    defaults = ["--sets", "toy", "--tasks", "caption,classify,vqa", "--out", str(data_dir / "out" / "results.json")]
    return command.evaluate(model, command.parser().parse_args([str(data_dir), *defaults, *more]))


def _row(results: Results, protocol: str, metric: str) -> Row:
    (row,) = [row for row in results.rows if (row.protocol, row.metric) == (protocol, metric)]
    return row


def test_every_task_is_measured_beside_its_controls(toy_data: Path, scripted: ScriptedModel) -> None:
    results = _evaluate(toy_data, scripted)
    assert results.notes == []

    scene = _row(results, "top1", "accuracy")
    assert (scene.value, scene.n) == (1.0, 6)
    assert scene.controls == pytest.approx({"majority": 1 / 3, "blind": 1 / 3})
    assert _row(results, "top1", "ece").value == pytest.approx(0.1)

    bleu1 = _row(results, "coco", "bleu1")
    assert bleu1.value == pytest.approx(1)
    assert bleu1.controls["blind"] == pytest.approx(0, abs=0.01)
    cider = _row(results, "coco", "cider")
    assert 0 < (cider.controls["constant"] or 0) < cider.value
    assert cider.controls["neighbours32"] is not None

    exact = _row(results, "exact", "accuracy")
    assert (exact.value, exact.n) == (1.0, 18)
    assert exact.controls == pytest.approx({"majority": 2 / 3, "blind": 2 / 3})
    assert _row(results, "exact", "accuracy/count").n == 6
    assert _row(results, "exact", "balanced_accuracy/presence").controls["blind"] == 0.5
    assert _row(results, "exact", "ece").value == pytest.approx(0.2)
    assert _row(results, "exact", "coverage").value == 1
    assert _row(results, "rsvqa-geochat", "accuracy").n == 12
    assert _row(results, "rsvqa-full", "accuracy").n == 18

    for protocol in ("presence-labels", "presence-labels/held-out-phrasing"):
        labels = _row(results, protocol, "balanced_accuracy")
        assert (labels.value, labels.n) == (1.0, 18)
        assert labels.controls["blind"] == 0.5


def test_held_out_questions_differ_from_those_of_the_data(toy_data: Path) -> None:
    asked: list[str] = []

    class Listening(ScriptedModel):
        def answer(self, queries):
            asked.extend(query.text for query in queries)
            return super().answer(queries)

    results = _evaluate(toy_data, Listening(), "--tasks", "vqa")
    own, reworded = asked[:18], asked[36:54]  # the blind are asked the same first, and never in other words
    assert own[0] == "Is a river present?"
    assert asked[18:36] == own
    assert not set(own) & set(reworded)
    assert all("river" in question.lower() for question in reworded)
    again: list[str] = asked.copy()
    asked.clear()
    _evaluate(toy_data, Listening(), "--tasks", "vqa")
    assert asked == again
    assert _row(results, "exact/held-out-phrasing", "accuracy").n == 18


def test_results_follow_the_schema_and_hold_only_finite_numbers(toy_data: Path, scripted: ScriptedModel) -> None:
    results = _evaluate(toy_data, scripted)
    results.write(toy_data / "out" / "results.json")
    rows = json.loads((toy_data / "out" / "results.json").read_text())
    assert len(rows) == len(results.rows)
    for row in rows:
        assert set(row) == KEYS
        assert math.isfinite(row["value"])
        assert 0 <= row["value"] <= (10 if row["metric"] == "cider" else 1)
        assert row["n"] > 0
        assert all(value is None or math.isfinite(value) for value in row["controls"].values())
    keys = [tuple(row[key] for key in ("set", "split", "task", "protocol", "metric")) for row in rows]
    assert len(set(keys)) == len(keys)


def test_a_test_folder_alone_gives_figures_without_the_controls_that_need_training_data(
    tmp_path: Path, scripted: ScriptedModel
) -> None:
    write_toy(tmp_path / "kept", "test", 2)
    results = _evaluate(tmp_path / "kept", scripted, "--split", "test", "--sets", "toy,other")
    assert _row(results, "coco", "cider").controls["neighbours32"] is None
    assert _row(results, "coco", "cider").controls["blind"] is not None
    assert _row(results, "top1", "accuracy").controls["majority"] is None
    assert _row(results, "exact", "accuracy").controls["majority"] is None
    assert any("other" in note and "no such set" in note for note in results.notes)
    assert sum("train" in note for note in results.notes) == 3


def test_training_data_kept_elsewhere_serve_the_controls(tmp_path: Path, scripted: ScriptedModel) -> None:
    write_toy(tmp_path / "kept", "test", 2)
    write_toy(tmp_path / "data", "train", 4)
    more = ("--split", "test", "--train-data", str(tmp_path / "data"))
    results = _evaluate(tmp_path / "kept", scripted, *more)
    assert results.notes == []
    assert _row(results, "coco", "cider").controls["neighbours32"] is not None
    caches = list((tmp_path / "kept" / "out").glob("*.npz"))
    assert [cache.name for cache in caches] == ["neighbours-toy-0123456789abcdef.npz"]
    encoded = scripted.encoded
    _evaluate(tmp_path / "kept", scripted, *more)
    assert scripted.encoded == encoded + 6  # the evaluated images only; the training images come from the cache


def test_no_evaluated_image_is_its_own_neighbour(toy_data: Path, tmp_path: Path) -> None:
    data = read_set(toy_data, toy_data, "toy", "train", 6, tmp_path)
    assert len(data.records) == 6
    assert not {record.id for record in data.records} & {record.id for record in data.train}
    assert len(data.train) == 6


def test_a_limit_keeps_an_even_spread_of_the_classes(toy_data: Path, tmp_path: Path) -> None:
    data = read_set(toy_data, toy_data, "toy", "val", 3, tmp_path)
    assert {record.scene for record in data.records} == {"river", "forest", "bare_land"}
    assert (data.info.images, data.info.available, data.info.pixels) == (3, 6, "16x12")


def test_a_set_without_an_annotation_gets_no_row_but_a_reason(tmp_path: Path, scripted: ScriptedModel) -> None:
    write_toy(tmp_path, "val", 1)
    file = tmp_path / "toy" / "records.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps({k: row[k] for k in list(row)[:5]}) + "\n" for row in rows))
    data, results = read_set(tmp_path, tmp_path, "toy", "val", None, tmp_path), Results()
    for task in (evaluate_captions, evaluate_classes, evaluate_answers):
        task(scripted, data, results)
    assert results.rows == []
    assert [note.split(":")[0] for note in results.notes] == ["toy"] * 3


def test_no_set_at_all_is_an_error_that_names_those_there(toy_data: Path, scripted: ScriptedModel) -> None:
    with pytest.raises(DataError, match=r"ucm.*toy"):
        _evaluate(toy_data, scripted, "--sets", "ucm")


def test_the_constant_caption_is_the_one_nearest_to_all_others() -> None:
    common, rare = tokenize("a green river near some trees"), tokenize("planes on an airfield")
    documents = [[common], [common, tokenize("a green river")], [rare], [tokenize("a river near some trees")]]
    assert best_constant(documents) == common


def test_the_report_shows_every_figure_with_its_controls_and_how_to_get_it_again(
    toy_data: Path, scripted: ScriptedModel
) -> None:
    results = _evaluate(toy_data, scripted)
    page = markdown(results, scripted.info, "python -m model_server.evaluation DATA_DIR", "2030-01-02")
    for text in ("2030-01-02", "sha256:0123456789abcdef0123", "python -m model_server.evaluation DATA_DIR"):
        assert text in page
    ours = [line for line in page.splitlines() if "| **ours** |" in line]
    for row in results.rows:
        start = f"| {row.set} | {row.metric.partition('/')[2]} |"
        assert any(line.startswith(start) and f" {row.value:.3f} |" in line for line in ours)
    assert "| toy | 6 | 6 | 16x12 |" in page
    assert "| toy |  | 6 | neighbours32 |" in page
    console = Console(record=True, width=160)
    print_tables(results, console)
    assert "presence-labels/held-out-names" in console.export_text()


def test_the_command_measures_a_real_checkpoint(toy_data: Path, debug_weights: Path, tmp_path: Path) -> None:
    out, report = tmp_path / "out" / "results.json", tmp_path / "RESULTS.md"
    arguments = ["--sets", "toy,absent", "--out", out, "--weights", debug_weights, "--report", report]
    run = subprocess.run(
        [sys.executable, "-m", "model_server.evaluation", toy_data, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"},
    )
    assert run.returncode == 0, run.stderr
    rows = json.loads(out.read_text())
    assert {row["task"] for row in rows} == {"caption", "classify", "vqa", "retrieve"}
    assert "absent: the data directory has no such set: absent" in run.stdout
    assert "--weights WEIGHTS_DIR" in report.read_text()
    assert list(out.parent.glob("neighbours-toy-*.npz"))


def test_a_folder_without_a_checkpoint_is_one_line_of_error(
    toy_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [toy_data, "--sets", "toy", "--out", tmp_path / "r.json", "--weights", tmp_path / "none"]
    assert command.main([str(argument) for argument in arguments]) == 2
    assert "none" in capsys.readouterr().err
    assert not (tmp_path / "r.json").exists()
