"""FUSAR-GPT's layout: base and adapter load strictly, LoRA merged; anchor files are read as its code reads them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from model_server.checkpoints.adapters import find_family, fusar
from model_server.checkpoints.adapters.fusar_inputs import BadAnchors, load_anchors
from model_server.checkpoints.published import LayoutError, UnsupportedLayout
from model_server.checkpoints.store import WeightsError
from model_server.checkpoints.verify import verify
from model_server.model.llava import PlaceholderMismatch
from model_server.model.modulation import Anchors
from model_server.model.qwen_vl import QwenVLM


@pytest.fixture(scope="module")
def recorded(oracles: Path) -> Path:
    return oracles / "fusar" / "a"


@pytest.fixture(scope="module")
def model(recorded: Path) -> QwenVLM:
    return fusar.load(recorded)[0]


@pytest.fixture
def copy(recorded: Path, tmp_path: Path) -> Path:
    """Base and adapter in a folder that a test may spoil."""
    for part in ("base", "adapter"):
        shutil.copytree(recorded / part, tmp_path / part, copy_function=shutil.copyfile)
        (tmp_path / part).chmod(0o755)
    return tmp_path


def test_the_loaded_model_computes_what_the_authors_code_computed(recorded: Path) -> None:
    found = verify(recorded)
    assert found.family == "fusar"
    assert found.comparison.passed, found.comparison.worst
    assert not found.comparison.left_out


def test_a_batch_of_images_with_and_without_anchors_equals_each_alone(model: QwenVLM) -> None:
    torch.manual_seed(0)
    grids = [(8, 8), (4, 6), (8, 12)]
    patches = [torch.randn(h * w, 1176) for h, w in grids]
    images = [(torch.randn(3, 64), torch.rand(3, 2)), None, (torch.randn(1, 64), torch.rand(1, 2))]
    ids = [
        torch.tensor([1, 2, *[model.config.image_token] * (h * w // 4), *range(3, 3 + i)])
        for i, (h, w) in enumerate(grids)
    ]

    def answer(rows: list[int]) -> torch.Tensor:
        with torch.no_grad():
            own = [grids[row] for row in rows]
            tokens = model.encode(torch.cat([patches[r] for r in rows]), own, Anchors.of([images[r] for r in rows], 64))
            prompt = model.prompt([ids[r] for r in rows], [[pair] for pair in zip(tokens, own, strict=True)])
            return model.greedy(prompt, 5, None)[1]

    together = answer([0, 1, 2])
    for row in range(3):
        torch.testing.assert_close(together[row : row + 1], answer([row]), atol=2e-4, rtol=1e-4)


def test_decoding_over_the_cache_equals_the_whole_sequence(model: QwenVLM) -> None:
    torch.manual_seed(0)
    grid, image = (8, 8), model.config.image_token
    with torch.no_grad():
        tokens = model.encode(torch.randn(64, 1176), [grid])[0]
        ids = torch.tensor([1, *[image] * 16, 2, 3])
        new, logits = model.greedy(model.prompt([ids], [[(tokens, grid)]]), 4, None)
        longer = model.prompt([torch.cat((ids, new[0, :3]))], [[(tokens, grid)]])
        whole = model.decoder.logits(model(longer))[:, -4:]
    torch.testing.assert_close(logits, whole, atol=2e-4, rtol=1e-4)


def test_placeholders_must_be_as_many_as_visual_tokens(model: QwenVLM) -> None:
    with pytest.raises(PlaceholderMismatch, match="2 image placeholders for 16"):
        model.prompt([torch.tensor([model.config.image_token] * 2)], [[(torch.zeros(16, 32), (8, 8))]])


def test_the_adapter_is_recognised_with_its_base_or_alone(copy: Path) -> None:
    assert find_family(copy) is fusar
    assert find_family(copy / "adapter") is fusar
    assert fusar.base_folder(copy / "adapter") == copy / "base"
    (copy / "base").rename(copy / "elsewhere")
    with pytest.raises(WeightsError, match=r"needs its base model Qwen/Qwen2\.5-VL-7B-Instruct"):
        fusar.load(copy)
    assert fusar.load(copy, base=copy / "elsewhere")[1].fits


def test_new_names_and_a_flat_config_load_the_same_base(copy: Path, model: QwenVLM) -> None:
    path = copy / "base" / "model.safetensors"
    renamed = {
        name.replace("model.", "model.language_model.", 1) if name.startswith("model.")
        else name.replace("visual.", "model.visual.", 1): tensor
        for name, tensor in load_file(path).items()
    }  # fmt: skip
    path.unlink()
    save_file(renamed, path)
    config = json.loads((copy / "base" / "config.json").read_text())
    text = config.pop("text_config")
    text["rope_scaling"]["type"] = "mrope"
    (copy / "base" / "config.json").write_text(json.dumps({**text, **config}))
    again = fusar.load(copy)[0].state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())


def test_tensors_that_do_not_fit_are_named(copy: Path) -> None:
    path = copy / "adapter" / "adapter_model.safetensors"
    lora = load_file(path)
    first = "base_model.model.model.language_model.layers.0.mlp.down_proj.lora_A.weight"
    lora[first.replace("layers.0", "layers.7")] = lora.pop(first)
    save_file(lora, path)
    film = torch.load(copy / "adapter" / fusar.FILM, weights_only=True)
    del film["film_mlp"]["2.bias"]
    film["film_mlp"]["9.weight"] = torch.zeros(1)
    torch.save(film, copy / "adapter" / fusar.FILM)
    with pytest.raises(LayoutError) as refused:
        fusar.load(copy)
    report = refused.value.report
    assert report.missing == ["film_mlp.2.bias"]
    assert set(report.unexpected) == {
        "film_mlp.9.weight", first.replace("layers.0", "layers.7"), first.replace("lora_A", "lora_B")
    }  # fmt: skip


def test_a_lora_of_another_shape_is_refused_by_name(copy: Path) -> None:
    path = copy / "adapter" / "adapter_model.safetensors"
    lora = load_file(path)
    name = "base_model.model.model.language_model.layers.1.self_attn.q_proj.lora_B.weight"
    save_file({**lora, name: torch.zeros(31, 8)}, path)
    with pytest.raises(WeightsError, match=r"layers\.1\.self_attn\.q_proj\.weight is \[32, 32\]"):
        fusar.load(copy)


def test_an_old_checkpoint_without_its_sigma_asks_for_it(copy: Path) -> None:
    (copy / "adapter" / fusar.TLM).unlink()
    with pytest.raises(UnsupportedLayout, match="give the sigma"):
        fusar.load(copy)
    config = fusar.load(copy, overrides={"sigma": 1.5})[0].config
    assert config.modulation is not None
    assert (config.modulation.sigma, config.image_size) == (1.5, 504)


def _file(folder: Path, case: dict, table: np.ndarray) -> Path:
    """The anchor file that a recorded case describes."""
    name, given = case["name"], case["input"]
    path = folder / name
    vectors, places = np.ones((3, 64)), np.array([[0, 0], [0.5, 0.25], [1, 1]], float)
    if path.suffix == ".npz":
        vectors = np.array(given.get("features", vectors))
        places = np.array(given.get("positions", places))
        spoiled = {"f63.npz": (vectors[:, :63], places), "empty.npz": (vectors[:0], places[:0]),
                   "pos_len.npz": (vectors, places[:2]), "nan.npz": (vectors * np.nan, places)}  # fmt: skip
        vectors, places = spoiled.get(name, (vectors, places))
        np.savez(path, features=vectors, positions=places)
        return path
    array = np.array(given.get("array", table))
    if "x" in given:
        array[:, 4], array[:, 5] = given["x"], given["y"]
    if name == "num64.npy":
        array = array[:, 6:]
    if name == "num70_flat.npy":
        array = array.reshape(-1)
    if name.startswith("struct"):
        keep = ["row", "col"] if "rowcol" in name else ["lon", "lat", "row", "col", "x", "y"]
        columns = ["lon", "lat", "row", "col", "x", "y", *(f"A{axis:02d}" for axis in range(64))]
        fields = [f"A{axis:02d}" for axis in reversed(range(64))] + keep
        rows = np.zeros(len(array), [(field, np.float64) for field in fields])
        for field in fields:
            rows[field] = array[:, columns.index(field)]
        array = rows
    np.save(path, array)
    return path


def test_anchor_files_are_read_as_the_authors_code_reads_them(recorded: Path, tmp_path: Path) -> None:
    cases = json.loads((recorded / "data_cases.json").read_text())["load_aef"]
    table = next(np.array(case["input"]["array"]) for case in cases if case["name"] == "num70.npy")
    assert len(cases) == 14
    for case in cases:
        path = _file(tmp_path, case, table)
        if "error" in case["result"]:
            with pytest.raises(BadAnchors):
                load_anchors(path)
            continue
        vectors, positions = load_anchors(path)
        wanted = case["result"]["ok"]
        assert vectors.dtype == positions.dtype == torch.float32
        torch.testing.assert_close(vectors, torch.tensor(wanted["features"]), atol=0, rtol=0)
        torch.testing.assert_close(positions, torch.tensor(wanted["positions_yx"]), atol=1e-7, rtol=0)
