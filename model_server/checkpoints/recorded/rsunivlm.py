"""RSUniVLM's recorded cases: text, one image, two images, under each granularity; a padded batch; the end token."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from model_server.checkpoints.adapters import rsunivlm
from model_server.checkpoints.files import read_json
from model_server.checkpoints.published import Report, repetition_penalty
from model_server.checkpoints.recorded.apart import projections_apart
from model_server.checkpoints.store import WeightsError
from model_server.checkpoints.verify import Comparison, Taps
from model_server.model.config import EXPERTS
from model_server.model.greedy import Repetition
from model_server.model.llava import IMAGE, ImageTokens, LlavaVLM, Prompt


def compare(folder: Path, checkpoint: Path, comparison: Comparison) -> Report:
    """Run every case of `folder`; see the package."""
    return _Cases(folder, checkpoint, comparison).run()


class _Cases:
    def __init__(self, folder: Path, checkpoint: Path, comparison: Comparison) -> None:
        self.index = read_json(folder / "cases.json")
        paths = (folder / name for name in ("cases.safetensors", "cases_small.safetensors"))
        path = next((p for p in paths if p.is_file()), None)
        if path is None:
            raise WeightsError(f"{folder} holds no cases.safetensors and no cases_small.safetensors")
        self.recorded = load_file(path)
        self.checkpoint, self.comparison = checkpoint, comparison
        comparison.expect(n for n in self.recorded if not n.rsplit("/", 1)[1].startswith("image"))
        self.load = cache(self._load)

    def _load(self, overrides: str) -> tuple[LlavaVLM, Report]:
        model, report = rsunivlm.load(self.checkpoint, overrides=json.loads(overrides))
        projections_apart(model)
        return model, report

    def run(self) -> Report:
        prompts = {name: self._input(name, about) for name, about in self.index["inputs"].items()}
        for case in self.index["cases"]:
            self._case(case, *prompts[case["input"]])
        if "eos_case" in self.index:
            self._stop(self.index["eos_case"], prompts)
        if "batch" in self.index:
            self._batch(self.index["batch"])
        return self.load("{}")[1]

    def _input(self, name: str, about: Mapping[str, Any]) -> tuple[LlavaVLM, Prompt]:
        """Encode an input's images and embed its prompt, comparing on the way."""
        model, _ = self.load(json.dumps(about.get("config_overrides") or {}))
        images = [self._image(f"in/{name}/image{i}") for i in range(about["n_images"])]
        sizes = [self._size(f"in/{name}/image{i}") for i in range(about["n_images"])]
        if images:
            feature = model.config.feature
            tower = model.tower(torch.cat(images), (feature,))[feature]
            self._same("features", f"in/{name}/tower", tower, "small_tower_positions")
            self._same("features", f"in/{name}/projector", model.projector(tower), "small_tower_positions")
        ids = torch.tensor(about["input_ids"])
        encoded = model.encode(images, sizes) if images else []
        prompt = model.prompt([ids], [encoded])
        self._same("embeddings", f"in/{name}/inputs_embeds", prompt.embeddings)
        return model, prompt

    def _image(self, name: str) -> Tensor:
        image = self.recorded[name]
        return image if image.ndim == 4 else image[None]  # tiles of one image, or one tile

    def _size(self, name: str) -> tuple[int, int] | None:
        """(width, height) of an image before it was cut into tiles, where that is recorded."""
        _, source, image = name.split("/")
        sizes = self.index["inputs"][source].get("image_sizes") or {}
        size = sizes[int(image.removeprefix("image"))] if sizes else None
        return None if size is None else (int(size[0]), int(size[1]))

    def _case(self, case: Mapping[str, Any], model: LlavaVLM, prompt: Prompt) -> None:
        name, expert = f"out/{case['name']}", _expert(case["granularity"])
        self.comparison.cases.append(case["name"])
        blocks = {f"layer{i}": block for i, block in enumerate(model.decoder.blocks)}
        with Taps(blocks) as taps:
            hidden = model(prompt, expert)
        logits = model.decoder.logits(hidden)
        for i in range(len(blocks)):
            self._same("layers", f"{name}/hidden_layer{i}", taps.found[f"layer{i}.out"])
        self._same("layers", f"{name}/hidden_norm", hidden)
        self._same("logits", f"{name}/logits", logits)
        self._same("logits", f"{name}/logits_last", logits[:, -1:])
        steps = len(case["generated_ids"])
        ids, scores = model.greedy(prompt, expert, steps, None, self._said(model))
        self.comparison.ids(f"{name}/generated", ids[0].tolist(), case["generated_ids"])
        self._same("logits", f"{name}/step_logits", scores[0])

    def _stop(self, case: Mapping[str, Any], prompts: Mapping[str, tuple[LlavaVLM, Prompt]]) -> None:
        self.comparison.cases.append("eos_case")
        model, prompt = prompts[case["input"]]
        ids, _ = model.greedy(prompt, _expert(case["granularity"]), 8, case["eos_token_id"], self._said(model))
        self.comparison.ids("eos_case", ids[0].tolist(), case["generated_ids"])

    def _said(self, model: LlavaVLM) -> Repetition | None:
        """What one sequence has said: nothing yet, as the published code gives its decoder embeddings only."""
        return Repetition.after(repetition_penalty(self.checkpoint), [[]], model.config.decoder.vocab_size)

    def _batch(self, batch: Mapping[str, Any]) -> None:
        self.comparison.cases.append("batch")
        model, _ = self.load("{}")
        masks = torch.tensor(batch["attention_mask"]).bool()
        rows = [torch.tensor(ids)[mask] for ids, mask in zip(batch["input_ids"], masks, strict=True)]
        shown = batch["images"]
        encoded = iter(model.encode([self._image(name) for name in shown], [self._size(name) for name in shown]))
        images: list[Sequence[ImageTokens]] = [[next(encoded) for _ in range(int((r == IMAGE).sum()))] for r in rows]
        prompt = model.prompt(rows, images)
        self.comparison.ids("batch/merged_lengths", prompt.real.sum(1).tolist(), batch["merged_lengths"])
        real = prompt.real.long()
        if read_json(self.checkpoint / "config.json").get("tokenizer_padding_side") == "left":
            real = real.flip(1)  # padding is always on the right here; results at real places are the same
        self._same("embeddings", "batch/attention_mask_merged", real)
        expert = _expert(batch["granularity"]).repeat(len(rows))
        logits, _ = model.prefill(prompt, expert, 0)
        self._same("logits", "batch/logits_last_valid", logits)

    def _same(self, kind: str, name: str, ours: Tensor, positions: str = "small_positions") -> None:
        """Compare with a recorded tensor, if there is one; the small files keep chosen positions (dimension 1)."""
        recorded = self.recorded.get(name)
        if recorded is None:
            return
        if ours.ndim == 3 and recorded.ndim == 3 and ours.shape[1] != recorded.shape[1]:
            kept = self.index.get(positions, {}).get(str(ours.shape[1]))
            ours = ours if kept is None else ours[:, kept]
        self.comparison.tensor(kind, name, ours, recorded)


def _expert(granularity: int) -> Tensor:
    """The published index of an expert, which may count from the end."""
    return torch.tensor([range(len(EXPERTS))[granularity]])
