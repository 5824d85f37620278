"""Our own chat completions as the upstream of our own tools: what the text form keeps of the native answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from processes import ServerProcess, picture, server_process

from model_server.protocol import PerceiveRequest
from rs_tools.client import ModelClient
from rs_tools.upstream.client import UpstreamClient
from rs_tools.upstream.profiles import PROFILES
from rs_tools.upstream.reading import UNCALIBRATED

TOKEN = "hush-4711"
TILES = [picture(1), picture(2, side=90)]


@pytest.fixture(scope="module")
def server(dense_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("server")
    (folder / "token").write_text(TOKEN)
    arguments = ("--weights", str(dense_weights), "--token-file", str(folder / "token"))
    with server_process(folder / "log", *arguments) as server:
        server.wait_until_ready()
        yield server


@pytest.mark.parametrize("profile", ["rsunivlm", "generic"])
async def test_words_and_boxes_are_those_of_the_native_wire(server: ServerProcess, profile: str) -> None:
    caption = PerceiveRequest(task="caption")
    vqa = PerceiveRequest(task="vqa", text="Is there a road in the image?")
    classify = PerceiveRequest(task="classify", labels=["forest", "harbor", "runway"])
    ground = PerceiveRequest(task="ground", text="ship")
    async with (
        UpstreamClient(server.url, "debug", PROFILES[profile], TOKEN) as upstream,
        ModelClient(server.url, token=TOKEN) as native,
    ):
        for request in (caption, vqa, classify, ground):
            ours, text = await native.perceive(request, TILES), await upstream.perceive(request, TILES)
            assert UNCALIBRATED not in text.warnings
            assert [one.caption for one in text.captions] == [one.caption for one in ours.captions]
            assert [one.answer for one in text.vqa] == [one.answer for one in ours.vqa]
            assert [one.confidence for one in text.vqa] == pytest.approx([o.confidence for o in ours.vqa], abs=1e-3)
            assert [np.argmax(one.scores) for one in text.classes] == [np.argmax(one.scores) for one in ours.classes]
            for mine, reference in zip(text.objects, ours.objects, strict=True):
                good = [i for i, score in enumerate(reference.scores) if score >= reference.threshold]
                expected = [side for i in good for side in reference.boxes[i]]
                assert [side for box in mine.boxes for side in box] == pytest.approx(expected, abs=0.06)
                assert mine.scores == pytest.approx([reference.scores[i] for i in good], abs=1e-3)


async def test_masks_and_change_come_on_a_coarse_grid(server: ServerProcess) -> None:
    segment = PerceiveRequest(task="segment", labels=["road", "sea"])
    async with UpstreamClient(server.url, "debug", PROFILES["rsunivlm"], TOKEN) as upstream:
        masks = await upstream.perceive(segment, TILES)
        change = await upstream.perceive(PerceiveRequest(task="detect_change"), [TILES[0], picture(3)])
    assert [one.probabilities.shape for one in masks.masks] == [(2, 64, 64), (2, 90, 90)]
    assert change.changes[0].probabilities.shape == (64, 64)
    assert any("grid of 32 x 32 cells" in warning for warning in masks.warnings)


def test_the_command_asks_another_model_and_keeps_the_key_to_itself(server: ServerProcess, tmp_path: Path) -> None:
    image = tmp_path / "field.png"
    Image.fromarray(picture(1)).save(image)
    command = [sys.executable, "-m", "rs_tools.cli", "vqa", str(image), "Is there a road?", "--json"]
    command += ["--model-url", f"{server.url}/v1", "--model", "debug", "--profile", "rsunivlm"]

    def run(key: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "RS_MODEL_API_KEY": key}
        return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)

    answered = run(TOKEN)
    assert json.loads(answered.stdout)["provenance"]["model"] == "debug"
    refused = run("sk-wrong")
    assert refused.returncode != 0
    assert "RS_MODEL_API_KEY" in refused.stderr
    for secret in (TOKEN, "sk-wrong"):
        assert secret not in answered.stdout + answered.stderr + refused.stdout + refused.stderr
    assert TOKEN not in server.log.read_text()
