"""The configs by name: what they amount to, against the papers' and the published configs' figures."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner

from model_server.checkpoints.store import DENSE_TENSORS, TENSORS
from model_server.model.__main__ import app
from model_server.model.describe import BYTES, Description, describe
from model_server.model.presets import NAMED, build
from model_server.perceiver import DEFAULT_WEIGHTS

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def found() -> dict[str, Description]:
    return {name: describe(config(), context=1000) for name, config in NAMED.items()}


def part(description: Description, name: str) -> int:
    return next(p.total for p in description.parts if p.name == name)


def test_a_request_of_rsunivlm_touches_the_papers_runtime_parameters(found: dict[str, Description]) -> None:
    """Table 8 of arXiv 2412.05679: 893 M at run time; one expert's share of what stage 2 trains is 313 M."""
    one = found["rsunivlm-1b"]
    assert [one.active(column) for column in one.columns] == [pytest.approx(893e6, rel=0.01)] * 3
    assert part(one, "feed-forward, pixel expert") == pytest.approx(313e6, rel=0.01)
    assert one.columns[1] == "region: [VG] [REF]"
    assert one.total - one.active(one.columns[0]) == 2 * part(one, "feed-forward, pixel expert")


def test_the_large_configs_are_as_large_as_their_published_parts(found: dict[str, Description]) -> None:
    def decoder(name: str) -> int:
        names = ("embeddings", "attention and norms", "feed-forward")
        return sum(part(found[name], n) for n in names)

    assert decoder("fuse-7b") == 6_738_415_616  # Llama-2-7B and Vicuna-7B
    assert decoder("aquila-8b") == 8_030_261_248  # Llama-3-8B
    assert decoder("fusar-7b") == 7_615_616_512  # Qwen2.5-7B
    assert found["fuse-7b"].columns == ("every task",)
    assert part(found["fuse-7b"], "vision tower") == pytest.approx(303.5e6, rel=0.01)  # CLIP ViT-L/14@336
    assert part(found["aquila-8b"], "convolutional backbone") == pytest.approx(846e6, rel=0.01)  # ConvNeXt-XXL
    assert found["fusar-7b"].total - part(found["fusar-7b"], "TLM") == 8_292_166_656  # Qwen2.5-VL-7B
    assert found["fuse-7b"].total == pytest.approx(7.4e9, rel=0.02)
    assert found["aquila-8b"].total == pytest.approx(9.0e9, rel=0.03)


def test_an_image_becomes_as_many_tokens_as_published(found: dict[str, Description]) -> None:
    tokens = {name: d.visual_tokens for name, d in found.items()}
    assert tokens == {"nano": 68, "debug": 8, "rsunivlm-1b": 729, "fuse-7b": 576, "aquila-8b": 1024, "fusar-7b": 324}


def test_operations_of_a_token_are_twice_the_weights_it_meets_and_its_attention(found: dict[str, Description]) -> None:
    one, config = found["fusar-7b"], NAMED["fusar-7b"]().decoder
    head = config.vocab_size * config.width
    matrices = part(one, "feed-forward") + config.layers * (2 * config.width**2 + 2 * config.width * 512)
    attention = config.layers * 2 * config.width * (one.context + 1)  # q k^T and the weighted sum
    assert one.token_flops == 2 * (matrices + head + attention)
    assert one.cache_bytes("bfloat16") == 2 * 28 * 2 * 4 * 128 * 1000
    assert one.weight_bytes("float32") == 2 * one.weight_bytes("bfloat16") == 4 * one.total


def test_the_detail_view_is_58_more_passes_of_the_tower(found: dict[str, Description]) -> None:
    tower = 2 * part(found["fuse-7b"], "vision tower") * 577
    assert 55 * tower < found["fuse-7b"].image_flops < 70 * tower


def test_nano_counts_what_is_in_its_files() -> None:
    """Training set its vocabulary and labels, so the shipped config is counted, not the preset."""
    from model_server.model.config import ModelConfig

    config = ModelConfig.from_json((DEFAULT_WEIGHTS / "config.json").read_text())
    counted = describe(config)
    stored = 0
    for name in (TENSORS, DENSE_TENSORS):
        if (DEFAULT_WEIGHTS / name).is_file():
            with safe_open(DEFAULT_WEIGHTS / name, "pt") as file:
                stored += sum(file.get_tensor(key).numel() for key in file.keys())  # noqa: SIM118 (not a dict)
    dense = 0 if (DEFAULT_WEIGHTS / DENSE_TENSORS).is_file() or config.dense is None else part(counted, "dense branch")
    assert counted.total - dense == stored


def test_large_networks_are_built_without_memory() -> None:
    with torch.device("meta"):
        model = build(NAMED["rsunivlm-1b"]())
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_the_command_prints_parts_tasks_and_memory() -> None:
    result = CliRunner().invoke(app, ["describe", "debug", "--precision", "float32", "--context", "10"])
    assert result.exit_code == 0, result.output
    for said in ("image heads", "[CAP] [CLS]", "FLOPs to encode an image", "weights in float32", "of 10 tokens"):
        assert said in result.output
    assert CliRunner().invoke(app, ["describe", "huge"]).exit_code == 2


def test_the_command_says_which_attention_backends_are_not_here_and_why() -> None:
    result = CliRunner().invoke(app, ["attention"])
    assert result.exit_code == 0, result.output
    assert "sdpa" in result.output
    if not torch.cuda.is_available():
        assert result.output.replace("\n", " ").count("needs a CUDA device") == 3


def test_precisions_are_those_of_the_command() -> None:
    from model_server.model.__main__ import Precision

    assert set(BYTES) == set(Precision)
