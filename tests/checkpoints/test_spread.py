"""Large checkpoints in shards, over devices and the disk: the same answers, and clear words where there is no room."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model_server.checkpoints.adapters import mfrsvlm, rsunivlm
from model_server.checkpoints.published import LayoutError
from model_server.checkpoints.spread import DISK, DoesNotFit, Spread
from model_server.checkpoints.store import WeightsError
from model_server.model.llava import IMAGE, LlavaVLM

pytest.importorskip("accelerate")

ORACLES = Path(__file__).parent / "oracles"
ADAPTERS = {"rsunivlm": rsunivlm, "mfrsvlm": mfrsvlm}


def sharded(family: str, folder: Path) -> Path:
    """A recorded checkpoint with its tensors in three files and an index."""
    folder = Path(shutil.copytree(ORACLES / family / "checkpoint", folder))
    whole = folder / "model.safetensors"
    tensors, index = load_file(whole), {}
    whole.unlink()
    for n in range(3):
        name = f"model-{n + 1:05}-of-00003.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[n::3]}
        save_file(part, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def answer(model: LlavaVLM) -> tuple[Tensor, Tensor]:
    """Ids and logits of a short answer about an image of the tower's size."""
    side = model.config.vision.image_size
    image = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    prompt = model.prompt([torch.tensor([1, IMAGE, 4, 5])], [model.encode([image])])
    return model.greedy(prompt, torch.tensor([0]), 4, None)


def kept_together(model: LlavaVLM) -> int:
    """Bytes of all but the repeated blocks."""
    blocks = [*model.decoder.blocks, *model.tower.layers]
    return sum(p.numel() * 4 for p in model.parameters()) - sum(p.numel() * 4 for b in blocks for p in b.parameters())


@pytest.mark.parametrize("family", ADAPTERS)
def test_shards_spread_over_memory_and_disk_answer_as_the_whole_file_does(family: str, tmp_path: Path) -> None:
    adapter = ADAPTERS[family]
    plain, _ = adapter.load(ORACLES / family / "checkpoint")
    block = sum(p.numel() * 4 for p in plain.decoder.blocks[0].parameters())
    spread = Spread({"cpu": kept_together(plain) + block}, tmp_path / "offload")
    model, report = adapter.load(sharded(family, tmp_path / "checkpoint"), spread=spread)
    assert report.fits
    devices = {p.device.type for p in model.decoder.blocks[1].parameters()}
    assert devices == {"meta"}  # on the disk until it runs
    assert {p.device.type for p in model.decoder.blocks[0].parameters()} == {"cpu"}
    for ours, theirs in zip(answer(model), answer(plain), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_a_model_that_fits_one_device_is_loaded_there_without_hooks(tmp_path: Path) -> None:
    model, _ = rsunivlm.load(sharded("rsunivlm", tmp_path / "checkpoint"), spread=Spread({"cpu": "1GiB"}))
    assert not any(hasattr(m, "_hf_hook") for m in model.modules())
    plain, _ = rsunivlm.load(ORACLES / "rsunivlm" / "checkpoint")
    assert torch.equal(answer(model)[1], answer(plain)[1])


def test_blocks_fill_devices_in_order_and_the_rest_stays_on_the_first() -> None:
    plain, _ = rsunivlm.load(ORACLES / "rsunivlm" / "checkpoint")
    block = sum(p.numel() * 4 for p in plain.decoder.blocks[0].parameters())
    spread = Spread({"cpu": kept_together(plain) + block}, Path("unused"))
    places = spread.devices(plain)
    assert places[""] == places["decoder.blocks.0"] == "cpu"
    assert places["decoder.blocks.1"] == DISK


def test_no_room_is_said_with_the_bytes_that_are_missing(tmp_path: Path) -> None:
    folder = ORACLES / "rsunivlm" / "checkpoint"
    with pytest.raises(DoesNotFit, match="bytes more than device 'cpu' has"):
        rsunivlm.load(folder, spread=Spread({"cpu": 10}, tmp_path))
    plain, _ = rsunivlm.load(folder)
    with pytest.raises(DoesNotFit, match=r"no room for|no device has room for decoder\.blocks\.0"):
        rsunivlm.load(folder, spread=Spread({"cpu": kept_together(plain) + 10}))


def test_a_shard_that_is_not_there_is_named(tmp_path: Path) -> None:
    folder = sharded("rsunivlm", tmp_path / "checkpoint")
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(WeightsError, match="names model-00002-of-00003"):
        rsunivlm.load(folder)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(LayoutError, match="missing"):
        rsunivlm.load(folder)
