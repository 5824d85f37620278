"""What a published config can ask for that changes the numbers: it is computed, or refused by its name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model_server.checkpoints.adapters import fusar, llava, mfrsvlm, rsunivlm
from model_server.checkpoints.adapters.fusar_inputs import PromptWriter
from model_server.checkpoints.files import open_tensors
from model_server.checkpoints.published import UnsupportedLayout, decoder_config, feature_layer
from model_server.checkpoints.store import WeightsError
from model_server.checkpoints.verify import verify
from model_server.families.pictures import Processing, clip_processing
from model_server.model.config import QwenVisionConfig, QwenVLConfig
from model_server.model.llava import IMAGE
from model_server.model.merging import TilesDoNotFit, merge_tiles

ORACLES = Path(__file__).parent / "oracles"
TEXT: dict[str, Any] = {"vocab_size": 20, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 40}
CLIP: dict[str, Any] = {"hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 3, "image_size": 28,
                        "patch_size": 7, "intermediate_size": 40, "model_type": "clip_vision_model"}  # fmt: skip
QWEN: dict[str, Any] = {
    **TEXT, "model_type": "qwen2_5_vl", "image_token_id": 7, "num_hidden_layers": 2, "num_key_value_heads": 2,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]},
    "vision_config": {"hidden_size": 32, "num_heads": 4, "depth": 2, "out_hidden_size": 32},
}  # fmt: skip


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[str], Path]:
    """A writable copy of a recording."""
    return lambda family: Path(shutil.copytree(ORACLES / family, tmp_path / family))


# --- decoders --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "type = 'linear'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_type = 'llama3'"),
        ({"rope_scaling": {"factor": 2.0}}, "factor"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type = 'yarn'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}}, "partial_rotary_factor"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"use_sliding_window": True, "sliding_window": 4096}, "use_sliding_window"),
        ({"attention_bias": True}, "attention_bias"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"head_dim": 16}, "head_dim"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"hidden_act": "gelu"}, "hidden_act"),
    ],
)
def test_a_decoder_of_another_kind_is_refused_by_the_key_that_asks_for_it(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedLayout, match=named.replace("[", r"\[")):
        decoder_config({**TEXT, **fields})


def test_the_rotary_base_is_read_where_older_and_newer_configs_keep_it() -> None:
    assert decoder_config(TEXT).rope_base == 10000.0
    assert decoder_config({**TEXT, "rope_theta": 50000.0}).rope_base == 50000.0
    newer = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
    assert decoder_config({**TEXT, **newer}).rope_base == 500.0


def test_what_a_qwens_config_leaves_out_is_as_in_its_own_class() -> None:
    transformers = pytest.importorskip("transformers")
    theirs, left = transformers.Qwen2_5_VLConfig().text_config, ("rms_norm_eps", "num_key_value_heads")
    given = {**QWEN, "num_attention_heads": 8, "hidden_size": 64, "vision_config": {}}
    del given["num_key_value_heads"]
    ours = fusar.read_base_config(given, "q").decoder
    assert [ours.norm_eps, ours.kv_heads] == [getattr(theirs, name) for name in left]
    assert ours.rope_base == theirs.rope_parameters["rope_theta"]


def test_scaled_rotary_frequencies_of_a_qwen_are_refused_under_either_key() -> None:
    for key in ("type", "rope_type"):
        rope = {key: "yarn", "factor": 4.0, "mrope_section": [2, 1, 1]}
        with pytest.raises(UnsupportedLayout, match="yarn"):
            fusar.read_base_config({**QWEN, "rope_scaling": rope}, "qwen")


@pytest.mark.parametrize("section", [[2, 1, 2], [4]])
def test_sections_that_do_not_fill_half_a_head_are_refused(section: list[int]) -> None:
    with pytest.raises(UnsupportedLayout, match="mrope_section"):
        fusar.read_base_config({**QWEN, "rope_scaling": {"type": "mrope", "mrope_section": section}}, "qwen")


def test_rsunivlm_sets_rotary_scaling_aside_as_its_published_class_does(copied: Callable[[str], Path]) -> None:
    folder = copied("rsunivlm") / "checkpoint"
    config = json.loads((folder / "config.json").read_text())
    plain = rsunivlm.read_config(folder, config)
    assert rsunivlm.read_config(folder, {**config, "rope_scaling": {"type": "linear", "factor": 2.0}}) == plain


def test_another_tower_than_siglip_is_refused_by_its_kind(copied: Callable[[str], Path]) -> None:
    folder = copied("rsunivlm") / "checkpoint"
    (folder / "siglip_tiny" / "config.json").write_text(json.dumps(CLIP))
    with pytest.raises(UnsupportedLayout, match="clip_vision_model"):
        rsunivlm.load(folder)


def test_a_tied_head_that_is_another_than_the_embedding_is_refused(copied: Callable[[str], Path]) -> None:
    folder = copied("rsunivlm") / "checkpoint"  # tied, and without a head
    tensors = load_file(folder / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    save_file({**tensors, "lm_head.weight": head}, folder / "model.safetensors")
    assert "lm_head.weight" in rsunivlm.load(folder)[1].unused
    save_file({**tensors, "lm_head.weight": head + 1}, folder / "model.safetensors")
    with pytest.raises(UnsupportedLayout, match="tie_word_embeddings"):
        rsunivlm.load(folder)


def test_a_sequence_with_an_image_is_cut_at_the_configs_length_and_text_alone_is_not(
    copied: Callable[[str], Path],
) -> None:
    model, _ = rsunivlm.load(copied("rsunivlm") / "checkpoint", overrides={"tokenizer_model_max_length": 6})
    ids = torch.arange(3, 12)
    with torch.no_grad():
        encoded = model.encode([torch.zeros(1, 3, 18, 18)])
        assert model.prompt([ids], [[]]).real.sum(1).tolist() == [9]
        shown = torch.cat((torch.tensor([IMAGE]), ids))
        assert model.prompt([shown, ids], [encoded, []]).real.sum(1).tolist() == [6, 6]


def test_tiles_of_a_tower_with_another_grid_of_tokens_are_refused_in_words() -> None:
    merge = rsunivlm.merge_config({"mm_patch_merge_type": "spatial_unpad", "image_aspect_ratio": "pad"})
    with pytest.raises(TilesDoNotFit, match="a tile has 16 tokens; tiles are put together of 27 x 27"):
        merge_tiles(torch.zeros(5, 16, 2), (60, 60), merge, torch.zeros(2))


# --- towers and detail views -----------------------------------------------------------------------------------------


def test_one_layer_of_the_tower_is_selected_and_no_other_than_it_has() -> None:
    assert [feature_layer(n, 3) for n in (-1, -4, 0, [3], [-2])] == [3, 0, 0, 3, 2]
    for selected in (4, -5, [1, 2], "last", None):
        with pytest.raises(UnsupportedLayout, match="selects the tower's layers"):
            feature_layer(selected, 3)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"deepstack_detail_layers": []}, "deepstack_detail_layers"),
        ({"deepstack_window_scales": []}, "deepstack_window_scales"),
        ({"deepstack_downsample_factor": 1}, "do not fit its tower"),
        ({"mm_vision_select_layer": [9]}, "selects the tower's layers"),
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature"),
        ({"mm_projector_type": "linear"}, "mm_projector_type"),
    ],
)
def test_a_detail_view_that_cannot_be_is_refused_when_it_is_loaded(
    copied: Callable[[str], Path], fields: dict[str, Any], named: str
) -> None:
    with pytest.raises(UnsupportedLayout, match=named):
        mfrsvlm.load(copied("mfrsvlm") / "checkpoint", overrides=fields)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rotary_rates_saved_in_any_precision_are_those_of_the_published_base(dtype: torch.dtype) -> None:
    name, shares = "model.layers.0.self_attn.rotary_emb.inv_freq", torch.arange(64) / 64
    saved = (1 / 10000**shares).to(dtype)
    assert mfrsvlm._rope_base({name: lambda: saved}, 500000.0) == 10000.0
    assert mfrsvlm._rope_base({name: lambda: saved}, 10000.0) == 10000.0
    other = (1 / 30000**shares).to(dtype)
    if dtype == torch.float32:
        assert mfrsvlm._rope_base({name: lambda: other}, 10000.0) == 30000.0
    else:
        with pytest.raises(UnsupportedLayout, match="inv_freq"):
            mfrsvlm._rope_base({name: lambda: other}, 10000.0)


def test_a_tower_that_was_trained_too_is_the_checkpoints_own(tmp_path: Path) -> None:
    text = {**TEXT, "num_hidden_layers": 1, "model_type": "llava_llama", "mm_vision_tower": "tower",
            "mm_vision_select_layer": -2, "mm_projector_type": "mlp2x_gelu"}  # fmt: skip
    (tmp_path / "tower").mkdir()
    (tmp_path / "tower" / "config.json").write_text(json.dumps(CLIP))
    shapes = llava.clip_llama_plan(llava.read_config(text, CLIP))
    tensors = {name: torch.randn(pieces[0].shape) for name, pieces in shapes.items()}
    tower = {name: t for name, t in tensors.items() if name.startswith("vision_model.")}
    save_file(tower, tmp_path / "tower" / "model.safetensors")
    own = {f"model.vision_tower.vision_tower.{name}": t + 1 for name, t in tower.items()}
    save_file({**{n: t for n, t in tensors.items() if n not in tower}, **own}, tmp_path / "model.safetensors")
    for fields, more in (({}, 0), ({"unfreeze_mm_vision_tower": True}, 1),
                         ({"mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter"}, 1)):  # fmt: skip
        (tmp_path / "config.json").write_text(json.dumps({**text, **fields}))
        places = llava.load(tmp_path)[0].tower.places
        assert torch.equal(places, tower["vision_model.embeddings.position_embedding.weight"] + more), fields


# --- LoRA ------------------------------------------------------------------------------------------------------------


def lora(folder: Path, **fields: Any) -> Path:
    """An adapter of rank 2 on one matrix of 6 x 4."""
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "bias": "none", **fields}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    name = "base_model.model.model.layers.0.mlp.up_proj"
    pair = {f"{name}.lora_A.weight": torch.ones(2, 4), f"{name}.lora_B.weight": torch.ones(6, 2)}
    save_file({key: t.bfloat16() for key, t in pair.items()}, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize(
    "fields",
    [
        {"use_dora": True}, {"use_rslora": True}, {"use_qalora": True}, {"fan_in_fan_out": True}, {"bias": "lora_only"},
        {"rank_pattern": {"up_proj": 4}}, {"alpha_pattern": {"up_proj": 4}}, {"modules_to_save": ["lm_head"]},
        {"layer_replication": [[0, 1]]}, {"lora_bias": True}, {"trainable_token_indices": [1]}, {"r": 0},
        {"init_lora_weights": "pissa"}, {"peft_type": "LOHA"},
    ],
)  # fmt: skip
def test_an_adapter_that_is_no_plain_lora_is_refused_by_its_key(tmp_path: Path, fields: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedLayout, match=f"adapter_config.json has {next(iter(fields))} = "):
        fusar.low_ranks(lora(tmp_path, **fields), {"model.layers.0.mlp.up_proj.weight"})


@pytest.mark.parametrize("modules", [["up_proj"], "all-linear", r".*\.up_proj", None])
def test_a_lora_adds_alpha_over_r_times_its_product_whatever_names_its_modules(tmp_path: Path, modules: object) -> None:
    found, stray = fusar.low_ranks(lora(tmp_path, target_modules=modules), {"model.layers.0.mlp.up_proj.weight"})
    assert stray == []
    (low,) = found.values()
    assert torch.equal(low.added(torch.zeros(6, 4, dtype=torch.bfloat16)), torch.full((6, 4), 3.0))


def test_a_lora_of_another_rank_than_its_config_says_is_refused(tmp_path: Path) -> None:
    found, _ = fusar.low_ranks(lora(tmp_path, r=4), {"model.layers.0.mlp.up_proj.weight"})
    with pytest.raises(WeightsError, match=r"adapter_config\.json says r = 4"):
        found["model.layers.0.mlp.up_proj.weight"].added(torch.zeros(6, 4))


# --- files of tensors ------------------------------------------------------------------------------------------------


def values(folder: Path) -> dict[str, Tensor]:
    return {name: read() for name, read in open_tensors(folder).items()}


def test_an_index_says_which_shards_belong_together(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b": torch.zeros(1)}, tmp_path / "model-00002-of-00002.safetensors")
    save_file({"a": torch.ones(1)}, tmp_path / "model-00001-of-00003.safetensors")  # of an older checkpoint
    with pytest.raises(WeightsError, match=r"holds a in model-00001-of-00002\.safetensors and in model-00001-of-00003"):
        open_tensors(tmp_path)
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    # The index of a form that was not fetched says nothing about this one.
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "pytorch_model-1.bin"}}))
    assert {name: float(t) for name, t in values(tmp_path).items()} == {"a": 0, "b": 0}
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"not whole: model\.safetensors\.index\.json names model-00002-of-00002"):
        open_tensors(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00001.bin", "adapter_model.bin"])
@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_tensors_are_read_in_new_and_old_form(tmp_path: Path, name: str, zipped: bool) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / name, _use_new_zipfile_serialization=zipped)
    assert values(tmp_path)["a"].tolist() == [1, 1]


def test_files_that_hold_no_tensors_are_refused_in_words(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    for spoil in (lambda: path.write_bytes(b"no pickle"), lambda: torch.save({"step": 3}, path),
                  lambda: torch.save([torch.ones(1)], path)):  # fmt: skip
        spoil()
        with pytest.raises(WeightsError, match=r"pytorch_model\.bin"):
            open_tensors(tmp_path)
    path.unlink()
    (tmp_path / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(WeightsError, match="cannot read"):
        open_tensors(tmp_path)


# --- pictures --------------------------------------------------------------------------------------------------------


def qwen_folder(folder: Path, **fields: Any) -> tuple[Path, QwenVLConfig]:
    tokenizer = {"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "chat_template.jinja").write_text("")
    picture = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, **fields}
    (folder / "preprocessor_config.json").write_text(json.dumps(picture))
    decoder = decoder_config(TEXT)
    return folder, QwenVLConfig(name="q", vision=QwenVisionConfig(), decoder=decoder, image_token=0, image_size=504)


@pytest.mark.parametrize(
    "fields",
    [{"do_normalize": False}, {"do_rescale": False}, {"do_resize": False}, {"rescale_factor": 1.0}, {"resample": 2},
     {"patch_size": 16}, {"merge_size": 4}, {"temporal_patch_size": 1}],
)  # fmt: skip
def test_a_qwens_pictures_processed_otherwise_are_refused_by_the_key(tmp_path: Path, fields: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedLayout, match=f"preprocessor_config.json has {next(iter(fields))} = "):
        PromptWriter(*qwen_folder(tmp_path, **fields))


def test_limits_of_pixels_are_read_in_newer_and_older_form_and_bear_on_the_square(tmp_path: Path) -> None:
    newer = PromptWriter(*qwen_folder(tmp_path, size={"shortest_edge": 3136, "longest_edge": 401408}))
    older = PromptWriter(*qwen_folder(tmp_path, min_pixels=3136, max_pixels=401408))
    assert (newer.least, newer.most) == (older.least, older.most) == (3136, 401408)
    assert newer.squares() is newer
    for fields in ({"max_pixels": 200704}, {"min_pixels": 300000}):
        with pytest.raises(UnsupportedLayout, match="a picture squashed to 504 x 504 would be"):
            PromptWriter(*qwen_folder(tmp_path, **fields)).squares()


@pytest.mark.parametrize(
    "fields",
    [{"do_normalize": False}, {"do_resize": False}, {"do_pad": True}, {"rescale_factor": 1.0},
     {"do_center_crop": False}],
)  # fmt: skip
def test_a_clips_pictures_processed_otherwise_are_refused_by_the_key(tmp_path: Path, fields: dict[str, Any]) -> None:
    path, plain = tmp_path / "preprocessor_config.json", Processing(size=28, mean=(0.5,) * 3, std=(0.5,) * 3)
    path.write_text(json.dumps({"size": {"shortest_edge": 28}, **fields}))
    with pytest.raises(UnsupportedLayout, match=next(iter(fields))):
        clip_processing(path, plain)


# --- recordings ------------------------------------------------------------------------------------------------------


def test_a_recording_without_logits_or_ids_has_not_passed(copied: Callable[[str], Path]) -> None:
    folder = copied("rsunivlm")
    index = json.loads((folder / "cases.json").read_text())
    index = {**index, "cases": []}
    del index["batch"], index["eos_case"]
    (folder / "cases.json").write_text(json.dumps(index))
    comparison = verify(folder).comparison
    assert all(value <= 1e-4 for value, _ in comparison.worst.values())
    assert comparison.absent == ["logits", "ids"]
    assert not comparison.passed


@pytest.mark.parametrize(
    ("spoil", "said"),
    [("no inputs", "'inputs' is missing"), ("no tensors", "is not whole"), ("placeholder", "cannot be run")],
)
def test_a_recording_that_is_not_whole_is_said_in_one_sentence(
    copied: Callable[[str], Path], spoil: str, said: str
) -> None:
    folder = copied("rsunivlm")
    index = json.loads((folder / "cases.json").read_text())
    if spoil == "no inputs":
        del index["inputs"]
    elif spoil == "no tensors":
        (folder / "cases.safetensors").write_bytes(b"")
    else:
        index["inputs"]["text"]["input_ids"].append(IMAGE)
    (folder / "cases.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match=said):
        verify(folder)
