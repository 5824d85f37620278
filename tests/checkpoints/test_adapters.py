"""Adapters of published layouts: what they read from a config, and what they say of tensors that do not fit."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model_server.checkpoints.adapters import UnknownFamily, find_family, mfrsvlm, rsunivlm
from model_server.checkpoints.published import LayoutError, UnsupportedLayout
from model_server.checkpoints.store import WeightsError
from model_server.model.merging import TilesDoNotFit, best_grid, cut_padding, merge_tiles

ORACLES = Path(__file__).parent / "oracles"
TOWER = "model.vision_tower.vision_tower."


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[str], Path]:
    """A writable copy of a recorded checkpoint."""

    def copy(family: str) -> Path:
        return Path(shutil.copytree(ORACLES / family / "checkpoint", tmp_path / family))

    return copy


def change(folder: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def configure(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_a_family_is_found_by_what_is_in_the_folder(tmp_path: Path) -> None:
    assert find_family(ORACLES / "rsunivlm" / "checkpoint") is rsunivlm
    assert find_family(ORACLES / "mfrsvlm" / "checkpoint") is mfrsvlm
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UnknownFamily, match="rsunivlm, mfrsvlm"):
        find_family(tmp_path)


def test_missing_unexpected_and_misshaped_tensors_are_reported_by_their_published_names(
    copied: Callable[[str], Path],
) -> None:
    folder = copied("rsunivlm")

    def edit(tensors: dict[str, Tensor]) -> None:
        del tensors["model.layers.1.mlp.2.up_proj.weight"]
        tensors["model.layers.9.stray"] = torch.zeros(2)
        tensors["model.layers.0.self_attn.k_proj.weight"] = torch.zeros(16, 32)

    change(folder, edit)
    with pytest.raises(LayoutError) as caught:
        rsunivlm.load(folder)
    report = caught.value.report
    assert report.missing == ["model.layers.1.mlp.2.up_proj.weight"]
    assert report.unexpected == ["model.layers.9.stray"]
    assert report.misshaped == [("model.layers.0.self_attn.k_proj.weight", (16, 32), (8, 32))]
    assert "k_proj.weight is [16, 32], should be [8, 32]" in str(caught.value)


def test_what_the_authors_code_does_not_use_is_listed_and_no_fault() -> None:
    _, report = rsunivlm.load(ORACLES / "rsunivlm" / "checkpoint")
    assert {name.rsplit(".", 2)[1] for name in report.unused} == {"post_layernorm"}
    _, report = mfrsvlm.load(ORACLES / "mfrsvlm" / "checkpoint")
    assert sum(name.endswith("rotary_emb.inv_freq") for name in report.unused) == 4


def test_a_checkpoint_without_its_tower_takes_the_base_towers_tensors_less_the_last_layer(
    copied: Callable[[str], Path],
) -> None:
    folder = copied("rsunivlm")

    def edit(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if n.startswith(TOWER)]:
            del tensors[name]

    change(folder, edit)
    model, _ = rsunivlm.load(folder)
    base = load_file(folder / "siglip_tiny" / "model.safetensors")
    assert torch.equal(model.tower.places, base["vision_model.embeddings.position_embedding.weight"])
    assert len(model.tower.layers) == 2  # of three


def test_a_tower_config_nested_under_vision_config_reads_the_same(copied: Callable[[str], Path]) -> None:
    folder = copied("rsunivlm")
    path = folder / "siglip_tiny" / "config.json"
    flat = json.loads(path.read_text())
    path.write_text(json.dumps({"model_type": "siglip", "vision_config": flat}))
    assert rsunivlm.load(folder)[0].config == rsunivlm.load(ORACLES / "rsunivlm" / "checkpoint")[0].config


def test_a_missing_tower_is_said_with_its_name(copied: Callable[[str], Path]) -> None:
    folder = copied("mfrsvlm")
    configure(folder, mm_vision_tower="openai/clip-vit-large-patch14-336")
    with pytest.raises(WeightsError, match="openai/clip-vit-large-patch14-336"):
        mfrsvlm.load(folder)


@pytest.mark.parametrize(
    "fields",
    [{"mm_projector_type": "linear"}, {"hidden_act": "gelu"}, {"use_sliding_window": True},
     {"mm_patch_merge_type": "grid"}],
)  # fmt: skip
def test_what_is_not_computed_is_refused_by_the_field_that_asks_for_it(
    copied: Callable[[str], Path], fields: dict[str, Any]
) -> None:
    folder = copied("rsunivlm")
    configure(folder, **fields)
    with pytest.raises(UnsupportedLayout, match=next(iter(fields))):
        rsunivlm.load(folder)


def test_a_newline_parameter_is_read_where_the_merge_needs_it(copied: Callable[[str], Path]) -> None:
    folder = copied("rsunivlm")
    configure(folder, mm_patch_merge_type="spatial_unpad", image_aspect_ratio="anyres_max_9",
              image_grid_pinpoints="(1x1),...,(2x3)")  # fmt: skip
    with pytest.raises(LayoutError, match=r"missing: model\.image_newline"):
        rsunivlm.load(folder)
    change(folder, lambda tensors: tensors.update({"model.image_newline": torch.arange(32.0)}))
    model, _ = rsunivlm.load(folder)
    assert model.newline is not None
    assert torch.equal(model.newline, torch.arange(32.0))
    merge = model.config.merge
    assert (merge.spatial, merge.newline, merge.max_tiles) == (True, True, 9)
    assert merge.grids == tuple((384 * a, 384 * b) for a in (1, 2) for b in (1, 2, 3))


def test_injected_layers_count_from_one_unless_the_list_holds_a_zero() -> None:
    assert mfrsvlm.inject_layers([2, 4, 6, 8], 32) == (1, 3, 5, 7)
    assert mfrsvlm.inject_layers([9, 3, 0, 4], 8) == (0, 3, 4)
    assert mfrsvlm.inject_layers([8, 2, 9], 8) == (1, 7)


def test_taps_are_shares_of_the_depth_or_indices() -> None:
    assert mfrsvlm.taps([0.33, 0.66, 1.0], 24) == (8, 16, 24)
    assert mfrsvlm.taps([0.75, -1, 1.0], 4) == (3, 4)
    assert mfrsvlm.taps([1, 99, -9], 4) == (1, 4)


def test_scales_keep_their_order_and_hold_the_full_one() -> None:
    assert mfrsvlm.scales([0.5, 1.0, 2.0, 0.5]) == (0.5, 1.0)
    assert mfrsvlm.scales([0.5, 0]) == (1.0, 0.5)


def test_the_saved_rotary_rates_decide_the_base(copied: Callable[[str], Path]) -> None:
    folder = copied("mfrsvlm")
    configure(folder, rope_theta=123.0)  # which the class that saved it ignored
    assert mfrsvlm.load(folder)[0].config.decoder.rope_base == 10000.0


def recorded_tilings(function: str) -> list[dict[str, Any]]:
    cases = json.loads((ORACLES / "rsunivlm" / "tilings.json").read_text())
    return [case for case in cases if case["function"].startswith(function)]


def test_tile_grids_are_the_recorded_ones() -> None:
    for case in recorded_tilings("get_anyres"):
        asked = case["input"]
        raw = {"mm_patch_merge_type": "spatial_unpad", "image_aspect_ratio": "anyres",
               "image_grid_pinpoints": asked["grid_pinpoints"]}  # fmt: skip
        grid = best_grid(tuple(asked["image_size"]), rsunivlm.merge_config(raw).grids)
        assert [n // 384 for n in grid] == case["output"], asked


def test_padding_is_cut_as_recorded() -> None:
    for case in recorded_tilings("unpad"):
        h, w = case["input"]["current_hw"]
        cut = cut_padding(torch.arange(h * w).view(1, h, w), tuple(case["input"]["original_size"]))
        expected = case["output"]
        assert list(cut.shape) == expected["shape"]
        if cut.numel():
            assert [int(cut.flatten()[0]), int(cut.flatten()[-1])] == [expected["first"], expected["last"]]


@pytest.mark.parametrize(
    ("kind", "aspect", "size", "length"),
    [
        ("flat", "anyres", (700, 300), 3 * 729),
        ("spatial", "anyres", (700, 300), 3 * 729),
        ("spatial_unpad", "anyres", (768, 384), 729 + 27 * 55),
        ("spatial_unpad", "anyres_max_1", (768, 384), 729 + 19 * 39),  # resized by sqrt(2)
        ("spatial_unpad_nobase", "anyres", (768, 384), 27 * 55),
        ("spatial_maxpool2x2", "anyres", (768, 384), 729 + 13 * 27),
    ],
)
def test_tiles_merge_into_an_overview_and_rows_that_end_with_a_newline(
    kind: str, aspect: str, size: tuple[int, int], length: int
) -> None:
    raw = {"mm_patch_merge_type": kind, "image_aspect_ratio": aspect, "image_grid_pinpoints": "(1x1),...,(3x3)"}
    config = rsunivlm.merge_config(raw)
    side, tiles = 27, torch.randn(3, 729, 2)
    newline = torch.full((2,), 9.0) if config.newline else None
    merged = merge_tiles(tiles, size, config, newline)
    assert merged.shape == (length, 2)
    if kind == "spatial_unpad" and aspect == "anyres":
        rows = merged[729:].view(27, 55, 2)
        assert torch.equal(rows[:, -1], torch.full((27, 2), 9.0))
        assert torch.equal(rows[4, 30], tiles[2].view(side, side, 2)[4, 3])  # the right tile
    if newline is not None:
        one = merge_tiles(tiles[:1], None, config, newline)
        assert torch.equal(one, torch.cat((tiles[0], newline[None])))


def test_a_wrong_number_of_tiles_is_refused_by_the_grid_it_should_be() -> None:
    raw = {"mm_patch_merge_type": "spatial_unpad", "image_aspect_ratio": "anyres",
           "image_grid_pinpoints": "(1x1),...,(3x3)"}  # fmt: skip
    with pytest.raises(TilesDoNotFit, match=re.escape("2 x 1 tiles and an overview, not 3")):
        merge_tiles(torch.zeros(4, 729, 2), (768, 384), rsunivlm.merge_config(raw), torch.zeros(2))
