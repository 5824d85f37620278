"""Published checkpoints, tiny ones, behind a real server process: each task gets a typed answer or a typed error."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from processes import picture, server_process

from model_server.protocol import PerceiveRequest, PerceiveResponse, decode_response, encode_request
from rs_tools.client import ModelClient
from rs_tools.errors import NotServed, PerceptionError, ServerError
from rs_tools.imagery.access import AccessPolicy
from rs_tools.results import Result
from rs_tools.tools import Tools

PAIR = (picture(1, 40), picture(2, 40))
ASKED: dict[str, tuple[PerceiveRequest, tuple[np.ndarray, ...]]] = {
    "caption": (PerceiveRequest(task="caption"), PAIR[:1]),
    "vqa": (PerceiveRequest(task="vqa", text="How many ships?"), PAIR[:1]),
    "classify": (PerceiveRequest(task="classify", labels=["forest", "harbor"]), PAIR[:1]),
    "ground": (PerceiveRequest(task="ground", text="ship"), PAIR[:1]),
    "segment": (PerceiveRequest(task="segment", labels=["water"]), PAIR[:1]),
    "detect_change": (PerceiveRequest(task="detect_change", text="building"), PAIR),
}


def perceive(url: str, request: PerceiveRequest, tiles: tuple[np.ndarray, ...]) -> PerceiveResponse | tuple[int, str]:
    """The answer, or the status and code of an error."""
    response = httpx.post(
        f"{url}/v1/perceive",
        content=encode_request(request, list(tiles)),
        headers={"Content-Type": "application/octet-stream"},
        timeout=300,
    )
    if response.status_code == 200:
        return decode_response(response.content)
    error = response.json()["error"]
    assert error["message"]
    return response.status_code, error["code"]


def plain_llava(folder: Path) -> Path:
    """A tiny LLaVA of random weights as `transformers` saves it, with a tokenizer of characters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    transformers = pytest.importorskip("transformers")
    specials = ["<pad>", "<s>", "</s>", "<image>", "~"]
    signs = [*specials, *sorted(set("\n USERASSISTANT abcdefghijklmnopqrstuvwxyz0123456789[],.*?':{}\""))]
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=len(signs), max_position_embeddings=256,
        ),
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2, image_size=28,
            patch_size=7,
        ),
        image_token_index=specials.index("<image>"),
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({sign: n for n, sign in enumerate(signs)}, unk_token="~"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(specials[:4])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def folder_of(family: str, spoken: Callable[..., Path], oracles: Path, tmp_path: Path) -> Path:
    if family == "fusar":
        return oracles / "fusar" / "a"
    if family == "qwen_vl":  # what FUSAR-GPT was made from, without its adapter
        return oracles / "fusar" / "a" / "base"
    if family == "llava":
        return plain_llava(tmp_path / "llava")
    # The tiny network is small, its 59 passes of 336 pixels are not; and random weights do not come to an end.
    quick = {"mfrsvlm": {"deepstack_window_scales": [1.0]}, "rsunivlm": {"max_position_embeddings": 256}}
    return spoken(family, **quick[family])


@pytest.mark.parametrize(
    ("family", "served"),
    [
        ("rsunivlm", ["caption", "vqa", "classify", "ground", "segment", "detect_change"]),
        ("mfrsvlm", ["caption", "vqa", "classify", "ground"]),
        ("fusar", ["caption", "vqa", "classify", "ground"]),
        ("llava", ["caption", "vqa", "classify", "ground"]),
        ("qwen_vl", ["caption", "vqa", "classify", "ground"]),
    ],
)
def test_every_task_of_a_published_checkpoint_gets_a_typed_answer_or_a_typed_error(
    family: str, served: list[str], spoken: Callable[..., Path], oracles: Path, tmp_path: Path
) -> None:
    folder = folder_of(family, spoken, oracles, tmp_path)
    with server_process(tmp_path / "log", "--weights", str(folder)) as server:
        server.wait_until_ready()
        (model,) = httpx.get(f"{server.url}/v1/models", timeout=300).json()["data"]
        assert model["tasks"] == served
        assert model["model"] == f"{family}:{folder.name}"
        assert len(model["weights_digest"]) == 16
        for task, (request, tiles) in ASKED.items():
            found = perceive(server.url, request, tiles)
            if isinstance(found, tuple):
                # Random weights write no masks and no boxes: that is said, and the next request is answered.
                dense = task in ("ground", "segment", "detect_change")
                assert found == ((500, "failed") if task in served and dense else (501, "not_served")), task
                continue
            assert task in served
            answers = [*found.captions, *found.vqa, *found.classes, *found.objects, *found.masks, *found.changes]
            assert len(answers) == 1, task
            assert any("not calibrated" in warning for warning in found.warnings)
        for tool, outcome in asyncio.run(tools_on(server.url, tmp_path)).items():
            if tool in ("segment", "detect_change") and tool not in served:
                assert isinstance(outcome, NotServed), tool
            else:
                assert isinstance(outcome, Result | ServerError), (tool, outcome)


async def tools_on(url: str, folder: Path) -> dict[str, Result | PerceptionError]:
    """The result or the typed error of each tool that asks the model, on small pictures in a folder."""
    for n, tile in enumerate(PAIR):
        Image.fromarray(tile).save(folder / f"{n}.png")
    client = ModelClient(url)
    tools = Tools(AccessPolicy([folder]), client, artifacts=folder / "artifacts")
    first, second = str(folder / "0.png"), str(folder / "1.png")
    calls = {
        "caption": tools.caption(first),
        "vqa": tools.vqa(first, "Is there a ship?"),
        "classify": tools.classify(first, labels=["forest", "harbor"]),
        "ground": tools.ground(first, "ship"),
        "segment": tools.segment(first, ["water"]),
        "detect_change": tools.detect_change(first, second),
    }
    found: dict[str, Result | PerceptionError] = {}
    for tool, call in calls.items():
        try:
            found[tool] = await call
        except PerceptionError as error:
            found[tool] = error
    await client.aclose()
    return found


def test_a_checkpoint_without_a_tokenizer_ends_the_server_and_says_which_file_is_missing(tmp_path: Path) -> None:
    folder = Path(__file__).parents[1] / "checkpoints" / "oracles" / "rsunivlm"
    with server_process(tmp_path / "log", "--weights", str(folder)) as server:
        assert server.process.wait(300) == 1
    assert "put the checkpoint's tokenizer.json" in (tmp_path / "log").read_text()
