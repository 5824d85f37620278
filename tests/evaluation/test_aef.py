"""The experiment on embeddings and backscatter: it finds knowledge where there is some, and only there."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from model_server.evaluation import aef
from model_server.evaluation.aef import Points, Reader, app, macro_f1, predict


def points(seed: int, noise: float = 0.1) -> Points:
    """Two bits make four classes: backscatter tells one of them, the embedding the other."""
    generator = torch.Generator().manual_seed(seed)
    seen, known = torch.randint(0, 2, (2, 200), generator=generator)
    backscatter = torch.stack((seen - 0.5, 0.5 - seen), 1) + noise * torch.randn(200, 2, generator=generator)
    embeddings = torch.randn(200, 64, generator=generator) * 0.05
    embeddings[:, 0] += known - 0.5
    return Points(backscatter, embeddings, 2 * seen + known)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aef, "STEPS", 120)


def accuracy(model: aef.Model) -> float:
    train, test = points(0), points(1)
    return float((predict(model, train, test, seed=0) == test.classes).float().mean())


def test_modulation_adds_what_backscatter_does_not_tell() -> None:
    assert accuracy("modulated") > 0.95
    assert 0.4 < accuracy("backscatter") < 0.6
    assert 0.4 < accuracy("embedding") < 0.6
    assert accuracy("shuffled") < 0.65
    assert accuracy("majority") < 0.4


def test_an_untrained_modulated_reader_equals_one_that_reads_backscatter_alone() -> None:
    torch.manual_seed(0)
    modulated, plain = Reader("modulated"), Reader("backscatter")
    plain.load_state_dict({name: t for name, t in modulated.state_dict().items() if not name.startswith("modulation")})
    given = points(0)
    assert torch.equal(modulated(given.backscatter, given.embeddings), plain(given.backscatter, given.embeddings))


def test_a_seed_gives_the_same_prediction_again() -> None:
    train, test = points(0), points(1)
    assert torch.equal(predict("shuffled", train, test, 3), predict("shuffled", train, test, 3))


def test_macro_f1_counts_each_class_of_the_truth_alike() -> None:
    true = torch.tensor([0, 0, 0, 1])
    assert macro_f1(torch.tensor([0, 0, 0, 1]), true) == 1
    assert macro_f1(torch.tensor([0, 0, 0, 0]), true) == pytest.approx((6 / 7) / 2)


def _write(path: Path, given: Points) -> None:
    names = ["vv_db", "vh_db", *(f"a{axis:02d}" for axis in range(64)), "dw_label"]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        for b, e, c in zip(given.backscatter, given.embeddings, given.classes, strict=True):
            writer.writerow([*b.tolist(), *e.tolist(), int(c)])


def test_the_command_writes_its_table_and_scores(tmp_path: Path) -> None:
    (tmp_path / "aef_points").mkdir()
    for seed, region in enumerate(("hills", "plain")):
        _write(tmp_path / "aef_points" / f"{region}.csv", points(seed))
    out, section = tmp_path / "scores.json", tmp_path / "section.md"
    run = ["--seeds", "1", "--output", str(out), "--markdown", str(section)]
    result = CliRunner().invoke(app, [str(tmp_path), *run])
    assert result.exit_code == 0, result.output
    scores = json.loads(out.read_text())["scores"]
    assert {(s["region"], s["model"]) for s in scores} == {(r, m) for r in ("hills", "plain") for m in aef.MODELS}
    assert section.read_text().strip() in result.output
    assert "| hills | plain |" in section.read_text()


def test_a_folder_without_regions_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, [str(tmp_path)])
    assert result.exit_code == 2
    assert "two or more regions" in result.output


def test_real_points_have_what_the_experiment_needs(labelled_data: Path) -> None:
    for path in (labelled_data / "aef_points").glob("*.csv"):
        found = aef.read_points(path)
        assert found.backscatter.shape == (720, 2)
        assert found.embeddings.shape == (720, 64)
        assert found.classes.unique().tolist() == list(range(9))
