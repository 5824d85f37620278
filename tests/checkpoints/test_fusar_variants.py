"""FUSAR-GPT of other sizes than the recorded one, recorded here by another hand and run through `verify`.

The base is Qwen2.5-VL of `transformers`, with the LoRA beside its matrices; the modulation is written out patch by
patch; patches, prompts and greedy decoding are made by loops. Nothing of it is the code under test.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn import functional as F
from typer.testing import CliRunner

from model_server.checkpoints.__main__ import app

transformers = pytest.importorskip("transformers")

SPECIALS = ["<|im_end|>", "<|endoftext|>", "<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
SIGNS = "\n abcdefghijklmnopqrstuvwxyzDN.[]{}0123456789"
IDS = {sign: n for n, sign in enumerate([*SPECIALS, *SIGNS, "~"])}
END, PAD = IDS["<|im_end|>"], IDS["<|image_pad|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}{% if c['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MEAN, STD = (0.4, 0.5, 0.6), (0.3, 0.25, 0.2)
STEPS = 4


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What a base's, an adapter's and a modulation's config can say. `matrices`: endings of those with a LoRA."""

    text: dict[str, Any]
    vision: dict[str, Any]
    size: int  # of the squashed picture
    sigma: float
    hidden_mult: int
    rank: int
    alpha: int
    matrices: tuple[str, ...]
    anchors: tuple[int, ...]  # of each question's picture; 0 = it comes without
    masked: int  # anchors of the first picture that are masked
    penalty: float = 1.0  # of repeated tokens, the prompt's included
    old: bool = False  # names and a flat config as Qwen published them, two files and an index, LoRA in half precision
    tlm: dict[str, list[int]] = field(default_factory=lambda: {"square": [8, 8], "wide": [4, 12]})

    @property
    def patch(self) -> int:
        return self.vision["patch_size"]

    @property
    def merge(self) -> int:
        return self.vision["spatial_merge_size"]

    @property
    def side(self) -> int:
        return self.size // self.patch


ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
VARIANTS = {
    "wider, deeper, grouped by three": Variant(
        text={
            "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 6,
            "num_key_value_heads": 2, "rms_norm_eps": 1e-4, "rope_theta": 50000.0, "tie_word_embeddings": False,
            "mrope_section": [2, 1, 1],
        },
        vision={
            "hidden_size": 40, "depth": 3, "num_heads": 2, "intermediate_size": 36, "patch_size": 14,
            "window_size": 84, "fullatt_block_indexes": [1], "spatial_merge_size": 2,
        },
        size=140, sigma=1.25, hidden_mult=3, rank=3, alpha=7, matrices=ALL, anchors=(5, 3), masked=1,
        penalty=1.8,
    ),
    "one head of keys, tied, three patches a side": Variant(
        text={
            "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 1, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": True,
            "mrope_section": [2, 3, 3],
        },
        vision={
            "hidden_size": 32, "depth": 2, "num_heads": 4, "intermediate_size": 20, "patch_size": 7,
            "window_size": 42, "fullatt_block_indexes": [0], "spatial_merge_size": 3,
        },
        size=84, sigma=0.7, hidden_mult=1, rank=5, alpha=16, matrices=("q_proj", "v_proj", "attn.qkv"),
        anchors=(2, 0), masked=0, old=True, tlm={"square": [9, 9], "tall": [12, 6]},
    ),
}  # fmt: skip


class Reference:
    """A variant's base of `transformers`, its LoRA and its modulation, all random."""

    def __init__(self, variant: Variant) -> None:
        torch.manual_seed(3)
        self.variant, v = variant, variant
        text = {name: value for name, value in v.text.items() if name not in ("rope_theta", "mrope_section")}
        rope = {"rope_type": "default", "rope_theta": v.text["rope_theta"], "mrope_section": v.text["mrope_section"]}
        self.width = v.text["hidden_size"]
        config = transformers.Qwen2_5_VLConfig(
            text_config={**text, "vocab_size": len(IDS), "rope_parameters": rope},
            vision_config={**v.vision, "out_hidden_size": self.width},
            image_token_id=PAD, video_token_id=len(IDS) - 1, vision_start_token_id=IDS["<|vision_start|>"],
            vision_end_token_id=IDS["<|vision_end|>"], tie_word_embeddings=v.text["tie_word_embeddings"],
            attn_implementation="sdpa",
        )  # fmt: skip
        self.model = transformers.Qwen2_5_VLForConditionalGeneration(config).eval()
        for name, p in self.model.named_parameters():
            p.data.normal_(std=0.1).add_(float("norm" in name or "ln_q" in name))
        for rows in (self.model.lm_head.weight, self.model.get_input_embeddings().weight):
            # Neither these nor spaces are likeliest: a placeholder without a picture is refused, nothing is not read.
            rows.data[: len(SPECIALS) + 2] = 0.0
        self.base = {name: t.clone() for name, t in self.model.state_dict().items()}
        hidden = max(128, v.hidden_mult * self.width)
        shapes = {"0.weight": (hidden, 64), "0.bias": (hidden,), "2.weight": (2 * self.width, hidden),
                  "2.bias": (2 * self.width,)}  # fmt: skip
        self.film = {name: torch.randn(shape) * 0.1 for name, shape in shapes.items()}
        self.lora: dict[str, tuple[Tensor, Tensor]] = {}
        self.kept: dict[str, Tensor] = {}
        self.known: list[tuple[Tensor, Tensor, Tensor] | None] | None = None
        for name, module in self.model.named_modules():
            if isinstance(module, torch.nn.Linear) and name.endswith(v.matrices):
                self._adapt(name, module)
        self.model.model.visual.register_forward_hook(self._visual)
        self.model.model.visual.merger.register_forward_hook(self._merger)
        self.model.model.language_model.register_forward_pre_hook(self._decoder, with_kwargs=True)

    def _adapt(self, name: str, linear: torch.nn.Linear) -> None:
        down = torch.randn(self.variant.rank, linear.in_features) * 0.1
        up = torch.randn(linear.out_features, self.variant.rank) * 0.1
        if self.variant.old:  # as it was trained, in bfloat16
            down, up = down.bfloat16().float(), up.bfloat16().float()
        self.lora[name] = down, up
        scale = self.variant.alpha / self.variant.rank

        def beside(_: Any, x: tuple[Tensor, ...], y: Tensor) -> Tensor:
            return y + F.linear(F.linear(x[0], down), up) * scale

        linear.register_forward_hook(beside)

    def _merger(self, _: Any, __: Any, output: Tensor) -> None:
        self.kept["merger_out_window_order"] = output.clone()

    def _visual(self, _: Any, __: Any, output: Any) -> None:
        plain = output.pooler_output
        self.kept["visual_before_tlm"] = plain.clone()
        if self.known is None:
            return
        side, n = self.variant.side, len(plain) // len(self.known)
        parts = [
            x if known is None else self.modulated(x, (side, side), *known)
            for x, known in zip(plain.split(n), self.known, strict=True)
        ]
        output.pooler_output = torch.cat(parts)
        self.kept["visual_after_tlm"] = output.pooler_output.clone()

    def _decoder(self, _: Any, __: Any, named: dict[str, Any]) -> None:
        self.kept["inputs_embeds"] = named["inputs_embeds"].clone()
        self.kept["position_ids"] = named["position_ids"][-3:].clone()

    def fields(self, grid: tuple[int, int], vectors: Tensor, places: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Weights [H * W, S] of the anchors, and gamma and beta [H, W, 2C] of the patches, each patch for itself."""
        (h, w), c = grid, self.film
        added = F.linear(F.silu(F.linear(vectors, c["0.weight"], c["0.bias"])), c["2.weight"], c["2.bias"])  # [S, 2C]
        weights = torch.zeros(h * w, len(vectors))
        for row in range(h):
            for column in range(w):
                far = (places[:, 0] * (h - 1) - row) ** 2 + (places[:, 1] * (w - 1) - column) ** 2
                near = torch.exp(-far / (2 * self.variant.sigma**2))
                near = near / (near.sum() + 1e-6) * mask.float()
                weights[row * w + column] = near / (near.sum() + 1e-6)
        return weights, (weights @ added).view(h, w, -1)

    def modulated(self, tokens: Tensor, grid: tuple[int, int], vectors: Tensor, places: Tensor, mask: Tensor) -> Tensor:
        """x (1 + gamma) + beta, gamma and beta drawn bilinearly from the patches onto the squarest grid of tokens."""
        _, field_ = self.fields(grid, vectors, places, mask)
        rows = round(math.sqrt(len(tokens)))
        columns = math.ceil(len(tokens) / rows)
        cells = [self._between(field_, (rows, columns), (i, j)) for i in range(rows) for j in range(columns)]
        if len(cells) != len(tokens):
            cells = [cells[int(i)] for i in torch.linspace(0, len(cells) - 1, len(tokens)).round()]
        gamma, beta = torch.stack(cells).chunk(2, -1)
        return tokens * (1 + gamma) + beta

    @staticmethod
    def _between(field_: Tensor, size: tuple[int, int], at: tuple[int, int]) -> Tensor:
        """A field's value [2C] at a cell of another grid over the same square, centres between centres."""
        ends = []
        for axis in (0, 1):
            place = max((at[axis] + 0.5) * field_.shape[axis] / size[axis] - 0.5, 0.0)
            low = int(place)
            ends.append((low, min(low + 1, field_.shape[axis] - 1), place - low))
        (top, bottom, down), (left, right, across) = ends
        upper = field_[top, left] * (1 - across) + field_[top, right] * across
        lower = field_[bottom, left] * (1 - across) + field_[bottom, right] * across
        return upper * (1 - down) + lower * down

    def logits(self, ids: Tensor, patches: Tensor, known: tuple[Tensor, Tensor, Tensor] | None) -> Tensor:
        """[1, T, V] of one prompt [T] with one picture."""
        self.known = None if known is None else [known]
        grid = torch.tensor([[1, self.variant.side, self.variant.side]])
        return self.model(
            input_ids=ids[None], pixel_values=patches, image_grid_thw=grid, use_cache=False,
            attention_mask=torch.ones_like(ids[None]), mm_token_type_ids=(ids == PAD).int()[None],
        ).logits  # fmt: skip


def cut(picture: Image.Image, v: Variant) -> Tensor:
    """A picture's patches, merge group by merge group, each colour twice in time."""
    square = np.asarray(picture.resize((v.size, v.size), Image.Resampling.BICUBIC), np.float32) / 255
    square = (square - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    groups, found = range(v.side // v.merge), []
    for row, column in ((r, c) for r in groups for c in groups):
        for i, j in ((i, j) for i in range(v.merge) for j in range(v.merge)):
            y, x = (row * v.merge + i) * v.patch, (column * v.merge + j) * v.patch
            cell = square[y : y + v.patch, x : x + v.patch].transpose(2, 0, 1)
            found.append(np.stack((cell, cell), 1).reshape(-1))
    return torch.from_numpy(np.stack(found))


def spelled(text: str) -> list[int]:
    return [IDS[sign] for sign in text]


def asked(question: str, count: int) -> Tensor:
    """Ids of a question about a picture of so many tokens."""
    start, after = IDS["<|im_start|>"], [IDS["<|vision_end|>"], *spelled(question), END, *spelled("\n")]
    return torch.tensor([
        start, *spelled("user\n"), IDS["<|vision_start|>"], *[PAD] * count, *after, start, *spelled("assistant\n")
    ])  # fmt: skip


def write(folder: Path, v: Variant, reference: Reference) -> None:
    """Base, adapter and modulation in the layouts that are published."""
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir()
    adapter.mkdir()
    vision = {**v.vision, "out_hidden_size": reference.width, "hidden_act": "silu", "temporal_patch_size": 2}
    rope = {"type": "mrope" if v.old else "default", "mrope_section": v.text["mrope_section"]}
    text = {name: value for name, value in v.text.items() if name not in ("mrope_section", "tie_word_embeddings")}
    text |= {"rope_scaling": rope, "vocab_size": len(IDS), "hidden_act": "silu", "use_sliding_window": False}
    text = text if v.old else {"text_config": {**text, "layer_types": ["full_attention"] * text["num_hidden_layers"]}}
    config = {"model_type": "qwen2_5_vl", "image_token_id": PAD, "vision_config": vision, **text,
              "tie_word_embeddings": v.text["tie_word_embeddings"]}  # fmt: skip
    (base / "config.json").write_text(json.dumps(config))
    (base / "generation_config.json").write_text(json.dumps({"repetition_penalty": v.penalty, "do_sample": True}))

    tied = ["lm_head.weight"] if v.text["tie_word_embeddings"] else []
    tensors = {name: t for name, t in reference.base.items() if name not in tied}
    if v.old:
        renamed = (("model.language_model.", "model."), ("model.visual.", "visual."))
        for new, old in renamed:
            tensors = {name.replace(new, old): t for name, t in tensors.items()}
        names = sorted(tensors)
        files = {f"model-0000{n + 1}-of-00002.safetensors": names[n::2] for n in (0, 1)}
        for file, own in files.items():
            save_file({name: tensors[name].contiguous() for name in own}, base / file)
        index = {"weight_map": {name: file for file, own in files.items() for name in own}}
        (base / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        save_file({name: t.contiguous() for name, t in tensors.items()}, base / "model.safetensors")

    lora = {}
    for name, pair in reference.lora.items():
        place = name.replace("model.language_model.", "model.").replace("model.visual.", "visual.") if v.old else name
        for part, tensor in zip("AB", pair, strict=True):
            half = tensor.bfloat16() if v.old else tensor
            lora[f"base_model.model.{place}.lora_{part}.weight"] = half.contiguous()
    save_file(lora, adapter / "adapter_model.safetensors")
    described = {
        "peft_type": "LORA", "r": v.rank, "lora_alpha": v.alpha, "lora_dropout": 0.05, "bias": "none",
        "init_lora_weights": True, "inference_mode": True, "base_model_name_or_path": "Qwen/Qwen2.5-VL-7B-Instruct",
        "target_modules": ".*(q_proj|v_proj|attn.qkv)" if v.old else sorted(reference.lora), "use_dora": False,
    }  # fmt: skip
    (adapter / "adapter_config.json").write_text(json.dumps(described))
    torch.save({"film_mlp": reference.film}, adapter / "vec64_film.pt")
    (adapter / "tlm_config.json").write_text(json.dumps({
        "format": "tlm_original_train_patch_resize_v1", "sigma": v.sigma, "hidden_mult": v.hidden_mult,
        "image_size": v.size, "vec_dim": 64,
    }))  # fmt: skip
    tokenizer = Tokenizer(models.WordLevel(IDS, unk_token="~"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(SPECIALS)
    tokenizer.save(str(adapter / "tokenizer.json"))
    (adapter / "chat_template.jinja").write_text(TEMPLATE)
    (adapter / "preprocessor_config.json").write_text(json.dumps({
        "image_mean": MEAN, "image_std": STD, "patch_size": v.patch, "merge_size": v.merge, "temporal_patch_size": 2,
        "min_pixels": 3136, "max_pixels": 12845056, "resample": 3, "do_resize": True, "rescale_factor": 1 / 255,
    }))  # fmt: skip


def record(folder: Path, v: Variant, reference: Reference) -> None:
    """Inputs and results, in the form of the recordings."""
    inputs: dict[str, Tensor] = {}
    results: dict[str, Tensor] = {}
    example = folder / "example"
    example.mkdir()
    questions, answers, pictures, anchors = [], [], [], []
    generator = np.random.default_rng(5)
    for i, count in enumerate(v.anchors):
        picture = Image.fromarray(generator.integers(0, 256, (50 + 30 * i, 70, 3), np.uint8))
        picture.save(example / f"i{i}.png")
        pictures.append(cut(picture, v))
        vectors, places = torch.randn(count, 64), torch.rand(count, 2)
        anchors.append((vectors, places, torch.ones(count, dtype=torch.bool)) if count else None)
        question = {"id": f"r{i}", "image": f"i{i}.png", "question": f"<image>\nDetect ships {i}.", "answer": "None"}
        if count:
            np.savez(example / f"a{i}.npz", features=vectors.numpy(), positions=places.numpy())
            question["aef"] = f"a{i}.npz"
        questions.append(question)
    count = (v.side // v.merge) ** 2
    prompts = [asked(f"Detect ships {i}.", count) for i in range(len(questions))]

    vectors, places, mask = anchors[0]
    mask = mask.clone()
    mask[len(mask) - v.masked :] = False
    ids = torch.cat((prompts[0], torch.tensor([*spelled("None"), END])))
    labels = torch.cat((torch.full_like(prompts[0], -100), ids[len(prompts[0]) :]))
    grid = torch.tensor([[1, v.side, v.side]])
    inputs |= {"train.input_ids": ids[None], "train.pixel_values": pictures[0], "train.image_grid_thw": grid}
    inputs |= {"train.labels": labels[None], "train.vec64_seq": vectors[None], "train.vec64_pos": places[None]}
    inputs |= {"train.vec64_mask": mask[None], "infer.input_ids": prompts[0][None]}
    results["no_tlm.logits"] = reference.logits(ids, pictures[0], None)
    results["train.logits"] = reference.logits(ids, pictures[0], (vectors, places, mask))
    results["train.loss"] = F.cross_entropy(results["train.logits"][0, :-1], labels[1:])[None]
    results |= {f"train.{name}": kept for name, kept in reference.kept.items()}
    for i, (ids, picture, known) in enumerate(zip(prompts, pictures, anchors, strict=True)):
        new, steps, start = [], [], len(ids)
        for _ in range(STEPS):
            steps.append(reference.logits(ids, picture, known)[0, -1])
            scores = steps[-1].clone()
            for token in set(ids.tolist()):
                scores[token] = scores[token] / v.penalty if scores[token] > 0 else scores[token] * v.penalty
            new.append(int(scores.argmax()))
            ids = torch.cat((ids, torch.tensor(new[-1:])))
        if i == 0:
            results |= {"gen.step_logits": torch.stack(steps)[None], "gen.new_ids": torch.tensor([new]),
                        "gen.sequences": ids[None]}  # fmt: skip
        signs = {n: sign for sign, n in IDS.items() if sign not in SPECIALS}
        text = "".join(signs.get(int(n), "") for n in ids[start:]).strip()
        assert text, "an answer of nothing compares nothing"
        answers.append({"id": f"r{i}", "prediction_text": text})
    (example / "train.jsonl").write_text("\n".join(map(json.dumps, questions)))
    (folder / "predictions.jsonl").write_text("\n".join(map(json.dumps, answers)))
    save_file({name: t.contiguous() for name, t in inputs.items()}, folder / "e2e_inputs.safetensors")
    save_file({name: t.contiguous() for name, t in results.items()}, folder / "e2e_cases.safetensors")

    inputs, results = {}, {}
    for name, (h, w) in v.tlm.items():
        tokens = torch.randn(h * w // v.merge**2, reference.width)
        known = torch.randn(4, 64), torch.rand(4, 2), torch.tensor([True, True, False, True])
        parts = zip(("seq", "pos", "mask"), known, strict=True)
        inputs |= {f"{name}.tokens": tokens, f"{name}.grid_thw": torch.tensor([[1, h, w]])}
        inputs |= {f"{name}.vec64_{part}": tensor[None] for part, tensor in parts}
        results[f"{name}.output"] = reference.modulated(tokens, (h, w), *known)
        results[f"{name}.weights_final_HWxS"] = reference.fields((h, w), *known)[0]
    save_file({f"film_mlp.{name}": t for name, t in reference.film.items()}, folder / "tlm_state.safetensors")
    save_file(inputs, folder / "tlm_inputs.safetensors")
    save_file(results, folder / "tlm_cases.safetensors")


@pytest.fixture(scope="module", params=list(VARIANTS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A variant's recording."""
    path, variant = tmp_path_factory.mktemp("fusar"), VARIANTS[request.param]
    with torch.no_grad():
        reference = Reference(variant)
        write(path, variant, reference)
        record(path, variant, reference)
    return path


def test_another_size_sigma_rank_and_grid_come_out_of_verify(folder: Path) -> None:
    result = CliRunner().invoke(app, ["verify", str(folder)])
    assert result.exit_code == 0, result.output
    assert "recorded but not compared" not in result.output, result.output
    for kind in ("merged", "modulation", "features", "embeddings", "logits", "ids", "pixels"):
        assert f"  {kind} " in result.output


@pytest.mark.parametrize(("field_", "value"), [("sigma", 1.0), ("hidden_mult", 9), ("image_size", 168)])
def test_another_setting_of_the_modulation_does_not_pass(folder: Path, field_: str, value: float) -> None:
    path = folder / "adapter" / "tlm_config.json"
    before = path.read_text()
    path.write_text(json.dumps({**json.loads(before), field_: value}))
    try:
        result = CliRunner().invoke(app, ["verify", str(folder)])
    finally:
        path.write_text(before)
    assert result.exit_code == 1, result.output
    assert "FAILED" in result.output
