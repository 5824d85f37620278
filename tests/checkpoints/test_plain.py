"""Plain LLaVA and Qwen2.5-VL: tiny random models of `transformers`, saved by it, compute the same in ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from model_server.checkpoints.adapters import find_family, llava, qwen_vl
from model_server.checkpoints.published import UnsupportedLayout
from model_server.checkpoints.store import WeightsError
from model_server.model.llava import IMAGE

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A tiny LLaVA of `transformers`, grouped heads and an eps and rope base of its own, and its folder."""
    torch.manual_seed(0)
    text = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=80, rms_norm_eps=1e-4, rope_theta=5000.0, max_position_embeddings=256,
    )  # fmt: skip
    vision = transformers.CLIPVisionConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=7,
        layer_norm_eps=1e-4,
    )  # fmt: skip
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=79)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    for p in model.parameters():
        p.data.normal_(std=0.15)
    folder = tmp_path_factory.mktemp("llava")
    model.save_pretrained(folder)
    return model, folder


def logits_of(model: Any, ids: list[int], pixels: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        prompt = model.prompt([torch.tensor([IMAGE if i == 79 else i for i in ids])], [model.encode([pixels])])
        return model.decoder.logits(model(prompt, torch.tensor([0])))


def test_llava_as_transformers_saves_it_gives_its_logits(reference: tuple[Any, Path]) -> None:
    theirs, folder = reference
    assert find_family(folder) is llava
    ours, report = llava.load(folder)
    assert report.fits
    pixels = torch.randn(1, 3, 28, 28)
    ids = [1, 5, 79, 6, 7, 8]
    whole = torch.tensor([1, 5, *[79] * 16, 6, 7, 8])[None]
    with torch.no_grad():
        wanted = theirs(input_ids=whole, pixel_values=pixels, attention_mask=torch.ones_like(whole)).logits
    torch.testing.assert_close(logits_of(ours, ids, pixels), wanted, atol=1e-4, rtol=1e-4)


def test_llava_in_its_original_layout_computes_the_same(reference: tuple[Any, Path], tmp_path: Path) -> None:
    _, folder = reference
    ours, _ = llava.load(folder)
    tensors = {llava._original_name(name): t for name, t in load_file(folder / "model.safetensors").items()}
    tower = {name: tensors.pop(name).contiguous() for name in list(tensors) if name.startswith("vision_model.")}
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "tower").mkdir()
    save_file(tower, tmp_path / "tower" / "model.safetensors")
    (tmp_path / "tower" / "config.json").write_text(json.dumps(config["vision_config"]))
    save_file(tensors, tmp_path / "model.safetensors")
    raw = {
        **config["text_config"], "model_type": "llava_llama", "mm_vision_tower": "tower",
        "mm_vision_select_layer": -2, "mm_projector_type": "mlp2x_gelu", "mm_vision_select_feature": "patch",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert find_family(tmp_path) is llava
    again, _ = llava.load(tmp_path)
    pixels = torch.randn(1, 3, 28, 28)
    torch.testing.assert_close(logits_of(again, [1, 79, 4], pixels), logits_of(ours, [1, 79, 4], pixels))
    (tmp_path / "tower").rename(tmp_path / "elsewhere")
    with pytest.raises(WeightsError, match="names 'tower'"):
        llava.load(tmp_path)


@pytest.mark.parametrize(
    "fields",
    [{"vision_feature_select_strategy": "full"}, {"vision_feature_layer": [-2, -5]}, {"projector_hidden_act": "relu"}],
)
def test_what_is_not_computed_is_refused(reference: tuple[Any, Path], fields: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedLayout):
        llava.load(reference[1], overrides=fields)


def test_qwen_vl_as_transformers_saves_it_gives_its_logits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 80, "rms_norm_eps": 1e-4, "tie_word_embeddings": False,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 5000.0},
        },
        vision_config={
            "hidden_size": 32, "depth": 2, "num_heads": 4, "intermediate_size": 40, "out_hidden_size": 32,
            "patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1],
        },
        image_token_id=70, vision_start_token_id=71, vision_end_token_id=72, video_token_id=73,
    )  # fmt: skip
    theirs = transformers.Qwen2_5_VLForConditionalGeneration(config).eval()
    for p in theirs.parameters():
        p.data.normal_(std=0.15)
    theirs.save_pretrained(tmp_path)
    assert find_family(tmp_path) is qwen_vl
    ours, report = qwen_vl.load(tmp_path)
    assert report.fits
    grid = (6, 8)
    patches = torch.randn(48, 1176)
    ids = torch.tensor([1, 71, *[70] * 12, 72, 4, 5])
    with torch.no_grad():
        wanted = theirs(
            input_ids=ids[None], pixel_values=patches, image_grid_thw=torch.tensor([[1, *grid]]),
            mm_token_type_ids=(ids == 70).int()[None],
        ).logits  # fmt: skip
        tokens = ours.encode(patches, [grid])
        found = ours.decoder.logits(ours(ours.prompt([ids], [[(tokens[0], grid)]])))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
