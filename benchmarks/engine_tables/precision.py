"""float32, bfloat16 and weights in eight bits: the model as it is, and one layer of a far larger one."""

from __future__ import annotations

from statistics import median

import torch
from measuring.asked import WORDS

from engine_tables.bench import Bench
from engine_tables.timing import in_turn, timed
from model_server.model.int8 import Int8Linear
from model_server.model.packed import PackedLinear
from model_server.perceiver import Perceiver
from model_server.query import Query


async def measure(bench: Bench) -> None:
    measure_model(bench)
    measure_layer(bench)


def measure_model(bench: Bench) -> None:
    """The same captions and answers, of new images and again of the same ones, in turn."""
    models = {p: Perceiver.load(bench.weights, precision=p) for p in ("float32", "bfloat16", "int8")}
    spent: dict[str, tuple[list[float], list[float]]] = {p: ([], []) for p in models}
    for turn in range(max(bench.requests // 12, 3) + 1):
        asked = [Query(r.task, image, text=r.text) for image in (bench.fresh() for _ in range(8)) for r in WORDS[:2]]
        for name, model in models.items():
            for times in spent[name]:
                run = timed(lambda model=model, asked=asked: len(model.answer(asked)))
                if turn:
                    times.append(run.cpu_ms)
    rows = []
    for name, (fresh, known) in spent.items():
        plan = models[name].plan
        held = [f"{size / 2**20:.0f}" for size in (plan.weights, plan.slots)]
        rows.append([name, *held, f"{median(fresh):.1f}", f"{median(known):.1f}"])
    header = ["precision", "weights MiB", "slots MiB", "captions and answers, new images: CPU ms each", "known images"]
    bench.table("precision", header, rows)


@torch.inference_mode()
def measure_layer(bench: Bench, width: int = 4096) -> None:
    """One layer as wide as those of a model of 7 to 8 billion parameters, whose weights leave the caches."""
    weight = torch.randn(width, width).bfloat16() / width**0.5
    layers = {
        "bfloat16": lambda x: torch.nn.functional.linear(x, weight), "packed": PackedLinear(weight),
        "eight bits": Int8Linear(weight),
    }  # fmt: skip
    rows = []
    for count in (1, 4, 16, 48, 192):
        x = torch.randn(count, width).bfloat16()
        works = {name: lambda layer=layer, x=x: layer(x) for name, layer in layers.items()}
        rows.append([str(count), *(f"{ms:.2f}" for ms in in_turn(works, 12).values())])
    header = [f"rows of {width}, bfloat16", *(f"{name}: CPU ms" for name in layers)]
    bench.table("precision: a layer", header, rows)
