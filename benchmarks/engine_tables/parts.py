"""What the parts of the engine and of the model are worth: the same with one of them off."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from measuring.asked import WORDS

from engine_tables.bench import STATIC, Bench
from engine_tables.serving import ask, serving
from engine_tables.timing import COLUMNS, in_turn, timed_async
from model_server.model.config import EXPERTS, StacksConfig, nano
from model_server.model.rsvlm import RSVLM
from model_server.model.seen import prefixes, see
from model_server.model.slots import Lane, prefill


async def measure(bench: Bench) -> None:
    rows = []
    limit = bench.perceiver.cache.limit
    for name, kept in (("with the cache", limit), ("without", 0)):
        bench.perceiver.cache.limit = kept
        async with serving(bench) as engine:
            await ask(engine, 1, STATIC * len(WORDS), WORDS, bench.known)
            run = await timed_async(ask(engine, STATIC, bench.requests, WORDS, bench.known))
        rows.append([f"16 callers on 16 images, {name}", *run.columns()])
    bench.perceiver.cache.limit = limit
    bench.table("parts: cache", ["what", *COLUMNS], rows)
    steps, prompts = part_costs(max(bench.requests // 4, 12))
    rows = [[name, f"{ms:.1f}"] for name, ms in steps.items()]
    bench.table("parts: steps", ["a step of 16 answers, random weights of nano", "CPU ms"], rows)
    rows = [[name, f"{ms:.1f}"] for name, ms in prompts.items()]
    bench.table("parts: images", ["the decoder's part of 4 images, random weights of nano", "CPU ms"], rows)


def variants() -> dict[str, RSVLM]:
    """nano with random weights and more or fewer mechanisms."""
    c = nano()
    plain = replace(c, fusion=replace(c.fusion, mda_layers=()))
    injected = replace(plain, stacks=StacksConfig(factor=1), inject_layers=c.fusion.mda_layers, inject_steps=True)
    configs = {
        "as shipped: one expert, MDA": c,
        "without MDA": plain,
        "injection at every step, in MDA's place": injected,
        "three experts": replace(c, decoder=replace(c.decoder, experts=EXPERTS)),
    }
    return {name: RSVLM(config).eval() for name, config in configs.items()}


@torch.inference_mode()
def part_costs(repeats: int) -> tuple[dict[str, float], dict[str, float]]:
    """CPU milliseconds, the median of runs taken in turn: of a step of 16 answers, and of the decoder's visual part."""
    models, image = variants(), None
    lanes: dict[str, Lane] = {}
    making: dict[str, Callable[[], object]] = {}
    for name, model in models.items():
        model.backbone.fold_norms()
        if image is None:
            image = torch.randint(0, 256, (1, 3, *[model.config.image_size] * 2), dtype=torch.uint8)
        (seen,) = see(model, image)
        making[name] = lambda model=model, seen=seen: prefixes(
            model, [replace(seen, prefixes={}) for _ in range(4)], 1, 0
        )
        kinds = {name: ([0], False)}
        if len(model.config.decoder.experts) > 1:
            kinds = {f"{name}, a third of the answers by each": (range(3), False)}
        elif name.startswith("as shipped"):
            kinds["as shipped, of fixed shapes"] = [0], True
        for kind, (experts, static) in kinds.items():
            lanes[kind] = lane = lane_of(model, repeats, static)
            for i in range(STATIC):
                (prefix,) = prefixes(model, [seen], 1, experts[i % len(experts)])
                lane.join([i], prefill(model, prefix, 1, None))
    del making["three experts"]  # all of an image goes through one
    return in_turn({name: lane.step for name, lane in lanes.items()}, repeats), in_turn(making, repeats)


def lane_of(model: RSVLM, steps: int, static: bool) -> Lane:
    banned = torch.zeros(model.config.decoder.vocab_size, dtype=torch.bool)
    return Lane(model, sequences=STATIC, views=1, prompt=model.visual_tokens + 1, beams=5, steps=steps + 4, end=0,
                banned=banned, length_power=0.0, static=static)  # fmt: skip
