"""What the resident model's passes and steps take on a GPU, beside what the GPU itself can do.

    python benchmarks/gpu_engine.py                             # nano with random weights, bfloat16
    python benchmarks/gpu_engine.py --dtype float32 --out engine.json
    python benchmarks/gpu_engine.py --device cpu --config debug # only to see that it runs: the figures say nothing

It needs torch and this project's model code, nothing else. Times are the median of some runs, each waited for. Tables:
  machine   the rate of matrix products and the memory bandwidth
  encode    all views of new images, at several batch sizes
  prefill   captions' visual part and prompt, under all views
  steps     one token of every caption, at 1 to 64 at a time, as a replayed graph and kernel by kernel, against the time
            it takes to read the weights, keys and values once; and against one sequence at a time
  parts     a step with weights in eight bits; of a third of the sequences to each of three experts, which is never a
            graph; prefixes without MDA; tiles that come from pinned memory and from any
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from model_server.model.config import EXPERTS, ModelConfig, debug, nano
from model_server.model.int8 import quantise
from model_server.model.rsvlm import RSVLM
from model_server.model.seen import Seen, prefixes, see
from model_server.model.slots import Lane, Prefix, prefill
from model_server.model.transfer import sent

BATCHES = (1, 4, 16, 64)
CONFIGS: dict[str, Callable[[], ModelConfig]] = {"nano": nano, "debug": debug}
BEAMS, STEPS = 3, 40  # of a caption

Row = list[str]


class Bench:
    """A model with random weights on a device, and the tables measured so far."""

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype, repeats: int) -> None:
        torch.manual_seed(0)
        self.config, self.device, self.dtype, self.repeats = config, device, dtype, repeats
        self.model = RSVLM(config).eval()
        self.model.backbone.fold_norms()
        self.model.to(device, dtype)
        self.tables: dict[str, list[Row]] = {}

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def milliseconds(self, work: Callable[[], object]) -> float:
        """The median of `repeats` runs after two to warm up."""
        times = []
        for _ in range(self.repeats + 2):
            self.wait()
            started = time.perf_counter()
            work()
            self.wait()
            times.append(1000 * (time.perf_counter() - started))
        return statistics.median(times[2:])

    def images(self, count: int) -> torch.Tensor:
        side = self.config.image_size
        return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, device=self.device)

    def seen(self, count: int) -> list[Seen]:
        return [one for start in range(0, count, 16) for one in see(self.model, self.images(min(16, count - start)))]

    def table(self, name: str, header: Row, rows: list[Row]) -> None:
        self.tables[name] = [header, *rows]
        print(f"\n{name}\n", flush=True)
        for row in (header, ["---"] * len(header), *rows):
            print(f"| {' | '.join(row)} |", flush=True)


def measure_machine(bench: Bench) -> float:
    """Prints it; bytes that are copied in a second, read and written."""
    n, words = (4096, 2**28) if bench.device.type == "cuda" else (512, 2**22)
    a = torch.randn(n, n, device=bench.device, dtype=bench.dtype)
    big = torch.zeros(words, device=bench.device)
    product, copy = bench.milliseconds(lambda: a @ a), bench.milliseconds(big.clone)
    bandwidth = 2 * big.nbytes / copy * 1000
    rows = [["matrix products", f"{2 * n**3 / product / 1e9:.1f} TFLOP/s"],
            ["copying memory", f"{bandwidth / 1e9:.0f} GB/s"]]  # fmt: skip
    bench.table("machine", ["what", "measured"], rows)
    return bandwidth


def measure_encode(bench: Bench) -> None:
    rows = []
    for batch in BATCHES:
        images = bench.images(batch)
        ms = bench.milliseconds(lambda images=images: see(bench.model, images))
        rows.append([str(batch), f"{ms:.2f}", f"{1000 * batch / ms:.0f}"])
    bench.table("encode", ["images at a time", "ms", "images/s"], rows)


def prefixes_of(model: RSVLM, seen: Sequence[Seen], expert: int = 0) -> Prefix:
    """Under all views, made anew."""
    fresh = [replace(one, prefixes={}, maps=dict(one.maps)) for one in seen]
    return Prefix.joined(prefixes(model, fresh, model.config.views, expert))


def measure_prefill(bench: Bench) -> None:
    rows = []
    for batch in BATCHES:
        seen = bench.seen(batch)
        ms = bench.milliseconds(lambda seen=seen: prefill(bench.model, prefixes_of(bench.model, seen), 1, None))
        rows.append([str(batch), f"{ms:.2f}", f"{1000 * batch / ms:.0f}"])
    bench.table("prefill", ["captions at a time", "ms", "captions/s"], rows)


def lane_of(bench: Bench, model: RSVLM, experts: Sequence[int], static: bool | None = None) -> Lane:
    """With a caption under way for each of `experts`, none of which ends."""
    banned = torch.zeros(model.config.decoder.vocab_size, dtype=torch.bool, device=bench.device)
    banned[0] = True  # the token that ends
    lane = Lane(model, sequences=len(experts), views=model.config.views, prompt=model.visual_tokens + 1, beams=BEAMS,
                steps=max(STEPS, bench.repeats + 4), end=0, banned=banned, length_power=0.0,
                static=static)  # fmt: skip
    (one,) = see(model, bench.images(1))
    prompts = {expert: prefill(model, prefixes_of(model, [one], expert), 1, None) for expert in set(experts)}
    for i, expert in enumerate(experts):
        lane.join([i], prompts[expert])
    return lane


def measure_steps(bench: Bench, bandwidth: float) -> None:
    decoder = bench.model.decoder
    weights = sum(p.nbytes for p in decoder.blocks.parameters()) + decoder.embed.weight.nbytes
    rows, alone = [], None
    for batch in BATCHES:
        lane = lane_of(bench, bench.model, [0] * batch)
        ms = bench.milliseconds(lane.step)
        eager = bench.milliseconds(lane_of(bench, bench.model, [0] * batch, static=False).step)
        alone = alone or ms
        places = bench.model.visual_tokens + 1 + BEAMS * bench.repeats // 2
        held = batch * Lane.nbytes(bench.model, bench.config.views, places, BEAMS, 1)
        limit = 1000 * (weights + held) / bandwidth
        rate = [f"{1000 * batch / ms:.0f}", f"{alone * batch / ms:.1f}", f"{limit:.3f}", f"{limit / ms:.0%}"]
        rows.append([str(batch), f"{ms:.2f}", f"{eager:.2f}", *rate])
    header = ["captions at a time", "ms a step", "kernel by kernel", "tokens/s", "x one at a time",
              "ms to read all once", "of the limit"]  # fmt: skip
    bench.table("steps", header, rows)


def measure_parts(bench: Bench) -> None:
    rows = []
    config = replace(bench.config, decoder=replace(bench.config.decoder, experts=EXPERTS))
    routed = Bench(config, bench.device, bench.dtype, bench.repeats)
    for name, experts in (("one expert", [0] * 15), ("three experts", [i % 3 for i in range(15)])):
        ms = bench.milliseconds(lane_of(routed, routed.model, experts, static=False).step)
        rows.append([f"a step of 15 captions, kernel by kernel, {name}", f"{ms:.2f}"])
    small = copy.deepcopy(bench.model)
    quantise(small)
    for name, model in (("weights as they are", bench.model), ("weights in eight bits", small)):
        ms = bench.milliseconds(lane_of(bench, model, [0] * 16).step)
        rows.append([f"a step of 16 captions, {name}", f"{ms:.2f}"])
    plain = Bench(replace(bench.config, fusion=replace(bench.config.fusion, mda_layers=())), bench.device, bench.dtype,
                  bench.repeats)  # fmt: skip
    for name, one in (("with MDA", bench), ("without", plain)):
        seen = one.seen(16)
        ms = bench.milliseconds(lambda one=one, seen=seen: prefixes_of(one.model, seen))
        rows.append([f"prefixes of 16 images, {name}", f"{ms:.2f}"])
    tiles = bench.images(16).cpu()
    for name, move in (("pinned", lambda: sent(tiles, bench.device)), ("as they are", lambda: tiles.to(bench.device))):
        rows.append([f"16 tiles to the device, {name}", f"{bench.milliseconds(move):.2f}"])
    bench.table("parts", ["what", "ms"], rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write; 2 where the device is not there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--config", choices=list(CONFIGS), default="nano")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path, help="JSON file for the tables")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("error: no CUDA device here; --device cpu shows that it runs, its figures say nothing", file=sys.stderr)
        return 2
    bench = Bench(CONFIGS[options.config](), device, getattr(torch, options.dtype), options.repeats)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"
    where = {"device": gpu, "torch": torch.__version__, "config": options.config, "dtype": options.dtype}
    print(", ".join(where.values()))
    with torch.inference_mode():
        bandwidth = measure_machine(bench)
        measure_encode(bench)
        measure_prefill(bench)
        measure_steps(bench, bandwidth)
        measure_parts(bench)
    if options.out is not None:
        options.out.write_text(json.dumps({**where, "tables": bench.tables}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
