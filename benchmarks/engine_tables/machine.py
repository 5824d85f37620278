"""What the processor can do: matrix products and memory bandwidth, with as many threads as the model has."""

from __future__ import annotations

import os

import torch

from engine_tables.bench import Bench
from engine_tables.timing import timed
from model_server.model.packed import PackedLinear, can_pack


def measure(bench: Bench) -> None:
    """The best of some matrix products, and of some copies of an array larger than the caches, by CPU time."""
    n = 1024
    a, big = torch.randn(n, n), torch.zeros(32 * 2**20)
    packed = PackedLinear(a) if can_pack(a.device) else torch.nn.Linear(n, n, bias=False)
    products = {
        "matrix products, float32, PyTorch's BLAS": lambda: int((a @ a).shape[0]),
        "the same, packed as the projections are": lambda: int(packed(a).shape[0]),
    }
    copy = min(timed(lambda: big.clone().shape[0]).cpu_s for _ in range(5))
    rows = [
        *(
            [name, f"{2 * n**3 / min(timed(product).cpu_s for _ in range(20)) / 1e9:.0f} GFLOP per CPU s"]
            for name, product in products.items()
        ),
        ["copying memory", f"{2 * big.nbytes / copy / 1e9:.1f} GB per CPU s"],
        ["load average", f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"],
    ]
    bench.table(f"machine, {torch.get_num_threads()} threads", ["what", "measured"], rows)
