"""Stage `dense`: boxes, masks and change together, on the frozen first blocks of the trained backbone.

Each step is a batch of one task; the tasks take turns (`ORDER`) and share the branch. The shared blocks run in bf16
without gradient, the branch under autocast. The learning rate warms up, stays, and falls over the last share of the
steps, so that a run can be continued with more steps.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from model_server.calibration import DenseCalibration
from model_server.checkpoints.store import save_dense
from model_server.dense.perceiver import DensePerceiver
from model_server.model.config import PRESETS
from model_server.model.dense import DenseBranch, Found, Maps, early_maps, start_branch
from model_server.model.vision import Backbone
from model_server.text.concepts import every_phrase
from model_server.training import processes
from model_server.training.dense_data import BOX_SETS, CHANGE_SETS, MASK_SETS, PhraseBank, Scene, Views, read_scenes
from model_server.training.dense_losses import box_losses, change_losses, mask_losses
from model_server.training.dense_validation import SETS, Gathered, figures, fit_calibration, gather
from model_server.training.language import trained_vision
from model_server.training.place import half, here, in_memory, put
from model_server.training.sentences import sentence_vectors
from model_server.training.start import sentence_parts

ORDER = ("boxes", "masks", "change")
BATCHES = {"boxes": (6, 320), "masks": (8, 256), "change": (6, 256)}  # views and their side; a change view is a pair


@dataclass(frozen=True, kw_only=True)
class DenseRun:
    """`batch` replaces the number of views of every task; `views` their sides, for small runs."""

    data: Path
    run: Path
    config: str = "nano"
    steps: int = 24_500
    batch: int | None = None
    side: int | None = None
    rate: float = 2.5e-4
    head_rate: float = 1e-3
    weight_decay: float = 0.02
    fall: float = 0.35
    ema: float = 0.997
    seed: int = 0
    save_minutes: float = 3.0
    validate_minutes: float = 10.0
    limit: int | None = None
    bf16: bool = True


def trapezoid(step: int, steps: int, warm_up: int, fall: float) -> float:
    """Learning-rate factor: linear warm-up, level, then linear to zero over the last share `fall` of the steps."""
    return min((step + 1) / warm_up, 1.0, max((steps - step) / max(fall * steps, 1), 0.0))


def keep_float32(branch: DenseBranch) -> None:
    """Take the wide depthwise convolutions out of autocast: their bf16 gradient is three times slower on a CPU."""

    def exempt(conv: nn.Module) -> None:
        plain = conv.forward

        def forward(x: Tensor) -> Tensor:
            with half(False):
                return plain(x.float())

        conv.forward = forward

    for module in branch.blocks.modules():
        if isinstance(module, nn.Conv2d) and module.groups > 1 and module.kernel_size[0] > 3:
            exempt(module)


class DenseTrainer:
    """The state of one run: branch, moving average, optimiser and step."""

    def __init__(self, run: DenseRun) -> None:
        self.run = run
        torch.manual_seed(run.seed)
        self.config = PRESETS[run.config]()
        weights, _ = trained_vision(run.run)
        backbone = Backbone(self.config.backbone)
        prefix = "backbone."
        backbone.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
        backbone.eval().requires_grad_(False)
        backbone.fold_norms()
        self.branch = DenseBranch(self.config)
        start_branch(self.branch, backbone)
        self.branch.requires_grad_(True).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.backbone = backbone.to(torch.bfloat16 if run.bf16 else torch.float32).channels_last()
        self.average = copy.deepcopy(self.branch).eval().requires_grad_(False)
        if run.bf16:
            keep_float32(self.branch)
        encoder, tokenizer = sentence_parts(self.config)
        phrases = every_phrase() + every_phrase(held_out=True)
        self.device = here()
        self.vectors = dict(zip(phrases, sentence_vectors(encoder, tokenizer, phrases).cpu(), strict=True))
        blocks = [p for n, p in self.branch.named_parameters() if n.startswith("blocks.")]
        heads = [p for n, p in self.branch.named_parameters() if not n.startswith("blocks.")]
        self.optimiser = torch.optim.AdamW(
            [{"params": blocks, "base": run.rate}, {"params": heads, "base": run.head_rate}],
            lr=run.rate, weight_decay=run.weight_decay,
        )  # fmt: skip
        self.step = 0
        self.checkpoint = run.run / "dense.pt"
        if self.checkpoint.exists():
            self.resume()

    def resume(self) -> None:
        state = torch.load(self.checkpoint, weights_only=True, map_location=here())
        self.branch.load_state_dict(state["branch"])
        self.average.load_state_dict(state["average"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step = state["step"]
        print(f"resumed at step {self.step}")

    def save(self) -> None:
        state = {
            "branch": self.branch.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "step": self.step,
        }
        partial = self.checkpoint.with_suffix(".part")
        torch.save(state, partial)
        partial.replace(self.checkpoint)

    @torch.no_grad()
    def early(self, images: Tensor) -> Maps:
        return {s: m.float() for s, m in early_maps(self.backbone, images, self.branch.config.shared).items()}

    def losses(self, task: str, views: Views, rng: np.random.Generator) -> dict[str, Tensor]:
        """The weighted terms of one batch of a task. Every process draws it whole and computes its share."""
        run, branch = self.run, self.branch
        batch, side = BATCHES[task]
        batch, side = run.batch or batch, run.side or side
        if task == "boxes":
            with in_memory():
                b = views.boxes(rng, batch, side)
            b = put(b)
            mine = processes.share(batch)
            early = self.early(b.images[mine])
            with half(run.bf16):
                found = branch.detect(branch.features(branch.maps(early)), b.phrases[mine])
            return box_losses(Found(*map(processes.whole, vars(found).values())), b)
        if task == "masks":
            with in_memory():
                m = views.masks(rng, batch, side)
            m = put(m)
            mine = processes.share(batch)
            early = self.early(m.images[mine])
            with half(run.bf16):
                logits = branch.segment(branch.features(branch.maps(early)), m.phrases[mine])
            return mask_losses(processes.whole(logits), m)
        with in_memory():
            c = views.changes(rng, batch, side)
        c = put(c)
        mine = processes.share(batch)
        before = c.before[mine]
        early = self.early(torch.cat((before, c.after[mine])))
        with half(run.bf16):
            maps, n = branch.maps(early), len(before)
            logits = branch.change({s: x[:n] for s, x in maps.items()}, {s: x[n:] for s, x in maps.items()})
        return change_losses(processes.whole(logits), c)

    def train_step(self, views: dict[str, Views]) -> dict[str, float]:
        run = self.run
        factor = trapezoid(self.step, run.steps, min(100, run.steps // 10 + 1), run.fall)
        for group in self.optimiser.param_groups:
            group["lr"] = group["base"] * factor
        self.branch.train()
        task = ORDER[self.step % len(ORDER)]
        terms = self.losses(task, views[task], np.random.default_rng((run.seed, 11, self.step)))
        self.optimiser.zero_grad(set_to_none=True)
        torch.stack(list(terms.values())).sum().backward()
        processes.average_gradients(self.branch.parameters())
        nn.utils.clip_grad_norm_(self.branch.parameters(), 1.0)  # boxes would outweigh the others twentyfold
        self.optimiser.step()
        self.step += 1
        decay = min(run.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for mean, now in zip(self.average.parameters(), self.branch.parameters(), strict=True):
                mean.lerp_(now, 1 - decay)
        return {k: float(v.detach()) for k, v in terms.items()}

    def perceiver(self) -> DensePerceiver:
        """The averaged branch as it is served, its scores raw."""

        def embed(phrases: Sequence[str]) -> Tensor:
            return torch.stack([self.vectors[phrase] for phrase in phrases]).to(self.device)

        backbone = copy.deepcopy(self.backbone).float()
        return DensePerceiver(backbone, self.average, DenseCalibration(), embed, self.device)

    def gathered(self, val: Sequence[Scene]) -> Gathered:
        with in_memory():
            return gather(self.perceiver(), val)

    def export(self, folder: Path) -> DenseCalibration:
        """Put the averaged branch into a checkpoint, with thresholds from the validation records."""
        val = read_scenes(self.run.data, SETS, "val", self.run.limit)
        calibration = fit_calibration(self.gathered(val))
        save_dense(folder, self.average, calibration)
        return calibration

    def fit(self) -> None:
        run = self.run
        bank = PhraseBank(self.vectors)
        sets = {"boxes": BOX_SETS, "masks": MASK_SETS, "change": CHANGE_SETS}
        views = {task: Views(read_scenes(run.data, sets[task], "train", run.limit), sets[task], bank) for task in ORDER}
        val = read_scenes(run.data, SETS, "val", run.limit)
        first, start, sums = self.step, time.monotonic(), dict[str, list[float]]()
        saved = validated = start
        with processes.log(run.run / "dense.jsonl") as log:
            while self.step < run.steps:
                for k, v in self.train_step(views).items():
                    sums.setdefault(k, []).append(v)
                now = time.monotonic()
                done = self.step == run.steps
                if self.step % 50 == 0 or done:
                    pace = round((now - start) / (self.step - first), 3)
                    means = {k: round(sum(v) / len(v), 4) for k, v in sorted(sums.items())}
                    print(json.dumps({"step": self.step, "seconds_a_step": pace, **means}), file=log, flush=True)
                    sums.clear()
                if not processes.is_main():
                    continue
                if done or now - saved > 60 * run.save_minutes:
                    self.save()
                    saved = now
                if done or now - validated > 60 * run.validate_minutes:
                    line = json.dumps({"step": self.step, "val": figures(self.gathered(val))})
                    print(line, file=log, flush=True)
                    print(line, flush=True)
                    validated = time.monotonic()
