"""The training command on a small set made here: it learns, resumes to the same weights, and exports."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from model_server.model.rsvlm import RSVLM
from model_server.perceiver import Perceiver, Query
from model_server.protocol import TileCaption
from model_server.training.answers import AnswersRun, AnswersTrainer
from model_server.training.export import calibrate, export, fit_logistic, fit_temperature
from model_server.training.language import SETS, LanguageRun, LanguageTrainer
from model_server.training.packing import IGNORE, pack, packed_hidden
from model_server.training.polish import Polisher, PolishRun
from model_server.training.texts import Text
from model_server.training.vision import VisionRun, VisionTrainer

COLOURS = {"forest": (20, 120, 30), "beach": (220, 200, 140), "river": (30, 60, 180)}


@pytest.fixture(scope="module")
def vision_run(coloured_scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run")
    settings = VisionRun(
        data=coloured_scenes, run=run, config="debug", steps=120, batch=12, rate=4e-3, every=120, ema=0.9
    )
    VisionTrainer(settings).fit()
    return run


def logged(run: Path, stage: str) -> list[dict]:
    return [json.loads(line) for line in (run / f"{stage}.jsonl").read_text().splitlines()]


def test_the_vision_stage_learns_scenes_of_plain_colours(vision_run: Path) -> None:
    figures = [line["val"] for line in logged(vision_run, "vision") if "val" in line][-1]
    assert figures["ucm"] >= 0.99
    assert figures["presence_balanced"] > 0.9


def test_a_stage_that_was_cut_off_resumes_to_the_weights_of_one_that_was_not(
    coloured_scenes: Path, vision_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    weights = []
    for name, cut in (("whole", None), ("cut", 3)):
        run = tmp_path / name
        run.mkdir()
        (run / "vision.pt").write_bytes((vision_run / "vision.pt").read_bytes())
        settings = LanguageRun(
            data=coloured_scenes, run=run, config="debug", steps=6, batch=6, every=3, dropout=0, bf16=False
        )
        trainer = LanguageTrainer(settings)
        if cut:
            stop = RuntimeError("cut off")

            def failing(
                rows: np.ndarray, images: torch.Tensor, t: LanguageTrainer = trainer, e: Exception = stop
            ) -> float:
                if t.step == 4:
                    raise e
                return LanguageTrainer.train_step(t, rows, images)

            monkeypatch.setattr(trainer, "train_step", failing)
            with pytest.raises(RuntimeError, match="cut off"):
                trainer.fit()
            trainer = LanguageTrainer(settings)
            assert trainer.step == 3
        trainer.fit()
        weights.append(trainer.average.decoder.embed.weight.clone())
    torch.testing.assert_close(weights[0], weights[1], atol=1e-6, rtol=0)


def test_all_stages_give_a_checkpoint_that_answers_and_is_calibrated(coloured_scenes: Path, vision_run: Path) -> None:
    shared = {"data": coloured_scenes, "run": vision_run, "config": "debug", "batch": 16, "dropout": 0.0}
    LanguageTrainer(LanguageRun(**shared, steps=160, rate=4e-3, every=160, ema=0.9)).fit()
    trainer = Polisher(PolishRun(**shared, steps=4, every=4, samples=3))
    trainer.fit()
    losses = [line["loss"] for line in logged(vision_run, "language") if "loss" in line]
    assert losses[-1] < losses[0]
    answers = AnswersTrainer(AnswersRun(**shared, steps=60, rate=2e-3, every=60, ema=0.9))
    answers.fit()
    assert_answers_better_and_describes_the_same(answers)
    export(trainer, vision_run / "weights")
    fitted = calibrate(vision_run / "weights", coloured_scenes, SETS)
    perceiver = Perceiver.load(vision_run / "weights")
    assert perceiver.calibration == fitted
    said = {}
    for scene, colour in COLOURS.items():
        (answer,) = perceiver.answer([Query("caption", np.full((64, 64, 3), colour, np.uint8))])
        assert isinstance(answer, TileCaption)
        said[scene] = answer.caption
    assert all(scene in caption for scene, caption in said.items()), said


def assert_answers_better_and_describes_the_same(trainer: AnswersTrainer) -> None:
    """Against the stage before: comparisons that counts settle are likelier, captions are as good as unchanged."""
    image = torch.tensor(COLOURS["river"], dtype=torch.uint8)[None, :, None, None].expand(1, 3, 64, 64)
    features = trainer.maps(image)
    record = next(i for i, r in enumerate(trainer.train) if r.set == "rsvqa_lr" and "yes" in {q.answer for q in r.qa})
    compared = [t for t in trainer.texts[record].questions if " than " in t.question][:40]
    captions = [Text("[CAP]", "", "there is a river"), Text("[CAP]", "", "this is a river")]
    before, after = (text_loss(trainer, model, features, compared) for model in (trainer.held, trainer.average))
    assert after < 0.7 * before
    before, after = (text_loss(trainer, model, features, captions) for model in (trainer.held, trainer.average))
    assert after == pytest.approx(before, abs=0.1)


def text_loss(trainer: AnswersTrainer, model: RSVLM, features: tuple, texts: list[Text]) -> float:
    """Mean cross-entropy of the tokens of texts about one image."""
    packed = pack([texts], trainer.tokenizer, trainer.questions, 1.0)
    with torch.inference_mode():
        hidden = packed_hidden(model, model.fuse(*features), packed, torch.zeros(1, dtype=torch.long))
        wanted = packed.target[packed.target != IGNORE]
        return float(F.cross_entropy(model.decoder.logits(hidden[packed.target != IGNORE]), wanted))


def test_a_logistic_fit_recovers_a_known_one() -> None:
    x = torch.linspace(-4, 4, 400)
    fitted = fit_logistic(x, torch.sigmoid(0.5 * x + 1.0))
    assert fitted.slope == pytest.approx(0.5, abs=0.02)
    assert fitted.offset == pytest.approx(1.0, abs=0.02)


def test_an_overconfident_list_gets_a_temperature_above_one() -> None:
    logs = [torch.tensor([0.98, 0.02]).log() for _ in range(10)]
    assert fit_temperature(logs, [0] * 7 + [1] * 3) > 2


def test_runs_are_plain_dataclasses_with_the_defaults_of_the_shipped_model() -> None:
    assert dataclasses.asdict(VisionRun(data=Path("d"), run=Path("r")))["config"] == "nano"
