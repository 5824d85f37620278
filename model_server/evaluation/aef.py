"""`python -m model_server.evaluation.aef DATA_DIR`: does an AlphaEarth embedding help to read radar backscatter?

Land cover of a point (Dynamic World's class) from its Sentinel-1 backscatter in two polarisations, with a region held
out: from backscatter alone, from backscatter modulated by the point's embedding as token-wise modulation does it,
x' = x (1 + gamma) + beta with gamma and beta from the embedding and a last layer that starts at zero, and from the
embedding alone. Controls: the commonest class of the training regions; modulation by another point's embedding, which
has the parameters but not the knowledge. All have the same head, schedule and seeds, and nothing is chosen by the
held-out region.

To keep in mind: Dynamic World reads its classes from Sentinel-2, which the embeddings have seen too.
"""

from __future__ import annotations

import csv
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import typer
from torch import Tensor, nn
from torch.nn import functional as F

from model_server.model.config import ModulationConfig
from model_server.model.modulation import Anchors, TokenModulation

Model = Literal["majority", "backscatter", "shuffled", "modulated", "embedding"]
MODELS: tuple[Model, ...] = ("majority", "backscatter", "shuffled", "modulated", "embedding")
CLASSES = ("water", "trees", "grass", "flooded vegetation", "crops", "shrub and scrub", "built", "bare", "snow and ice")
WIDTH, STEPS, BATCH, RATE, DECAY = 32, 600, 256, 3e-3, 1e-2
app = typer.Typer(help=__doc__)


@dataclass(frozen=True)
class Points:
    """One region: backscatter float32 [N, 2] (VV, VH in dB), embeddings float32 [N, 64], classes int64 [N]."""

    backscatter: Tensor
    embeddings: Tensor
    classes: Tensor


@dataclass(frozen=True)
class Score:
    """Means over seeds on one held-out region, and the seeds' standard deviation of the accuracy."""

    region: str
    model: Model
    accuracy: float
    deviation: float
    macro_f1: float


class Reader(nn.Module):
    """Class scores of points. Backscatter passes a layer and becomes one token; the embedding may modulate it."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model
        self.stem = nn.Sequential(nn.Linear(64 if model == "embedding" else 2, WIDTH), nn.GELU())
        # One patch a token: a point is an image of one pixel with its anchor in the middle.
        modulated = model in ("modulated", "shuffled")
        self.modulation = TokenModulation(ModulationConfig(merge=1), WIDTH) if modulated else None
        self.head = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, len(CLASSES)))

    def forward(self, backscatter: Tensor, embeddings: Tensor) -> Tensor:
        """[N, 2], [N, 64] -> scores [N, classes]."""
        x = self.stem(embeddings if self.model == "embedding" else backscatter)
        if self.modulation is not None:
            x = self.modulation(x, [(1, 1)] * len(x), _central(embeddings))
        return self.head(x)


def _central(embeddings: Tensor) -> Anchors:
    n = len(embeddings)
    return Anchors(embeddings[:, None], torch.full((n, 1, 2), 0.5), torch.ones(n, 1, dtype=torch.bool))


def read_points(path: Path) -> Points:
    """One region's CSV.

    Raises:
        ValueError: a value is no finite number.
    """
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    columns = ["vv_db", "vh_db", *(f"a{axis:02d}" for axis in range(64))]
    values = torch.tensor([[float(row[column]) for column in columns] for row in rows])
    if not values.isfinite().all():
        raise ValueError(f"{path} holds values that are not finite")
    return Points(values[:, :2], values[:, 2:], torch.tensor([int(row["dw_label"]) for row in rows]))


def predict(model: Model, train: Points, test: Points, seed: int) -> Tensor:
    """Classes int [N] of the test points, by a model trained on the others."""
    if model == "majority":
        return train.classes.mode().values.expand(len(test.classes))
    torch.manual_seed(seed)
    if model == "shuffled":
        train, test = _shuffled(train), _shuffled(test)
    mean, std = train.backscatter.mean(0), train.backscatter.std(0)
    reader = Reader(model)
    optimiser = torch.optim.AdamW(reader.parameters(), RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS)
    for _ in range(STEPS):
        rows = torch.randint(len(train.classes), (BATCH,))
        scores = reader((train.backscatter[rows] - mean) / std, train.embeddings[rows])
        loss = F.cross_entropy(scores, train.classes[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    with torch.no_grad():
        return reader((test.backscatter - mean) / std, test.embeddings).argmax(1)


def _shuffled(points: Points) -> Points:
    """Each point with the embedding of another."""
    return Points(points.backscatter, points.embeddings[torch.randperm(len(points.classes))], points.classes)


def macro_f1(found: Tensor, true: Tensor) -> float:
    """Mean F1 over the classes that occur in the truth."""
    scores = []
    for label in true.unique():
        hit = ((found == label) & (true == label)).sum()
        scores.append(float(2 * hit / ((found == label).sum() + (true == label).sum())))
    return float(np.mean(scores))


def run(regions: dict[str, Points], seeds: int) -> list[Score]:
    """Each region held out in turn, every model, every seed."""
    scores = []
    for held_out, test in regions.items():
        others = [points for region, points in regions.items() if region != held_out]
        train = Points(*(torch.cat(parts) for parts in zip(*(vars(p).values() for p in others), strict=True)))
        for model in MODELS:
            found = [predict(model, train, test, seed) for seed in range(seeds)]
            right = [float((classes == test.classes).float().mean()) for classes in found]
            f1 = float(np.mean([macro_f1(classes, test.classes) for classes in found]))
            scores.append(Score(held_out, model, float(np.mean(right)), float(np.std(right)), f1))
    return scores


def table(scores: list[Score], seeds: int) -> str:
    """A section in Markdown."""
    regions = list(dict.fromkeys(score.region for score in scores))
    by = {(score.region, score.model): score for score in scores}
    mean = {model: np.mean([by[region, model].accuracy for region in regions]) for model in MODELS}
    f1 = {model: np.mean([by[region, model].macro_f1 for region in regions]) for model in MODELS}
    lines = [
        "# Land cover from radar with and without an AlphaEarth embedding",
        "",
        f"    python -m model_server.evaluation.aef DATA_DIR --seeds {seeds} --markdown docs/AEF.md",
        "",
        f"Accuracy in percent on a held-out region, mean and standard deviation over {seeds} seeds; the last two",
        "columns are means over the regions. Dynamic World's classes, Sentinel-1 VV and VH, embeddings of 2024.",
        "",
        f"| input | {' | '.join(regions)} | mean | macro F1 |",
        f"|---|{'---|' * (len(regions) + 2)}",
    ]
    names: dict[Model, str] = {
        "majority": "none (commonest class of training)",
        "backscatter": "backscatter",
        "shuffled": "backscatter, modulated by another point's embedding",
        "modulated": "backscatter, modulated by the embedding",
        "embedding": "embedding alone",
    }
    for model in MODELS:
        cells = [f"{100 * by[r, model].accuracy:.1f} ± {100 * by[r, model].deviation:.1f}" for r in regions]
        lines.append(f"| {names[model]} | {' | '.join(cells)} | {100 * mean[model]:.1f} | {100 * f1[model]:.1f} |")
    gain = 100 * (mean["modulated"] - mean["backscatter"])
    over = 100 * (mean["modulated"] - mean["embedding"])
    said = f"Against backscatter alone, modulation gains {gain:+.1f} points; against the embedding alone, {over:+.1f}."
    caution = (
        "The labels are Dynamic World's, made from Sentinel-2, which the embeddings have seen too: part of what they "
        "add may\nbe knowledge of the labels' own source rather than of the ground."
    )
    return "\n".join([*lines, "", said, "", caution])


@app.command()
def main(
    data: Annotated[Path, typer.Argument(help="the directory of data sets, or its aef_points/")],
    seeds: Annotated[int, typer.Option(help="how many trainings a model and region", min=1)] = 5,
    output: Annotated[Path | None, typer.Option(help="write the scores as JSON")] = None,
    markdown: Annotated[Path | None, typer.Option(help="write the table as a section in Markdown")] = None,
) -> None:
    """Train, score, print a table."""
    folder = data / "aef_points" if (data / "aef_points").is_dir() else data
    regions = {path.stem: read_points(path) for path in sorted(folder.glob("*.csv"))}
    if len(regions) < 2:
        raise typer.BadParameter(f"{folder} must hold a CSV for each of two or more regions")
    scores = run(regions, seeds)
    text = table(scores, seeds)
    typer.echo(text)
    if output is not None:
        output.write_text(json.dumps({"seeds": seeds, "scores": [asdict(s) for s in scores]}, indent=1) + "\n")
    if markdown is not None:
        markdown.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    app()
