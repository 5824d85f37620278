"""FUSAR-GPT's recorded cases: the modulation alone, and inside the whole model; decoding; written answers."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from model_server.checkpoints.adapters import fusar
from model_server.checkpoints.adapters.fusar_inputs import PromptWriter, cut_patches, load_anchors
from model_server.checkpoints.published import Report, repetition_penalty
from model_server.checkpoints.recorded.apart import low_ranks_apart, projections_apart
from model_server.checkpoints.verify import Comparison
from model_server.model.attention import Backend, attention_backend
from model_server.model.greedy import Repetition
from model_server.model.modulation import Anchors
from model_server.model.qwen_vision import Grid, window_groups
from model_server.model.qwen_vl import QwenVLM

STEPS = (".film_out", ".gamma", ".beta", ".gauss_raw_SxHW", "_patch_HWxC", "_interp_1CHW")


def compare(folder: Path, checkpoint: Path, comparison: Comparison) -> Report:
    """Run every case of `folder`; see the package. Attention is PyTorch's, as the authors' scripts choose it."""
    model, report = fusar.load(checkpoint)
    base = fusar.base_tensors(fusar.base_folder(checkpoint))
    added, _ = fusar.low_ranks(fusar.adapter_folder(checkpoint), base)
    for name, (merged, wanted) in low_ranks_apart(model, fusar.plan(model.config), base, added).items():
        comparison.tensor("merged", name, merged, wanted)
    projections_apart(model)
    with attention_backend(Backend.SDPA):
        _Cases(folder, checkpoint, model, comparison).run()
    return report


class _Cases:
    def __init__(self, folder: Path, checkpoint: Path, model: QwenVLM, comparison: Comparison) -> None:
        self.folder, self.checkpoint, self.model, self.comparison = folder, checkpoint, model, comparison
        self.inputs = load_file(folder / "e2e_inputs.safetensors") | load_file(folder / "tlm_inputs.safetensors")
        self.recorded = load_file(folder / "e2e_cases.safetensors") | load_file(folder / "tlm_cases.safetensors")
        # Steps on the way to a modulation's output are not looked at one by one.
        comparison.expect(name for name in self.recorded if not name.endswith(STEPS))

    def run(self) -> None:
        for case in sorted({name.partition(".")[0] for name in self.inputs if name.endswith(".tokens")}):
            self._modulation(case)
        self._train()
        self._generate()

    def _modulation(self, case: str) -> None:
        """TLM alone, on the recorded tokens; its weights are those of `tlm_state`, with the same config."""
        self.comparison.cases.append(case)
        module = self.model.modulation
        assert module is not None
        state = load_file(self.folder / "tlm_state.safetensors")
        alone = type(module)(module.config, self.model.config.decoder.width)
        alone.load_state_dict({name.replace("film_mlp.", "film."): tensor for name, tensor in state.items()})
        tokens = self.inputs[f"{case}.tokens"]
        if case.endswith("bf16_film"):
            alone = alone.bfloat16()
        grid, anchors = self._grid(case), self._anchors(case)
        weights = alone.weights(grid, anchors.positions[0], anchors.mask[0])
        self._same("modulation", f"{case}.weights_final_HWxS", weights.flatten(1).T)
        kind = "modulation" if tokens.dtype == torch.float32 else "bfloat16"
        found, recorded = alone(tokens, [grid], anchors), self.recorded[f"{case}.output"]
        if kind == "bfloat16":  # one rounding step is far above the tolerance; equal up to a step counts as equal
            step = torch.finfo(tokens.dtype).eps * self._largest_term(case, tokens)
            near = (found.float() - recorded.float()).abs() <= step
            found = torch.where(near, recorded, found)
        self._same(kind, f"{case}.output", found)

    def _largest_term(self, case: str, tokens: Tensor) -> Tensor:
        """Of the sum x (1 + gamma) + beta that makes an output, in its size: the sum is no finer than its terms."""
        terms = [self.recorded[f"{case}.output"].float().abs()]
        fields = [self.recorded.get(f"{case}.field_{name}_interp_1CHW") for name in ("gamma", "beta")]
        if all(field is not None and field[0, 0].numel() == len(tokens) for field in fields):
            gamma, beta = (field[0].flatten(1).T.float() for field in fields if field is not None)
            terms += [(tokens.float() * (1 + gamma)).abs(), beta.abs()]
        return torch.stack(terms).amax(0)

    def _train(self) -> None:
        """The whole model on a question with its answer, with and without anchors."""
        self.comparison.cases.append("train")
        model, inputs = self.model, self.inputs
        grid, patches, ids = self._grid("train"), inputs["train.pixel_values"], inputs["train.input_ids"][0]
        plain = model.tower(patches, [grid])
        order = torch.cat(window_groups([grid], model.config.vision))
        merged = model.config.vision.merge**2
        self._same("features", "train.visual_before_tlm", plain)
        self._same("features", "train.merger_out_window_order", plain[order[::merged] // merged])
        tokens = model.encode(patches, [grid], self._anchors("train"))[0]
        self._same("features", "train.visual_after_tlm", tokens)
        prompt = model.prompt([ids], [[(tokens, grid)]])
        self._same("embeddings", "train.inputs_embeds", prompt.embeddings)
        self._same("embeddings", "train.position_ids", prompt.positions)
        logits = model.decoder.logits(model(prompt))
        self._same("logits", "train.logits", logits)
        loss = F.cross_entropy(logits[0, :-1], inputs["train.labels"][0, 1:])
        self._same("logits", "train.loss", loss.view(self.recorded["train.loss"].shape))
        self._same("logits", "no_tlm.logits", model.decoder.logits(model(model.prompt([ids], [[(plain, grid)]]))))

    def _generate(self) -> None:
        """From picture, anchor file and question to the answer, as `infer_val` does; all questions in one batch."""
        self.comparison.cases.append("gen")
        asked = _lines(self.folder / "example" / "train.jsonl")
        answers = _lines(self.folder / "predictions.jsonl")
        writer = PromptWriter(fusar.adapter_folder(self.folder), self.model.config).squares()
        cut = []
        for question in asked:
            with Image.open(self.folder / "example" / str(question["image"])) as image:
                cut.append(cut_patches(image, self.model.config, writer.mean, writer.std))
        grids = [grid for _, grid in cut]
        ids = [writer.ids(str(q["question"]), grid) for q, grid in zip(asked, grids, strict=True)]
        self.comparison.ids("infer.input_ids", ids[0].tolist(), self.inputs["infer.input_ids"][0].tolist())
        known = [load_anchors(self.folder / "example" / str(q["aef"])) if q.get("aef") else None for q in asked]
        anchors = Anchors.of(known, 64)
        tokens = self.model.encode(torch.cat([patches for patches, _ in cut]), grids, anchors)
        prompt = self.model.prompt(ids, [[pair] for pair in zip(tokens, grids, strict=True)])
        steps = self.recorded["gen.new_ids"].shape[1]
        penalty = repetition_penalty(fusar.base_folder(self.checkpoint))
        said = Repetition.after(penalty, [row.tolist() for row in ids], self.model.config.decoder.vocab_size)
        new, logits = self.model.greedy(prompt, steps, None, said)
        self.comparison.tensor("pixels", "train.pixel_values", cut[0][0], self.inputs["train.pixel_values"])
        self._same("logits", "gen.step_logits", logits[:1])
        self.comparison.ids("gen.new_ids", new[0].tolist(), self.recorded["gen.new_ids"][0].tolist())
        whole = torch.cat((ids[0], new[0]))
        self.comparison.ids("gen.sequences", whole.tolist(), self.recorded["gen.sequences"][0].tolist())
        for i, answer in enumerate(answers):
            said, recorded = writer.text(new[i].tolist()), str(answer["prediction_text"])
            self.comparison.ids(f"predictions/{answer['id']}", map(ord, said), map(ord, recorded))

    def _grid(self, case: str) -> Grid:
        name = f"{case}.grid_thw" if f"{case}.grid_thw" in self.inputs else f"{case}.image_grid_thw"
        _, rows, columns = self.inputs[name][0].tolist()
        return rows, columns

    def _anchors(self, case: str) -> Anchors:
        return Anchors(*(self.inputs[f"{case}.vec64_{part}"] for part in ("seq", "pos", "mask")))

    def _same(self, kind: str, name: str, ours: Tensor) -> None:
        self.comparison.tensor(kind, name, ours, self.recorded[name])


def _lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
