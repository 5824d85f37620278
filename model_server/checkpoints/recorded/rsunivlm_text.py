"""RSUniVLM's recorded strings and pictures, which need no checkpoint: routes, prompts, tokens, boxes, masks, tilings
and pixels. What the authors' code refused must be refused here.

Left padding is recorded too and not compared: batches here are padded on the right.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from model_server.checkpoints.adapters.rsunivlm import merge_config
from model_server.checkpoints.verify import TEXT_CASES, Comparison
from model_server.families.pictures import Processing
from model_server.families.rsunivlm import HALF, expert_of, prompt
from model_server.families.words import Words
from model_server.model.config import EXPERTS, MergeConfig
from model_server.model.merging import TilesDoNotFit, best_grid, cut_padding
from model_server.text.boxes import BoxDialect, parse_boxes
from model_server.text.malformed import MalformedText
from model_server.text.masks import BACKGROUND, MaskDialect, parse_mask

PIXELS = "preprocess.json"
Case = dict[str, Any]
REFUSED = "refused"
_MOST_BOXES = 6  # the published painter has so many colours and gives up beyond; reading goes on


def compare(folder: Path, comparison: Comparison) -> None:
    """Run every case of a folder."""
    for n, case in enumerate(json.loads((folder / TEXT_CASES).read_text(encoding="utf-8"))):
        function = case["function"].partition("(")[0]
        name = f"{function}/{n}"
        comparison.expect([name])
        if function in _COMPARED:
            kind, run = _COMPARED[function]
            comparison.same(kind, name, *run(case["input"], case.get("output", REFUSED)))
    if (folder / PIXELS).is_file():
        _pixels(folder, comparison)
    comparison.cases.extend(dict.fromkeys(name.partition("/")[0] for name in sorted(comparison.seen)))


def _route(text: str, output: int) -> tuple[object, object]:
    return EXPERTS.index(expert_of(text)), output


def _call(asked: Case, made: Case) -> tuple[object, object]:
    """The whole prompt, its ids and the granularity of a call."""
    text = prompt(asked["message"], asked["n_images"])
    ours = [text, characters(start=False).prompt(text), EXPERTS.index(expert_of(asked["message"]))]
    return ours, [made["prompt"], made["input_ids_chars"][0], made["generate_kwargs"]["granularity"]]


def _tokens(asked: Case, output: list[int]) -> tuple[object, object]:
    return characters(asked["char_tokenizer_bos"] is not None).prompt(asked["prompt"]), output


def _boxes(asked: Case, output: Case) -> tuple[object, object]:
    drawn = [[*box["p1"], *box["p2"]] for box in output["drawn"]]
    try:
        read = parse_boxes(asked["text"], BoxDialect.PERCENT, (asked["width"], asked["height"]), strict=True).boxes
    except MalformedText:
        return REFUSED, drawn if output["returned_image"] else REFUSED
    ours = [[int(corner) for corner in (box.x1, box.y1, box.x2, box.y2)] for box in read]
    given_up = not output["returned_image"] and len(ours) > _MOST_BOXES
    return ours[:_MOST_BOXES], drawn if output["returned_image"] or given_up else REFUSED


def _mask(asked: Case, output: Case | None) -> tuple[object, object]:
    recorded = REFUSED if output is None else output["channel0"]
    try:
        grid = parse_mask(asked["text"], MaskDialect.RSUNIVLM, strict=True)
    except MalformedText:
        return REFUSED, recorded
    return ((~grid.mask(BACKGROUND, *asked["imgsize"])) * 255).tolist(), recorded


def _tiling(asked: Case, output: object) -> tuple[object, object]:
    raw = {"mm_patch_merge_type": "spatial_unpad", "image_aspect_ratio": "anyres",
           "image_grid_pinpoints": asked["grid_pinpoints"]}  # fmt: skip
    width, height = asked["image_size"]
    config = merge_config(raw)
    try:
        grid = best_grid((width, height), config.grids)
    except TilesDoNotFit:
        return REFUSED, output
    return [side // config.tile for side in grid], output


def _unpadded(asked: Case, output: Case) -> tuple[object, object]:
    h, w = asked["current_hw"]
    width, height = asked["original_size"]
    cut = cut_padding(torch.arange(h * w).view(1, h, w), (width, height))
    ends = (int(cut.flatten()[0]), int(cut.flatten()[-1])) if cut.numel() else (None, None)
    return {"shape": list(cut.shape), "first": ends[0], "last": ends[1]}, output


_COMPARED: dict[str, tuple[str, Callable[[Any, Any], tuple[object, object]]]] = {
    "router": ("routes", _route),
    "echo": ("prompts", _call),
    "tokenizer_image_token": ("ids", _tokens),
    "draw_box": ("boxes", _boxes),
    "parse_output_string": ("masks", _mask),
    "get_anyres_image_grid_shape": ("tilings", _tiling),
    "unpad_image": ("tilings", _unpadded),
}


def _pixels(folder: Path, comparison: Comparison) -> None:
    tensors = load_file(folder / "preprocess.safetensors")
    for case in json.loads((folder / PIXELS).read_text(encoding="utf-8")):
        if "output" not in case:  # the authors' code raised; a checkpoint that names no aspect is served as `square`
            continue
        grids = tuple((w, h) for w, h in case["image_grid_pinpoints"])
        merge = MergeConfig(tile=24, grids=grids)
        processing = Processing(size=24, mean=HALF, std=HALF, aspect=case["image_aspect_ratio"], merge=merge)
        (name,) = [name for name in tensors if name.endswith(case["pic"]) and not name.startswith("out/")]
        recorded = tensors[case["output"]]
        title = case["output"].replace("out/", "process_images/")
        comparison.expect([title])
        ours = processing.views(tensors[name].numpy())
        comparison.tensor("pixels", title, ours.view(recorded.shape), recorded)


def characters(start: bool) -> Words:
    """The recorded tokenizer: each character is its code; a start token 1 where asked for."""
    ids = {chr(code): code for code in range(2, 128)} | {"<unk>": 0, "<s>": 1}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if start:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return Words(tokenizer, frozenset({2}))
