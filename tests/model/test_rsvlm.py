"""The whole model on its debug config: cached steps, batches, packing, routing, gradients."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from model_server.model.config import DecoderConfig, ModelConfig, debug
from model_server.model.experts import UnknownTask, route
from model_server.model.generate import beam_search
from model_server.model.rsvlm import RSVLM, Questions, prompt_mask

TASK, END = 2, 1


def build(experts: tuple[str, ...] = ("image",)) -> RSVLM:
    torch.manual_seed(0)
    config = debug()
    model = RSVLM(dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, experts=experts))).eval()
    for name, p in model.named_parameters():
        if not name.startswith(("backbone", "sentence")):
            torch.nn.init.normal_(p, std=0.3)
    return model


def images(n: int) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def questions(model: RSVLM, lengths: list[int]) -> Questions:
    width = max(lengths)
    ids = torch.randint(4, 500, (len(lengths), width), generator=torch.Generator().manual_seed(2))
    mask = torch.arange(width)[None] < torch.tensor(lengths)[:, None]
    return model.read_questions(ids, mask)


@torch.no_grad()
def full_forward(model: RSVLM, row: int, answer: list[int], length: int) -> torch.Tensor:
    """Logits after each answer token, without a cache and without padding."""
    features = model.encode(images(row + 1)).rows(torch.tensor([row]))
    asked = questions(model, [3, 5])
    mine = slice(row, row + 1)
    one = Questions(asked.states[mine, :length], asked.vectors[mine], asked.mask[mine, :length])
    x, visible, positions = model.prompt(features, torch.tensor([TASK]), one)
    n = len(answer)
    x = torch.cat((x, model.decoder.embed(torch.tensor([answer]))), 1)
    visible = torch.cat((visible, torch.ones(1, n, dtype=torch.bool)), 1)
    positions = torch.cat((positions, positions[:, -1:] + 1 + torch.arange(n)), 1)
    hidden = model.decoder(x, positions, prompt_mask(visible, model.visual_tokens), torch.tensor([0]), features.windows)
    return model.decoder.logits(hidden[0, -n - 1 :])


def test_cached_generation_equals_the_full_forward_also_in_a_padded_batch() -> None:
    model = build()
    lengths, answers = [3, 5], [[7, 8, 9], [11, 12, 13]]
    with torch.no_grad():
        features = model.encode(images(2))
        logits, state = model.prefill(
            features, torch.tensor([TASK, TASK]), questions(model, lengths), torch.tensor([0, 0]), 4
        )
        steps = [logits]
        for t in range(3):
            steps.append(model.step(torch.tensor([a[t] for a in answers]), state))
    for row in range(2):
        cached = torch.stack([s[row] for s in steps])
        torch.testing.assert_close(cached, full_forward(model, row, answers[row], lengths[row]), atol=2e-4, rtol=1e-4)


def test_views_of_an_image_say_the_mean_of_what_each_says_also_after_their_beams_are_reordered() -> None:
    model, n, tokens, order = build(), 2, torch.tensor([7, 9, 8]), torch.tensor([1, 0, 1])
    views = model.config.views
    with torch.no_grad():
        features = model.encode(images(n), turned=True)
        assert len(features.visual) == views * n
        torch.testing.assert_close(features.rows(torch.arange(n)).visual, model.encode(images(n)).visual)
        tasks, expert = torch.full((views * n,), TASK), torch.zeros(views * n, dtype=torch.long)
        together, state = model.prefill(features, tasks, None, expert, 2, views)
        state.select(order)
        next_together = model.step(tokens, state)
        first, second = [], []
        for v in range(views):
            one = features.rows(torch.arange(n) + v * n)
            logits, state = model.prefill(one, tasks[:n], None, expert[:n], 2)
            first.append(logits.log_softmax(-1))
            state.select(order)
            second.append(model.step(tokens, state).log_softmax(-1))
    torch.testing.assert_close(together, torch.stack(first).mean(0), atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(next_together, torch.stack(second).mean(0), atol=2e-4, rtol=1e-4)


def test_a_question_changes_the_answer_and_an_absent_one_is_no_token() -> None:
    model = build()
    with torch.no_grad():
        features = model.encode(images(2))
        plain, _ = model.prefill(features, torch.tensor([TASK, TASK]), None, torch.tensor([0, 0]), 1)
        asked = questions(model, [3, 5])
        mask = asked.mask.clone()
        mask[0] = False
        vectors = asked.vectors.clone()
        vectors[0] = 0
        mixed, _ = model.prefill(
            features, torch.tensor([TASK, TASK]), Questions(asked.states, vectors, mask), torch.tensor([0, 0]), 1
        )
    torch.testing.assert_close(mixed[0], plain[0], atol=2e-4, rtol=1e-4)
    assert (mixed[1] - plain[1]).abs().max() > 1e-2


def test_experts_that_are_copies_change_nothing_and_a_mixed_batch_equals_each_alone() -> None:
    model = build(("image", "region", "pixel"))
    with torch.no_grad():
        features = model.encode(images(3))
        tasks = torch.tensor([TASK] * 3)
        mixed, _ = model.prefill(features, tasks, None, torch.tensor([0, 2, 1]), 1)
        for row, expert in enumerate((0, 2, 1)):
            alone, _ = model.prefill(features.rows(torch.tensor([row])), tasks[:1], None, torch.tensor([expert]), 1)
            torch.testing.assert_close(mixed[row], alone[0], atol=2e-4, rtol=1e-4)
        other, _ = model.prefill(features, tasks, None, torch.tensor([1, 1, 1]), 1)
        assert (mixed[0] - other[0]).abs().max() > 1e-2  # random experts do differ
        for block in model.decoder.blocks:
            first, *rest = block.get_submodule("experts.experts").children()
            for expert in rest:
                expert.load_state_dict(first.state_dict())
        same = [model.prefill(features, tasks, None, torch.tensor([e] * 3), 1)[0] for e in range(3)]
    assert torch.equal(same[0], same[1])
    assert torch.equal(same[0], same[2])


def test_the_router_reads_the_task_token_and_refuses_what_it_does_not_know() -> None:
    assert [route(t, ("image", "region", "pixel")) for t in ("[CAP]", "[VG]", "[SEG]")] == [0, 1, 2]
    with pytest.raises(UnknownTask, match=r"\[XYZ\]"):
        route("[XYZ]", ("image",))
    with pytest.raises(UnknownTask, match="'region' expert"):
        route("[VG]", ("image",))


def test_beam_search_finds_the_best_sequence_that_brute_force_finds() -> None:
    model = build()
    banned = torch.ones(model.config.decoder.vocab_size, dtype=torch.bool)
    banned[[END, 5, 6]] = False
    with torch.no_grad():
        features = model.encode(images(1))
        logits, state = model.prefill(features, torch.tensor([TASK]), None, torch.tensor([0]), 3)
        best = beam_search(model, logits, state, beams=9, steps=3, end=END, banned=banned, length_power=0.0)[0][0]
        scores = {}
        stack: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
        while stack:
            said, total = stack.pop()
            logits, state = model.prefill(features, torch.tensor([TASK]), None, torch.tensor([0]), 3)
            for token in said:
                logits = model.step(torch.tensor([token]), state)
            logp = logits[0].masked_fill(banned, -torch.inf).log_softmax(-1)
            for token in (END, 5, 6):
                value = total + float(logp[token])
                if token == END:
                    scores[said] = value
                elif len(said) == 2:
                    scores[(*said, token)] = value
                else:
                    stack.append(((*said, token), value))
    expected = max(scores, key=scores.__getitem__)
    assert best.ids == expected
    assert best.logprob == pytest.approx(scores[expected], abs=1e-3)


def test_every_trainable_part_gets_a_gradient() -> None:
    model = build().train()
    features = model.encode(images(2))
    logits, _ = model.prefill(features, torch.tensor([TASK, TASK]), questions(model, [3, 5]), torch.tensor([0, 0]), 1)
    heads = model.heads.label_logits(features.pooled, torch.randn(4, 24), torch.arange(4)).sum()
    more = model.heads.objects(features.pooled).sum() + model.heads.concepts(features.pooled).sum()
    (logits.square().sum() + heads + more).backward()
    silent = {n for n, p in model.named_parameters() if p.grad is None}
    assert silent == set()


def test_a_config_survives_json() -> None:
    config = debug()
    assert ModelConfig.from_json(config.to_json()) == config
    assert isinstance(ModelConfig.from_json(config.to_json()).decoder, DecoderConfig)
