"""What masks of thousands of areas cost, with their outlines and previews."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measuring.figures import head, line

from scene_tables.child import typical
from scene_tables.files import place, write_scene
from scene_tables.masked import KINDS, later

COLUMNS = ["what", "side", "tiles", "CPU s", "CPU ms/MPix", "peak MiB", "marked", "mask / vectors / preview kB"]


def measure(folder: Path, sides: Sequence[int]) -> list[dict[str, Any]]:
    runs = []
    print(head(COLUMNS))
    for side in sides:
        path = folder / f"mask-{side}.tif"
        for one in (path, later(path)):
            write_scene(one, side)
            place(one)
        for kind in KINDS:
            run = {"kind": kind, **typical(kind, path, side)}
            runs.append(run)
            cells = [
                kind,
                f"{side:,}",
                f"{run['tiles']}",
                f"{run['cpu_s']:.1f}",
                f"{run['cpu_s'] / side**2 * 1e9:.0f}",
                f"{run['peak_mib']:.0f}",
                f"{run['share']:.0%}",
                " / ".join(f"{run['bytes'][one] / 1000:,.0f}" for one in ("mask", "vectors", "preview")),
            ]
            print(line(cells), flush=True)
    return runs
