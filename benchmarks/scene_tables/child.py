"""A process of its own for each figure: how it is started, and what it does.

Before it measures, it does one small scene, as the tools' process has (libraries are loaded and started).
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rs_tools.imagery.tiling import OVERLAP
from rs_tools.looking import BATCH
from scene_tables import masked
from scene_tables.asked import asked
from scene_tables.detections import ours
from scene_tables.files import write_scene
from scene_tables.with_sahi import with_sahi

_LOWEST = ("work_cpu_s", "cpu_s", "wall_s")
PROGRAM = Path(__file__).parents[1] / "scene.py"
WARM_UP, WARM_UP_SIDE = "warm_up.tif", 512
REPEATS = 7
TURNS = 40  # ours and sahi, in one process


def write_warm_up(folder: Path) -> None:
    """Beside the scenes that are measured."""
    write_scene(folder / WARM_UP, WARM_UP_SIDE)


def typical(kind: str, path: Path, side: int, overlap: int = OVERLAP, batch: int = BATCH) -> dict[str, Any]:
    """The run with the median CPU time of several; of the model and of masks, which take long, of one."""
    once = kind in ("model", *masked.KINDS)
    return middle([run(kind, path, side, overlap, batch) for _ in range(1 if once else REPEATS)])


def middle(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The run with the median CPU time, and what the lowest was."""
    ordered = sorted(runs, key=lambda run: run.get("cpu_s", run["wall_s"]))
    lowest = {f"lowest_{name}": min(run[name] for run in runs) for name in _LOWEST if name in ordered[0]}
    return ordered[len(runs) // 2] | lowest | {"runs": len(runs)}


def run(kind: str, path: Path, side: int, overlap: int = OVERLAP, batch: int = BATCH) -> dict[str, Any]:
    """One run of `ours`, `sahi`, `turns`, `model` or a kind of mask, in a process started for it."""
    arguments = ["--child", kind, str(path), str(side), str(overlap), str(batch)]
    done = subprocess.run([sys.executable, str(PROGRAM), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{kind} at {side}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def be_child(kind: str, path: str, side: str, overlap: str, batch: str) -> None:
    """What that process does: its last line is the figures."""
    print(json.dumps(_measured(kind, Path(path), int(side), int(overlap), int(batch))))


def _measured(kind: str, scene: Path, side: int, overlap: int, batch: int) -> dict[str, Any]:
    first = scene.with_name(WARM_UP)
    if kind == "sahi":
        with_sahi(first, WARM_UP_SIDE, overlap)
        return with_sahi(scene, side, overlap)
    if kind == "turns":
        told: dict[str, Any] = {"ours": [], "sahi": []}
        for _ in range(TURNS):
            told["ours"].append(asyncio.run(ours(scene, side, overlap, batch)))
            told["sahi"].append(with_sahi(scene, side, overlap))
        return told
    if kind == "model":
        return asyncio.run(asked(scene, side, batch))
    if kind in masked.KINDS:
        return asyncio.run(masked.masked(kind, scene, side))
    asyncio.run(ours(first, WARM_UP_SIDE, overlap, batch))
    return asyncio.run(ours(scene, side, overlap, batch))
