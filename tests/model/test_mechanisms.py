"""Every mechanism in one model: gradients reach all of it, and switching one off changes that part and no other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from model_server.model.config import ModelConfig, debug, nano
from model_server.model.modulation import Anchors
from model_server.model.rsvlm import RSVLM, Questions
from model_server.training.ablation import WITHOUT, Batch, logits_of, whole

PREFIXES = {
    "SFI": ("sfi.",),
    "MDA": ("decoder.mda.",),
    "injection": ("decoder.inject.", "detail."),
    "experts": tuple(f"decoder.blocks.{n}.experts.experts.{e}." for n in (0, 1) for e in (1, 2)),
    "TLM": ("modulation.",),
    "detail view": (),  # the same parameters, another picture
}


def build(config: ModelConfig) -> RSVLM:
    torch.manual_seed(0)
    model = RSVLM(config).eval()
    for name, p in model.named_parameters():
        if not name.startswith(("backbone", "sentence")):
            torch.nn.init.normal_(p, std=0.2)
    return model


def batch(model: RSVLM, expert: tuple[int, ...] = (0, 1, 2)) -> Batch:
    seeded = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8, generator=seeded)
    canvas = torch.randint(0, 256, (3, 3, 128, 128), dtype=torch.uint8, generator=seeded)
    known = (torch.randn(2, 64, generator=seeded), torch.rand(2, 2, generator=seeded))
    mask = torch.tensor([[True, True, False], [True] * 3, [False] * 3])
    questions = model.read_questions(torch.randint(4, 500, (3, 3), generator=seeded), mask)
    questions = Questions(questions.states.detach(), questions.vectors.detach(), questions.mask)
    ids = torch.randint(9, 99, (3, 5), generator=seeded)
    return Batch(images, canvas, Anchors.of([known, None, known], 64), questions, ids, ids, torch.tensor(expert))


def silenced(model: RSVLM, mechanism: str) -> None:
    """Make a mechanism's contribution zero without removing it."""
    zero: dict[str, Callable[[str], bool]] = {
        "SFI": lambda n: n.startswith("sfi.values."),
        "MDA": lambda n: ".mda." in n and ".values." in n,
        "injection": lambda n: n.endswith(".scale") and ".inject." in n,
        "TLM": lambda n: n.startswith("modulation.film.2."),
    }
    chosen = [p for n, p in model.named_parameters() if zero[mechanism](n)]
    assert chosen
    for p in chosen:
        p.data.zero_()


def test_gradients_reach_every_part_of_a_model_with_every_mechanism() -> None:
    model = build(whole()).train()
    given = batch(model)
    features = model.encode(given.images, canvas=given.canvas, anchors=given.anchors)
    heads = model.heads.label_logits(features.pooled, torch.randn(4, 24), torch.arange(4)).sum()
    heads = heads + model.heads.objects(features.pooled).sum() + model.heads.concepts(features.pooled).sum()
    asked = model.read_questions(torch.tensor([[5, 6, 7]] * 3), given.questions.mask)
    (logits_of(model, dataclasses.replace(given, questions=asked)).square().sum() + heads).backward()
    silent = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()}
    unused_rows = {n for n in silent if n.startswith("sentence.")}  # keys' biases cancel in a softmax
    assert silent - unused_rows == set()


@pytest.mark.parametrize("mechanism", WITHOUT)
def test_a_mechanism_that_is_off_takes_its_own_parameters_away_and_no_others(mechanism: str) -> None:
    full, less = build(whole()), RSVLM(WITHOUT[mechanism](whole()))
    gone = set(full.state_dict()) - set(less.state_dict())
    assert set(less.state_dict()) <= set(full.state_dict())
    assert all(name.startswith(PREFIXES[mechanism]) for name in gone)
    assert bool(gone) == bool(PREFIXES[mechanism])
    for prefix in PREFIXES[mechanism]:
        assert not any(name.startswith(prefix) for name in less.state_dict())


@pytest.mark.parametrize("mechanism", ["SFI", "MDA", "injection", "TLM"])
def test_without_a_mechanism_the_model_is_what_it_is_with_that_mechanisms_share_at_zero(mechanism: str) -> None:
    full = build(whole())
    less = RSVLM(WITHOUT[mechanism](whole())).eval()
    less.load_state_dict(full.state_dict(), strict=False)
    with torch.no_grad():
        given = batch(full)
        before = logits_of(full, given)
        silenced(full, mechanism)
        torch.testing.assert_close(logits_of(less, given), logits_of(full, given), atol=1e-5, rtol=1e-5)
        assert (before - logits_of(less, given)).abs().max() > 1e-3  # it did something


def test_one_expert_is_what_all_requests_of_the_first_expert_see() -> None:
    full, less = build(whole()), RSVLM(WITHOUT["experts"](whole())).eval()
    less.load_state_dict(full.state_dict(), strict=False)
    with torch.no_grad():
        first = batch(full, (0, 0, 0))
        torch.testing.assert_close(logits_of(full, first), logits_of(less, first))
        mixed = logits_of(full, batch(full))
        torch.testing.assert_close(mixed[0], logits_of(less, first)[0], atol=1e-5, rtol=1e-5)
        assert (mixed[1:] - logits_of(less, first)[1:]).abs().amax((1, 2)).min() > 1e-3


def test_the_detail_view_changes_the_stacks_and_nothing_else_of_an_image() -> None:
    full, less = build(whole()), RSVLM(WITHOUT["detail view"](whole())).eval()
    less.load_state_dict(full.state_dict())
    with torch.no_grad():
        given = batch(full)
        seen = [m.encode(given.images, canvas=given.canvas, anchors=given.anchors) for m in (full, less)]
        other = full.encode(given.images, canvas=given.canvas.flip(3), anchors=given.anchors)
    assert torch.equal(seen[0].visual, seen[1].visual)
    assert seen[0].stacks is not None
    assert seen[1].stacks is not None
    assert other.stacks is not None
    assert seen[0].stacks.shape[1] == 4 * seen[1].stacks.shape[1]
    assert torch.equal(other.visual, seen[0].visual)
    assert (other.stacks - seen[0].stacks).abs().max() > 1e-3  # it looks at the canvas


def test_decoding_over_the_cache_equals_the_full_pass_with_every_mechanism() -> None:
    model = build(whole())
    with torch.no_grad():
        given = batch(model)
        full = logits_of(model, given)
        features = model.encode(given.images, canvas=given.canvas, anchors=given.anchors)
        logits, state = model.prefill(features, given.ids[:, 0], given.questions, given.expert, 4)
        for t in range(5):
            torch.testing.assert_close(logits, full[:, t], atol=2e-4, rtol=1e-4)
            if t < 4:
                logits = model.step(given.ids[:, t + 1], state)


def test_turned_views_take_the_detail_with_them_and_refuse_anchors() -> None:
    model = build(dataclasses.replace(whole(), views=4))
    with torch.no_grad():
        given = batch(model)
        features = model.encode(given.images, turned=True, canvas=given.canvas)
        assert features.stacks is not None
        assert features.stacks.shape[0] == 12
        turned = model.encode(given.images.flip(3), canvas=given.canvas.flip(3))
        assert turned.stacks is not None
        torch.testing.assert_close(features.stacks[3:6], turned.stacks, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="upright"):
        model.encode(given.images, turned=True, anchors=given.anchors)


def test_the_shipped_configs_have_none_of_the_new_parts_and_old_config_files_still_read() -> None:
    import json

    for config in (nano(), debug()):
        names = RSVLM(config).state_dict() if config.name == "debug" else ()
        assert not any(n.startswith(("modulation.", "detail.", "decoder.inject.")) for n in names)
        raw = json.loads(config.to_json())
        for part, field in (("", "stacks"), ("", "inject_layers"), ("", "inject_steps"), ("", "modulation"),
                            ("decoder", "expert_rank"), ("fusion", "sfi"), ("fusion", "mda_shared"),
                            ("fusion", "width")):  # fmt: skip
            del (raw[part] if part else raw)[field]
        assert ModelConfig.from_json(json.dumps(raw)) == config
    assert ModelConfig.from_json(whole().to_json()) == whole()


def test_stacks_without_a_layer_that_reads_them_are_refused() -> None:
    with pytest.raises(ValueError, match="need each other"):
        RSVLM(dataclasses.replace(whole(), inject_layers=()))
