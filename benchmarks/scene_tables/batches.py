"""What the number of tiles asked about at a time costs, with the stand-in or with the real model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from measuring.figures import head, line

from scene_tables.child import typical
from scene_tables.files import SWEPT, swept_scene

BATCHES = [1, 4, 8, 16, 32, 64]


def measure(folder: Path, model: bool) -> list[dict[str, Any]]:
    path = swept_scene(folder)
    kind, side = ("model", 2048) if model else ("ours", SWEPT)
    print(head(["batch", "tiles", "wall s", *([] if model else ["CPU s", "peak MiB"])]))
    runs = []
    for batch in BATCHES:
        one = typical(kind, path, side, batch=batch)
        runs.append({"batch": batch, **one})
        rest = [] if model else [f"{one['cpu_s']:.2f}", f"{one['peak_mib']:.0f}"]
        print(line([f"{batch}", f"{one['tiles']}", f"{one['wall_s']:.2f}", *rest]), flush=True)
    return runs
