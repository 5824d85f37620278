"""Training in several processes: two reach the weights that one reaches with the whole batches, and one of them writes.

This file is also what the launcher starts: `test_processes.py SCENES VIEWS RUN` trains every stage for a few steps.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model_server.training import processes
from model_server.training.answers import AnswersRun, AnswersTrainer
from model_server.training.dense import DenseRun, DenseTrainer
from model_server.training.images import batches, epoch_order, load_images
from model_server.training.language import LanguageRun, LanguageTrainer
from model_server.training.polish import Polisher, PolishRun
from model_server.training.processes import UnevenBatch
from model_server.training.vision import VisionRun, VisionTrainer

STEPS = 4  # one of which stage `language` has behind it: it resumes
WEIGHTS = {"vision": "net", "language": "model", "dense": "branch", "answers": "model"}
Trainer = VisionTrainer | LanguageTrainer | DenseTrainer


def texts(scenes: Path, run: Path) -> dict:
    return {"data": scenes, "run": run, "config": "debug", "steps": STEPS, "every": STEPS, "batch": 8, "limit": 24,
            "dropout": 0.0, "bf16": False}  # fmt: skip


def fit(trainer: Trainer) -> None:
    """Train so that weights differ by what gradients differ by: Adam would make steps of rounding, too."""
    for group in trainer.optimiser.param_groups:
        group["eps"] = 1e-3
    trainer.fit()
    processes.wait()
    for p in [p for group in trainer.optimiser.param_groups for p in group["params"]]:
        assert torch.equal(processes.mean(p), p), "the processes' weights went apart"


def train(scenes: Path, views: Path, run: Path) -> None:
    """Stage `vision` in one folder, the others in a second that holds what they start from."""
    later = run / "later"
    fit(VisionTrainer(VisionRun(data=scenes, run=run, config="debug", steps=STEPS, every=STEPS, batch=12)))
    fit(LanguageTrainer(LanguageRun(**texts(scenes, later))))
    dense = DenseRun(data=views, run=later, config="debug", steps=STEPS, batch=4, side=64, bf16=False)
    fit(DenseTrainer(dense))
    fit(AnswersTrainer(AnswersRun(**texts(scenes, later))))
    fit(Polisher(PolishRun(**texts(scenes, later), samples=3)))  # what it samples differs between processes


def only_main_saves() -> None:
    """Let any other process fail where it would write a checkpoint."""
    if not processes.is_main():
        torch.save = None


@pytest.fixture(scope="module")
def start(coloured_scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained checkpoints of the stages that others start from; `language` has been trained for one step."""
    folder = tmp_path_factory.mktemp("start")
    VisionTrainer(VisionRun(data=coloured_scenes, run=folder, config="debug")).save()
    trainer = LanguageTrainer(LanguageRun(**texts(coloured_scenes, folder)))
    trainer.save()
    trainer.checkpoint.rename(folder / "polish.pt")
    order = epoch_order(trainer.train, trainer.repeat, STEPS, 8, trainer.run.seed)
    images = load_images(trainer.train, "train images")
    _, rows, x = next(batches(images, order, trainer.config.image_size, trainer.run.seed + 1))
    trainer.train_step(rows, x)
    trainer.save()
    return folder


def weights(run: Path, stage: str) -> dict[str, Tensor]:
    state = torch.load(run / ("." if stage == "vision" else "later") / f"{stage}.pt", weights_only=True)
    return {name: w.double() for name, w in state[WEIGHTS[stage]].items()}


def launched(*command: str | Path) -> str:
    """What two processes say that `accelerate launch` starts."""
    if importlib.util.find_spec("accelerate") is None:
        pytest.skip("accelerate, which starts the processes, is not installed")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
              "--main_process_port", "0", *map(str, command)]  # fmt: skip
    done = subprocess.run(launch, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_two_processes_train_to_the_weights_of_one_and_only_one_of_them_writes(
    coloured_scenes: Path, squares: Path, start: Path, tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    one, two = tmp_path / "one", tmp_path / "two"
    for run in (one, two):
        shutil.copytree(start, run / "later")
    train(coloured_scenes, squares, one)
    said = launched(__file__, coloured_scenes, squares, two)
    assert said.count('"step": 4') == len(WEIGHTS) + 1  # each stage's validation, said once
    untrained = {"vision": start / "vision.pt", "language": start / "language.pt", "answers": start / "polish.pt"}
    for stage in WEIGHTS:
        ours, theirs = weights(one, stage), weights(two, stage)
        assert ours.keys() == theirs.keys()
        for name, w in ours.items():
            torch.testing.assert_close(theirs[name], w, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        if stage in untrained:
            before = torch.load(untrained[stage], weights_only=True)[WEIGHTS[stage]]
            assert max(float((w - before[name]).abs().max()) for name, w in ours.items()) > 3e-4
    logs = {path.name: path.read_text().count("\n") for path in sorted((one / "later").glob("*.jsonl"))}
    assert len(logs) == 4
    assert {path.name: path.read_text().count("\n") for path in sorted((two / "later").glob("*.jsonl"))} == logs


def test_the_command_goes_on_and_exports_under_the_launcher(
    coloured_scenes: Path, start: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(start, run)
    (run / "polish.pt").unlink()
    stages = ("--stage", "language", "--stage", "export", "--steps", "3", "--batch", "8", "--threads", "1")
    said = launched("-m", "model_server.training", coloured_scenes, "--run", run, "--config", "debug", *stages)
    assert said.count("resumed at step 1") == 1
    assert said.count("resumed at step 3") == 1  # by export
    assert (run / "weights" / "model.safetensors").is_file()
    assert (run / "weights" / "calibration.json").is_file()


def test_a_batch_that_does_not_divide_among_the_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "count", lambda: 3)
    monkeypatch.setattr(processes, "rank", lambda: 2)
    assert processes.share(12) == slice(8, 12)
    with pytest.raises(UnevenBatch, match="8 images do not divide among 3 processes"):
        processes.share(8)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with processes.joined():
        only_main_saves()
        train(*map(Path, sys.argv[1:]))
