"""The detail view and its injection in their sound form, beside the published one that weights were trained with."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from model_server.model.config import DecoderConfig, DetailConfig, LlavaConfig, MergeConfig, ViTConfig
from model_server.model.injection import Details, Injection
from model_server.model.llava import IMAGE, ImageTokens, LlavaVLM
from model_server.model.windows import WindowsDoNotFit, canvas_of, cut_windows, detail_stacks, plan, stitch

VISION = ViTConfig(
    style="clip", width=16, layers=3, heads=2, ffn=24, image_size=32, patch=8, act="quick_gelu", norm_eps=1e-5
)
DETAIL = DetailConfig(canvas=64, window=32, scales=(1.0, 0.5), taps=(1, 3))
DECODER = DecoderConfig(vocab_size=31, width=24, layers=3, heads=4, kv_heads=4, ffn=32, tied=False)


def build() -> LlavaVLM:
    torch.manual_seed(0)
    config = LlavaConfig(
        name="tiny", vision=VISION, decoder=DECODER, merge=MergeConfig(visual_first=True), feature=3, details=DETAIL,
        inject_layers=(0, 2),
    )  # fmt: skip
    model = LlavaVLM(config).eval().requires_grad_(False)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def test_windows_are_crops_of_the_canvas_unless_cut_plane_by_plane() -> None:
    canvas = torch.arange(3 * 64 * 64, dtype=torch.float32).view(1, 3, 64, 64)
    scale = plan(DETAIL, VISION)[0]
    windows = cut_windows(canvas, scale, DETAIL)
    assert windows.shape == (9, 3, 32, 32)
    assert torch.equal(windows[5], canvas[0, :, 16:48, 32:64])  # row 1, column 2
    published = cut_windows(canvas, scale, dataclasses.replace(DETAIL, plane_windows=True))
    assert torch.equal(published[0], torch.stack([canvas[0, 0, :32, 16 * i : 16 * i + 32] for i in range(3)]))


def test_stitching_windows_of_one_picture_gives_that_picture_everywhere() -> None:
    scale = plan(DETAIL, VISION)[0]
    grid = torch.randn(1, 8, 8, 5)
    tiles = [grid[0, 2 * r : 2 * r + 4, 2 * c : 2 * c + 4].flatten(0, 1) for r in range(3) for c in range(3)]
    torch.testing.assert_close(stitch(torch.stack(tiles), scale, 1, zero_edges=False), grid)
    published = stitch(torch.stack(tiles), scale, 1, zero_edges=True)
    assert published[:, 0].abs().max() == 0  # its window is zero there
    torch.testing.assert_close(published[:, 1:-1, 1:-1], grid[:, 1:-1, 1:-1])


def test_stacks_come_by_scale_then_tap_then_phase_and_do_not_depend_on_the_batch() -> None:
    tower = build().tower
    canvas = canvas_of(torch.randn(2, 3, 40, 40), 64)
    stacks = detail_stacks(tower, canvas, DETAIL)
    assert stacks.shape == (2, 2 * 2 * 4, 16, 16)
    torch.testing.assert_close(detail_stacks(tower, canvas[1:], DETAIL), stacks[1:], atol=1e-4, rtol=0)
    one = dataclasses.replace(DETAIL, scales=(0.5,), taps=(3,))
    torch.testing.assert_close(detail_stacks(tower, canvas, one), stacks[:, 12:], atol=1e-4, rtol=0)


def test_scales_whose_grids_differ_are_refused_by_their_sizes() -> None:
    with pytest.raises(WindowsDoNotFit, match=r"\[41, 42\]|all must be 42"):
        plan(DetailConfig(), dataclasses.replace(VISION, image_size=336, patch=16))


def test_injection_is_the_equation_and_touches_visual_tokens_of_its_rows_only() -> None:
    torch.manual_seed(0)
    module = Injection(8)
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.5)
    x, stacks = torch.randn(3, 6, 8), torch.randn(1, 5, 4, 8)
    out = module(x, Details(torch.tensor([1]), stacks, torch.ones(1, 4, dtype=torch.bool), 3))
    h, d = x[1, :4], stacks[0]
    query = module.router.query(module.router.query_norm(h.mean(0)))
    keys = module.router.key(module.router.key_norm(d.mean(1)))
    mixed = module.detail_norm(((keys @ query / 8**0.5).softmax(0)[:, None, None] * d).sum(0))
    gate = module.gate(torch.cat((module.hidden_norm(h), mixed), -1)).sigmoid()
    expected = x.clone()
    expected[1, :4] += module.scale * gate * module.project(mixed)
    torch.testing.assert_close(out, expected)


def test_a_batch_of_one_image_two_images_and_none_equals_each_alone() -> None:
    model = build()
    one, two = model.encode([torch.randn(1, 3, 32, 32), torch.randn(2, 3, 32, 32)])
    asked = [([1, IMAGE, 4], [one]), ([1, 9, 9, 4], []), ([IMAGE, 5], [two])]
    ids, images = [torch.tensor(i) for i, _ in asked], [own for _, own in asked]
    expert = torch.zeros(3, dtype=torch.long)
    together, _ = model.prefill(model.prompt(ids, images), expert, 0)
    for row in range(3):
        alone, _ = model.prefill(model.prompt(ids[row : row + 1], images[row : row + 1]), expert[:1], 0)
        torch.testing.assert_close(together[row], alone[0], atol=1e-4, rtol=0)


def test_gradients_reach_every_part_of_an_injecting_model() -> None:
    model = build().requires_grad_(True)
    prompt = model.prompt([torch.tensor([IMAGE, 5, 6])], [model.encode([torch.randn(1, 3, 32, 32)])])
    model.decoder.logits(model(prompt, torch.tensor([0]))).square().sum().backward()
    silent = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()}
    assert silent == set()


def every_step() -> LlavaVLM:
    torch.manual_seed(0)
    model = LlavaVLM(dataclasses.replace(build().config, inject_steps=True)).eval().requires_grad_(False)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def asked(model: LlavaVLM) -> tuple[list[torch.Tensor], list[list[ImageTokens]]]:
    """A row with one image, a row of text alone, a row with two."""
    torch.manual_seed(1)
    one, two = model.encode([torch.randn(1, 3, 32, 32), torch.randn(2, 3, 32, 32)])
    return [torch.tensor(i) for i in ([1, IMAGE, 4], [1, 9, 9, 4], [IMAGE, 5])], [[one], [], [two]]


def test_at_every_step_cached_decoding_equals_the_full_pass_also_of_mixed_rows_that_are_reordered() -> None:
    model = every_step()
    ids, images = asked(model)
    expert = torch.zeros(3, dtype=torch.long)
    answers = torch.tensor([[7, 8, 9], [10, 11, 12], [13, 14, 15]])
    _, state = model.prefill(model.prompt(ids, images), expert, 3)
    order = torch.tensor([2, 0, 0, 1])
    state.select(order)
    steps = [model.step(answers[order, t], state) for t in range(3)]
    for place, row in enumerate(order.tolist()):
        for t, logits in enumerate(steps):
            grown = torch.cat((ids[row], answers[row, : t + 1]))
            full, _ = model.prefill(model.prompt([grown], [images[row]]), expert[:1], 0)
            torch.testing.assert_close(logits[place], full[0], atol=2e-4, rtol=1e-4)


def test_injection_at_every_step_changes_text_of_rows_with_an_image_and_no_other() -> None:
    model = every_step()
    published = LlavaVLM(dataclasses.replace(model.config, inject_steps=False)).eval().requires_grad_(False)
    published.load_state_dict(model.state_dict())  # the same parameters
    ids, images = asked(model)
    expert = torch.zeros(3, dtype=torch.long)
    prompts = [m.prompt(ids, images) for m in (model, published)]
    differences = (model(prompts[0], expert) - published(prompts[1], expert)).abs().amax(-1)
    assert differences[0, :16].max() == 0  # an image's own tokens stand before the text that changes
    assert differences[0, 16:18].min() > 1e-3
    assert differences[1, :4].max() == 0
    assert differences[2, :32].max() == 0
    assert differences[2, 32] > 1e-3


def test_nothing_of_a_request_stays_on_the_model() -> None:
    model = every_step()
    ids, images = asked(model)
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    expert = torch.zeros(3, dtype=torch.long)
    first, _ = model.prefill(model.prompt(ids, images), expert, 0)
    model.greedy(model.prompt([ids[2]], [images[2]]), expert[:1], 3, None)
    assert torch.equal(model.prefill(model.prompt(ids, images), expert, 0)[0], first)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
