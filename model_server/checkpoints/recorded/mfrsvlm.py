"""MF-RSVLM's recorded cases: views, detail stacks, router, gates, injected layers, cached decoding, and the state that
the published code keeps from the image before, which here is only ever an argument.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from model_server.checkpoints.adapters import mfrsvlm
from model_server.checkpoints.files import read_json
from model_server.checkpoints.published import Report
from model_server.checkpoints.recorded.apart import projections_apart
from model_server.checkpoints.store import WeightsError
from model_server.checkpoints.verify import Comparison, Taps
from model_server.model.llava import IMAGE, LlavaVLM, Prompt
from model_server.model.windows import canvas_of, cut_windows, detail_stacks, global_view, plan

# case -> its token ids and pixels among the recorded inputs
INPUTS = {
    "c1": ("ids1", "px1"),
    "c2": ("ids2", "px2"),
    "c3": ("ids_batch", "px2"),
    "c4": ("ids1", "nonsquare"),
    "c5": ("ids2", "multi"),
    "c6": ("ids_text", None),
}
SAMPLES = 257  # a strided record keeps about this many values of a tensor


def compare(folder: Path, checkpoint: Path, comparison: Comparison) -> Report:
    """Run every case of `folder`; see the package."""
    model, report = mfrsvlm.load(checkpoint)
    projections_apart(model)
    _Cases(folder, model, comparison).run()
    return report


class _Cases:
    def __init__(self, folder: Path, model: LlavaVLM, comparison: Comparison) -> None:
        self.model, self.comparison = model, comparison
        self.inputs = _load(folder / "inputs.safetensors")
        for path in sorted(folder.glob("pixels_*.safetensors")):
            self.inputs |= _load(path)
        listed = read_json(folder / "cases.json")["cases"]
        self.recorded = {
            f"{case}/{name}": tensor
            for case, about in listed.items()
            for name, tensor in _load(folder / about["file"]).items()
        }
        comparison.expect(n for n in self.recorded if not n.endswith("kept_positions"))
        self.expert = torch.tensor([0])

    def run(self) -> None:
        prompts = {case: self._prompt(case) for case in INPUTS if self._has(case)}
        if "c1" in prompts:
            self._views()
        for case, prompt in prompts.items():
            self._forward(case, prompt)
            self._generate(case, prompt)
        if self._has("c2_stale"):
            self._stale(prompts["c1"], prompts["c2"], prompts["c6"])
        if self._has("c7"):
            self._short(prompts["c1"])
        if self._has("c8"):
            self._cached_step(prompts["c1"])

    def _has(self, case: str) -> bool:
        return any(name.startswith(case + "/") for name in self.recorded)

    def _prompt(self, case: str) -> Prompt:
        """A case's batch of sequences; pictures [3, H, W], [1, 3, H, W] or, two in one sample, [2, 3, H, W]."""
        self.comparison.cases.append(case)
        names = INPUTS[case]
        ids = self.inputs[names[0]]
        mask = self.inputs["am_batch"].bool() if names[0] == "ids_batch" else torch.ones_like(ids, dtype=torch.bool)
        rows = [row[keep] for row, keep in zip(ids, mask, strict=True)]
        encoded, details = [], self.model.config.details
        if names[1] is not None and details is not None:
            pixels = self.inputs[names[1]]
            pixels = pixels if pixels.ndim == 4 else pixels[None]
            self._strided(f"{case}/low_res_strided", global_view(pixels, details))
            encoded = self.model.encode([pixels])
        prompt = self.model.prompt(rows, [encoded if i == 0 else [] for i in range(len(rows))])
        self._same("embeddings", f"{case}/merged_attention_mask", prompt.real.long())
        if prompt.details is not None:
            for name in self._named(f"{case}/stack", "_proj"):
                index = int(name.removeprefix(f"{case}/stack").removesuffix("_proj"))
                recorded = self.recorded[name]
                stack = prompt.details.stacks[0, index].view(recorded.shape[0], -1, recorded.shape[-1])
                self._same("features", name, stack[:, :: -(-stack.shape[1] // recorded.shape[1])])
        return prompt

    def _named(self, start: str, end: str) -> list[str]:
        return [n for n in self.recorded if n.startswith(start) and n.endswith(end)]

    def _views(self) -> None:
        """The first case's pictures, windows, tower tokens and detail stacks, before and after the projector."""
        model, details = self.model, self.model.config.details
        assert details is not None
        pixels = self.inputs["px1"]
        view, canvas = global_view(pixels, details), canvas_of(pixels, details.canvas)
        self._strided("c1/canvas_strided", canvas)
        for i, scale in enumerate(plan(details, model.config.vision)):
            self._strided(f"c1/patches_level{i}_strided", cut_windows(canvas, scale, details))
        feature = model.config.feature
        tokens = model.tower(view, (feature,))[feature]
        self._same("features", "c1/global_raw", tokens)
        self._same("features", "c1/global_proj", model.projector(tokens))
        stacks = detail_stacks(model.tower, canvas, details)[0]
        for case, found in (("stacks_raw_c1", stacks), ("stacks_proj_c1", model.projector(stacks))):
            if self._has(case):
                self.comparison.cases.append(case)
            if count := len(self._named(f"{case}/stack", "")):
                self.comparison.ids(f"{case} count", [len(found)], [count])
            for i, stack in enumerate(found):
                self._same("features", f"{case}/stack{i:02d}", stack)

    def _forward(self, case: str, prompt: Prompt) -> None:
        """One full pass: every layer's input and output, and what each injection did."""
        self._positions("embeddings", case, "inputs_embeds", prompt.embeddings, prompt.real)
        decoder = self.model.decoder
        modules = {f"layer{i}": block for i, block in enumerate(decoder.blocks)}
        for rank, injection in enumerate(decoder.inject.values()):
            for part in ("router", "gate", "project"):
                modules[f"inject{rank}.{part}"] = injection.get_submodule(part)
        with Taps(modules) as taps:
            hidden = self.model(prompt, self.expert.repeat(len(prompt.real)))
        logits = decoder.logits(hidden)
        for name, tensor in [*taps.found.items(), ("final_norm", hidden)]:
            if name.startswith(("layer", "final")):
                self._positions("layers", case, name, tensor, prompt.real)
        self._positions("logits", case, "logits", logits, prompt.real)
        for rank in range(len(decoder.inject)):
            if f"inject{rank}.gate.out" not in taps.found:
                continue
            gate = taps.found[f"inject{rank}.gate.out"].sigmoid()
            found = {
                "router_weights": taps.found[f"inject{rank}.router.out"],
                "gate": gate,
                "delta_unscaled": gate * taps.found[f"inject{rank}.project.out"],
            }
            for name, tensor in found.items():
                self._same("injection", f"{case}/inject{rank}.{name}.0", tensor)
                self._same("injection", f"{case}/inject{rank}.{name}.0.every24", tensor[:, ::24])
        if f"{case}/loss" in self.recorded:
            labels = self.inputs["labels1"][0][self.inputs["ids1"][0] != IMAGE]
            labels = F.pad(labels, (logits.shape[1] - len(labels), 0), value=-100)
            self._same("logits", f"{case}/loss", F.cross_entropy(logits[0, :-1], labels[1:])[None])

    def _generate(self, case: str, prompt: Prompt) -> None:
        """Greedy decoding over the cache and, where that was recorded, by the whole sequence at each step."""
        ids = self._greedy(case, prompt)
        if ids is not None:
            whole = torch.cat((self.inputs[INPUTS[case][0]][0], ids[0]))
            self._ids(f"{case}/greedy_sequences", whole)
        recorded = self.recorded.get(f"{case}/nocache_greedy_ids")
        if recorded is None:
            return
        logits = []
        for _ in range(recorded.shape[1]):
            logits.append(self.model.decoder.logits(self.model(prompt, self.expert)[:, -1]))
            prompt = _extended(self.model, prompt, logits[-1].argmax(-1))
        steps = torch.stack(logits, 1)
        self._ids(f"{case}/nocache_greedy_ids", steps[0].argmax(-1))
        self._same("logits", f"{case}/nocache_step_logits", steps)

    def _greedy(self, name: str, prompt: Prompt) -> Tensor | None:
        """Decode as many tokens as were recorded under `name`; ids [1, S]."""
        joint = "/" if "/" not in name else "."
        recorded = self.recorded.get(f"{name}{joint}greedy_step_logits")
        if recorded is None:
            return None
        ids, logits = self.model.greedy(prompt, self.expert, recorded.shape[1], None)
        self._same("logits", f"{name}{joint}greedy_step_logits", logits)
        self._ids(f"{name}{joint}greedy_ids", ids[0])
        return ids

    def _stale(self, first: Prompt, second: Prompt, text: Prompt) -> None:
        """The published module keeps an image's stacks for later calls; as an argument they do the same."""
        self.comparison.cases.append("c2_stale")
        ids = self._greedy("c2_stale", dataclasses.replace(second, details=first.details))
        if ids is not None:
            self._ids("c2_stale/greedy_sequences", torch.cat((self.inputs["ids2"][0], ids[0])))
        self._greedy("c2_stale/text_only_after_image", dataclasses.replace(text, details=first.details))
        long = self.model.prompt([self.inputs["ids_longtext"][0]], [[]])
        self._greedy("c2_stale/longtext_clean", long)
        self._greedy("c2_stale/longtext_after_image", dataclasses.replace(long, details=first.details))

    def _short(self, first: Prompt) -> None:
        """A sequence shorter than the visual tokens is not injected, with stacks or without."""
        self.comparison.cases.append("c7")
        x = self.inputs["short_embeds"]
        short = Prompt(x, torch.ones(x.shape[:2], dtype=torch.bool), first.details)
        self._same("layers", "c7/last_hidden", self.model(short, self.expert))
        clean = dataclasses.replace(short, details=None)
        self._same("layers", "c7/last_hidden_no_states", self.model(clean, self.expert))

    def _cached_step(self, first: Prompt) -> None:
        """One step over the cache: logits, and the last keys and values of the second layer."""
        self.comparison.cases.append("c8")
        token = self.recorded["c8/next_id"][0]
        logits, state = self.model.prefill(first, self.expert, 1)
        self._ids("c8/next_id", logits.argmax(-1))
        self._same("logits", "c8/logits", self.model.step(token, state)[:, None])
        self._same("embeddings", "c8/merged_attention_mask", state.visible.long())
        for i, name in enumerate(("k", "v")):
            recorded = self.recorded.get(f"c8/{name}_cache_layer1")
            if recorded is not None:
                kept = state.cache.data[1, i, :, :, -recorded.shape[2] :]
                self._same("layers", f"c8/{name}_cache_layer1", kept)

    def _kept(self, case: str, tensor: Tensor) -> Tensor:
        """The positions that a case keeps of [B, T, ...]."""
        kept = self.recorded.get(f"{case}/kept_positions")
        return tensor if kept is None else tensor[:, kept]

    def _positions(self, kind: str, case: str, name: str, ours: Tensor, real: Tensor) -> None:
        """Compare a case's tensor [B, T, D] at its kept positions; what stands at padding means nothing."""
        recorded = self.recorded.get(f"{case}/{name}")
        ours, real = self._kept(case, ours), self._kept(case, real)
        if recorded is not None and recorded.shape == ours.shape:
            self.comparison.tensor(kind, f"{case}/{name}", ours[real], recorded[real])
        else:
            self._same(kind, f"{case}/{name}", ours)

    def _strided(self, name: str, ours: Tensor) -> None:
        flat = ours.flatten()
        self._same("features", name, flat[:: max(1, len(flat) // SAMPLES)])

    def _same(self, kind: str, name: str, ours: Tensor) -> None:
        recorded = self.recorded.get(name)
        if recorded is not None:
            self.comparison.tensor(kind, name, ours, recorded)

    def _ids(self, name: str, ours: Tensor) -> None:
        recorded = self.recorded.get(name)
        if recorded is not None:
            self.comparison.ids(name, ours.tolist(), recorded.flatten().tolist())


def _extended(model: LlavaVLM, prompt: Prompt, token: Tensor) -> Prompt:
    """A prompt of one sequence with one token more."""
    embeddings = torch.cat((prompt.embeddings, model.decoder.embed(token)[:, None]), 1)
    return Prompt(embeddings, F.pad(prompt.real, (0, 1), value=True), prompt.details)


def _load(path: Path) -> dict[str, Tensor]:
    """A file of recorded tensors.

    Raises:
        WeightsError: it is not there.
    """
    if not path.is_file():
        raise WeightsError(f"recorded results are incomplete: {path} is missing")
    return load_file(path)
