"""Throughput and memory at several sizes, and where the time goes; beside sahi where it is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measuring.figures import head, line

from scene_tables.child import REPEATS, middle, run
from scene_tables.files import write_scene

REPEATS_LARGE, LARGE = 3, 10_000
SAHI_MOST = 20_000  # it holds the whole image and all slices: beyond this more memory than most machines have
TURNS_SIDE = 1000  # the largest scenes that are also done many times in one process
COLUMNS = [
    "what", "side", "tiles", "runs", "CPU ms/MPix, lowest / median", "with describing the scene", "wall ms/MPix",
    "MPix per CPU s", "reading / model / merging", "peak MiB", "objects",
]  # fmt: skip


def measure(folder: Path, sides: Sequence[int]) -> list[dict[str, Any]]:
    runs = []
    print(head(COLUMNS))
    installed = importlib.util.find_spec("sahi") is not None
    for side in sides:
        path = folder / f"{side}.tif"
        write_scene(path, side)
        kinds = ["ours", "sahi"] if installed and side <= SAHI_MOST else ["ours"]
        repeats = REPEATS_LARGE if side >= LARGE else REPEATS
        turns = [{kind: run(kind, path, side) for kind in kinds} for _ in range(repeats)]
        told = {kind: middle([turn[kind] for turn in turns]) for kind in kinds}
        if installed and side <= TURNS_SIDE:
            many = run("turns", path, side)
            told |= {f"{kind}, in one process": middle(many[kind]) for kind in kinds}
        for kind, one in told.items():
            runs.append({"kind": kind, **one})
            print(line(_cells(kind, one)), flush=True)
    if not installed:
        print("\nsahi is not compared: it is not installed (--sahi DIR names a folder that has it).")
    return runs


def _cells(name: str, run: dict[str, Any]) -> list[str]:
    pixels = run["side"] ** 2 / 1e6
    return [
        name,
        f"{run['side']:,}",
        f"{run['tiles']:,}",
        f"{run['runs']}",
        f"{run['lowest_work_cpu_s'] / pixels * 1000:.1f} / {run['work_cpu_s'] / pixels * 1000:.1f}",
        f"{run['lowest_cpu_s'] / pixels * 1000:.1f} / {run['cpu_s'] / pixels * 1000:.1f}",
        f"{run['lowest_wall_s'] / pixels * 1000:.1f} / {run['wall_s'] / pixels * 1000:.1f}",
        f"{pixels / run['cpu_s']:.1f}",
        " / ".join(f"{run[f'{stage}_s'] / run['cpu_s']:.0%}" for stage in ("reading", "model", "merging")),
        f"{run['peak_mib']:.0f}",
        f"{run['found']:,} of {run['objects']:,}",
    ]
