"""Steps of fixed shapes against steps cut to what is filled; on a GPU, replayed graphs against both."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model_server.model.config import EXPERTS, debug
from model_server.model.generate import Hypothesis, candidates
from model_server.model.rsvlm import RSVLM
from model_server.model.slots import Lane, Prefix, prefill
from model_server.model.static_steps import StaticSteps

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
VIEWS, STEPS, BEAMS, PLACES, COMING = 2, 9, 3, 5, 8
END = 43  # a token that these weights write now and then


def model_on(device: str) -> RSVLM:
    """Of three experts, whose answers end here and there."""
    torch.manual_seed(3)
    config = debug()
    model = RSVLM(replace(config, decoder=replace(config.decoder, experts=EXPERTS, tied=False))).eval()
    model.backbone.fold_norms()
    for name, weight in model.decoder.named_parameters():
        if name.endswith("out.weight"):
            torch.nn.init.normal_(weight)  # so that answers differ
    return model.to(device)


def lane_of(model: RSVLM, static: bool | None) -> Lane:
    banned = torch.zeros(model.config.decoder.vocab_size, dtype=torch.bool, device=model.queries.device)
    return Lane(model, sequences=PLACES, views=VIEWS, prompt=model.visual_tokens + 1, beams=BEAMS, steps=STEPS, end=END,
                banned=banned, length_power=0.3, static=static)  # fmt: skip


def prefix_of(model: RSVLM, image: int, expert: int) -> Prefix:
    """An image's visual part, random and large, so that answers differ."""
    c, random = model.config.decoder, torch.Generator().manual_seed(image)
    keys = torch.randn(c.layers, 2, VIEWS, c.kv_heads, model.visual_tokens, c.width // c.heads, generator=random)
    return Prefix(5 * keys.to(model.queries.device), expert)


@torch.inference_mode()
def written(lane: Lane, experts: list[int]) -> dict[Hashable, list[Hypothesis]]:
    """One sequence joins at each step while there is a place; one of them is dropped on its way."""
    model, said = lane.model, {}
    coming = list(range(COMING))
    while coming or len(lane):
        if coming and lane.free:
            i = coming.pop(0)
            said.update(lane.join([i], prefill(model, prefix_of(model, i, experts[i % len(experts)]), 5, None)))
        said.update(lane.step())
        if len(coming) == 4:
            lane.drop(1)
    return said


def assert_same(found: dict[Hashable, list[Hypothesis]], expected: dict[Hashable, list[Hypothesis]]) -> None:
    assert found.keys() == expected.keys()
    for key, hypotheses in expected.items():
        assert [h.ids for h in found[key]] == [h.ids for h in hypotheses]
        assert [h.logprob for h in found[key]] == pytest.approx([h.logprob for h in hypotheses], abs=1e-3)


@pytest.mark.parametrize("experts", [[0], [2], [0, 1, 2]], ids=str)
def test_static_steps_write_what_cut_steps_write_whoever_joins_and_leaves(experts: list[int]) -> None:
    model = model_on("cpu")
    expected = written(lane_of(model, False), experts)
    assert 1 not in expected
    assert len(expected) == COMING - 1
    assert len({len(h.ids) for hypotheses in expected.values() for h in hypotheses}) > 2
    assert_same(written(lane_of(model, True), experts), expected)
    replayed = lane_of(model, True)
    assert replayed._static is not None
    replayed._static._capture = again
    assert_same(written(replayed, experts), expected)
    assert {bucket for bucket, _ in replayed._static._steps} == ({1, 2, 4, 5} if len(experts) == 1 else {1})


def again(work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Stands in for a graph: reads and writes the same tensors each time, and does nothing when it is made."""
    found = torch.empty(0, dtype=torch.double)

    def replay() -> None:
        new = work()
        found.resize_as_(new).copy_(new)

    return replay, found


def test_where_a_step_cannot_be_captured_steps_go_on_without(caplog: pytest.LogCaptureFixture) -> None:
    def fails(_: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    model = model_on("cpu")
    lane = lane_of(model, True)
    assert lane._static is not None
    lane._static._capture = fails
    assert_same(written(lane, [0]), written(lane_of(model, False), [0]))
    assert len(caplog.records) == 1
    assert "cannot be captured" in caplog.text


def test_steps_have_few_shapes_and_padding_is_no_answer() -> None:
    shapes: list[tuple[int, ...]] = []

    def write(told: Tensor, expert: int) -> Tensor:
        shapes.append(tuple(told.shape))
        return told * 2 + expert

    steps = StaticSteps(write, 5, torch.device("cpu"), None)
    for n in (1, 2, 3, 4, 5):
        told = torch.rand(n, 5, 3)
        torch.testing.assert_close(steps(told, 1), told * 2 + 1)
    assert [shape[0] for shape in shapes] == [1, 2, 4, 4, 5]


@torch.inference_mode()
def test_nothing_in_a_static_step_asks_for_a_value_of_the_device() -> None:
    """Tensors of the meta device have shapes and no values: whatever asks for one raises."""
    lane = lane_of(model_on("meta"), True)
    found = lane._write_static(torch.empty(4, 5, BEAMS, dtype=torch.double, device="meta"), 1)
    assert found.shape == (4, 2 * BEAMS, 3)
    with pytest.raises(NotImplementedError):  # torch's own, for meta tensors: this one does ask
        candidates(found)


@needs_cuda
@pytest.mark.parametrize("experts", [[0], [2], [0, 1, 2]], ids=str)
def test_replayed_graphs_write_what_eager_steps_write(experts: list[int]) -> None:
    model = model_on("cuda")
    replayed = lane_of(model, None)
    assert_same(written(replayed, experts), written(lane_of(model, False), experts))
    assert replayed._static is not None
    assert replayed._static._capture is not None, "capturing failed"


@needs_cuda
@torch.inference_mode()
def test_a_replayed_step_waits_for_the_gpu_once() -> None:
    model = model_on("cuda")
    lane = lane_of(model, None)
    lane.join(["a"], prefill(model, prefix_of(model, 0, 0), 5, None))
    lane.step()  # captures
    told = lane._told()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = lane._found(told)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(candidates(found)) == 1
