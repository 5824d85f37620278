"""Radar knowledge, then radar tasks: what each stage trains; an interrupted run goes on as if it had not been."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from model_server.training import radar
from model_server.training.radar import RadarRun, RadarTrainer


@pytest.fixture(scope="module")
def examples(labelled_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    run = RadarRun(data=labelled_data, run=tmp_path_factory.mktemp("none"), config="debug", limit=6)
    return {"knowledge": radar.knowledge(run, 64), "tasks": radar.tasks(run, 64)}


@pytest.fixture
def run(labelled_data: Path, examples: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RadarRun:
    for name, found in examples.items():
        monkeypatch.setattr(radar, name, lambda *_, found=found: found)
    return RadarRun(data=labelled_data, run=tmp_path / "a", config="debug", steps=3, every=1, batch=4)


def test_points_have_an_embedding_and_radar_tasks_are_ships_boxes_and_masks(examples: dict) -> None:
    assert all(example.anchors is not None for example in examples["knowledge"][0])
    asked = {example.task for example in examples["tasks"][0]}
    assert asked == {"[VQA]", "[VG]", "[SEG]"}
    assert {e.question for e in examples["tasks"][0] if e.task == "[VQA]"} == {radar.SHIP}


def test_knowledge_trains_the_modulation_and_tasks_leave_every_bit_of_it(run: RadarRun) -> None:
    RadarTrainer(run).fit()
    first, second = (
        torch.load(run.run / f"radar-{stage}.pt", weights_only=True)["state"] for stage in radar.STAGES
    )  # fmt: skip
    known = {name for name in first if name.startswith("modulation.")}
    assert all(torch.equal(first[name], second[name]) for name in known)
    assert first["modulation.film.2.weight"].any()
    assert any(not torch.equal(first[name], second[name]) for name in first.keys() - known)
    lines = [json.loads(line) for line in (run.run / "radar.jsonl").read_text().splitlines()]
    assert {line["stage"] for line in lines if "loss" in line} == set(radar.STAGES)
    assert "nats without anchors" in lines[0].get("val", lines[1].get("val", {}))


def test_an_interrupted_run_ends_with_the_same_weights(
    run: RadarRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    RadarTrainer(run).fit()
    whole = torch.load(run.run / "radar-tasks.pt", weights_only=True)["state"]
    other = RadarRun(**{**vars(run), "run": tmp_path / "b"})
    step = RadarTrainer._step

    def interrupted(self: RadarTrainer, stage: radar.Stage, number: int, *rest: object) -> float:
        if (stage, number) == ("tasks", 1):
            raise KeyboardInterrupt
        return step(self, stage, number, *rest)  # pyright: ignore[reportArgumentType]  # passed on as they come

    with monkeypatch.context() as patch:
        patch.setattr(RadarTrainer, "_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            RadarTrainer(other).fit()
    RadarTrainer(other).fit()
    again = torch.load(other.run / "radar-tasks.pt", weights_only=True)["state"]
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_the_command_wants_a_config_that_there_is(tmp_path: Path) -> None:
    import typer

    app = typer.Typer()
    app.command()(radar.main)
    done = CliRunner().invoke(app, [str(tmp_path), "--run", str(tmp_path), "--config", "huge"])
    assert done.exit_code == 2
    assert "nano or debug" in done.output
