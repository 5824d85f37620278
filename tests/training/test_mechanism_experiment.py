"""The experiment on how the image enters the decoder, at debug size on plain colours."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model_server.evaluation.page import PAGE
from model_server.model.config import debug
from model_server.model.rsvlm import RSVLM
from model_server.training.mechanisms import JSON, SETS, VARIANTS, Bench, Setting, main, measured, section

COLOURS = {"forest": (20, 120, 30), "beach": (220, 200, 140), "river": (30, 60, 180)}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for name in SETS:
        (root / name).mkdir()
        rows = []
        for i in range(18):
            scene = list(COLOURS)[i % 3]
            pixels = np.clip(np.array(COLOURS[scene]) + rng.normal(0, 12, (64, 64, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
            row: dict[str, object] = {
                "id": f"{name}_{i}", "split": "val" if i >= 12 else "train", "images": [f"{i}.png"], "width": 64,
                "height": 64, "scene": scene, "captions": [f"there is a {scene} .", f"this is a {scene} ."],
            }  # fmt: skip
            if name == "ucm":
                row["presence"] = {"water": scene == "river", "trees": scene == "forest"}
            rows.append(json.dumps(row))
        (root / name / "records.jsonl").write_text("\n".join(rows) + "\n")
    return root


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What stage `vision` leaves behind, untrained."""
    torch.manual_seed(0)
    run, config = tmp_path_factory.mktemp("run"), debug()
    vocabulary = {"labels": list(config.labels), "objects": list(config.objects), "concepts": ["a"] * config.concepts}
    state = {k: v for k, v in RSVLM(config).state_dict().items() if k.startswith(("backbone.", "heads."))}
    torch.save({"average": state, "vocabulary": vocabulary}, run / "vision.pt")
    return run


def test_the_variants_differ_in_what_they_look_at_and_share_what_they_start_from(data: Path, vision: Path) -> None:
    bench = Bench(data, vision, Setting(steps=1, batch=4, limit=6, config="debug"))
    models = {name: bench.model(name, 0) for name in VARIANTS}
    assert {name: (m.sfi is not None, len(m.decoder.mda), len(m.decoder.inject)) for name, m in models.items()} == {
        "concatenation": (False, 0, 0), "SFI": (True, 0, 0), "MDA": (False, 1, 0), "injection": (False, 0, 1),
        "SFI + MDA": (True, 1, 0),
    }  # fmt: skip
    assert all(m.from_last is not None for m in models.values())
    for model in models.values():
        assert torch.equal(model.heads.labels.weight, bench.vision["heads.labels.weight"])
        assert not model.heads.labels.weight.requires_grad
        assert model.queries.requires_grad


def test_a_variant_learns_captions_and_answers_of_plain_colours(data: Path, vision: Path) -> None:
    torch.set_num_threads(1)
    bench = Bench(data, vision, Setting(steps=150, batch=12, rate=4e-3, limit=12, config="debug"))
    before = bench.measure(bench.model("SFI + MDA", 0).eval())
    found = bench.outcome("SFI + MDA", 0)
    assert set(found.figures) == {"ucm BLEU-1", "ucm CIDEr", "rsicd_aid BLEU-1", "rsicd_aid CIDEr", "scene",
                                  "presence"}  # fmt: skip
    assert found.figures["ucm BLEU-1"] > before["ucm BLEU-1"] + 0.3
    assert found.figures["scene"] > 0.6


def test_the_command_measures_every_variant_writes_a_section_and_goes_on_where_it_was_cut_off(
    data: Path, vision: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / PAGE).write_text("# Results\n\n## Absent\n\n- nothing\n")
    small = {"steps": 2, "batch": 4, "limit": 4, "config": "debug", "threads": 1}
    main(data, vision, tmp_path, seeds=1, **small)
    text = (tmp_path / PAGE).read_text()
    assert all(f"| {name} |" in text for name in VARIANTS)
    assert "2 steps of 4" in text
    stored = json.loads((tmp_path / JSON).read_text())
    stored["outcomes"].pop()
    (tmp_path / JSON).write_text(json.dumps(stored))
    capsys.readouterr()
    main(data, vision, tmp_path, seeds=1, **small)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [json.loads(line)["variant"] for line in said] == [list(VARIANTS)[-1]]
    assert len(measured(tmp_path / JSON, Setting(steps=2, batch=4, limit=4, config="debug"))) == len(VARIANTS)
    assert measured(tmp_path / JSON, Setting()) == []
    assert section(tmp_path / "nowhere") == []
