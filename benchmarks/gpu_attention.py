"""Time every attention backend that this GPU supports, at the shapes of the large configs.

    python benchmarks/gpu_attention.py [--out attention.json] [--repeats 20]

Prints a table: milliseconds (median, by CUDA events) of the forward pass, and of forward and backward together where
the shape is one that is trained, with the reason for each backend that cannot take part. Each result is held to the
float32 equation first. Without a GPU it says so and ends with 2: a CPU's times would say nothing about these kernels.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from model_server.model.attention import Runs, attend, attend_packed
from model_server.model.backends import Backend, Call, refusal

CLOSE = 2e-2  # of the largest value; bfloat16 has eight bits


@dataclass(frozen=True)
class Shape:
    """`lengths` are runs of one packed call, or `batch` sequences of one length."""

    name: str
    heads: int
    kv_heads: int
    head_width: int
    causal: bool
    batch: int = 0
    tokens: int = 0
    lengths: tuple[int, ...] = ()
    trained: bool = False


SHAPES = (
    Shape("detail windows, CLIP-L (32 of 577)", 16, 16, 64, False, batch=32, tokens=577),
    Shape("SigLIP-so400m (8 of 729)", 16, 16, 72, False, batch=8, tokens=729),
    Shape("prefill, Qwen2-0.5B (8 of 1024)", 14, 2, 64, True, batch=8, tokens=1024, trained=True),
    Shape("prefill, Llama-3-8B (4 of 2048)", 32, 8, 128, True, batch=4, tokens=2048, trained=True),
    Shape("Qwen2.5-VL windows (packed)", 16, 16, 80, False, lengths=(64,) * 64 + (32,) * 16 + (16,)),
    Shape("mixed prefill, Llama-3-8B (packed)", 32, 8, 128, True, lengths=(1100, 380, 2048, 96, 700), trained=True),
)


@dataclass(frozen=True)
class Timing:
    shape: str
    backend: str
    forward_ms: float | None
    both_ms: float | None
    refused: str = ""


def inputs(shape: Shape, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Random q, k, v in bfloat16, packed or [B, H, T, d]."""
    made = []
    for heads in (shape.heads, shape.kv_heads, shape.kv_heads):
        size = (
            (sum(shape.lengths), heads, shape.head_width) if shape.lengths
            else (shape.batch, heads, shape.tokens, shape.head_width)
        )  # fmt: skip
        made.append(torch.randn(size, device=device, dtype=torch.bfloat16))
    return made[0], made[1], made[2]


def runner(shape: Shape, backend: Backend, device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Attention at a shape by a backend."""
    if shape.lengths:
        runs = Runs.of(shape.lengths, device)
        return lambda q, k, v: attend_packed(q, k, v, runs, causal=shape.causal, backend=backend)
    return lambda q, k, v: attend(q, k, v, "causal" if shape.causal else None, backend)


def milliseconds(work: Callable[[], object], repeats: int) -> float:
    """The median by CUDA events, after three runs to warm up."""
    for _ in range(3):
        work()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def measure(shape: Shape, backend: Backend, device: torch.device, repeats: int) -> Timing:
    """Check a backend against the equation, then time it.

    Raises:
        ValueError: it is further from the equation than bfloat16 explains.
    """
    q, k, v = inputs(shape, device)
    reason = refusal(backend, Call.of(q, "causal" if shape.causal else "none"))
    if reason is not None:
        return Timing(shape.name, backend, None, None, reason)
    run, expected = runner(shape, backend, device), runner(shape, Backend.MATH, device)(q, k, v).float()
    gap = float((run(q, k, v).float() - expected).abs().max() / expected.abs().max())
    if not gap <= CLOSE:
        raise ValueError(f"{backend} differs by {gap:.1%} from the equation at {shape.name}")
    forward = milliseconds(lambda: run(q, k, v), repeats)
    if not shape.trained:
        return Timing(shape.name, backend, forward, None)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    slope = torch.randn_like(q)

    def both() -> object:
        return torch.autograd.grad(run(leaves[0], leaves[1], leaves[2]), leaves, slope)

    return Timing(shape.name, backend, forward, milliseconds(both, repeats))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write; 2 where there is no GPU."""
    parser = argparse.ArgumentParser(description="Time attention backends on a GPU.")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("error: no CUDA device here; these kernels run on nothing else", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    backends = [b for b in Backend if b is not Backend.AUTO]
    timings = [measure(shape, backend, device, options.repeats) for shape in SHAPES for backend in backends]
    print(f"attention on {torch.cuda.get_device_name(device)}, torch {torch.__version__}, ms\n")
    print("| shape | backend | forward | forward and backward | not here because |\n| --- | --- | --- | --- | --- |")
    for t in timings:
        forward, both = ("" if ms is None else f"{ms:.3f}" for ms in (t.forward_ms, t.both_ms))
        print(f"| {t.shape} | {t.backend} | {forward} | {both} | {t.refused} |")
    if options.out is not None:
        where = {"gpu": torch.cuda.get_device_name(device), "torch": torch.__version__}
        figures = {**where, "python": platform.python_version(), "timings": [asdict(t) for t in timings]}
        options.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
