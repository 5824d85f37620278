"""What a large scene costs: throughput and memory at several sizes, and where the time goes.

    python benchmarks/scene.py [--sizes 1000 5000 10000 20000] [--masks 5000 20000] [--sahi DIR] [--model]
        [--out scene.json]

Every tile of each scene is read at full resolution, answered, and the answers' boxes merged. The model is a stand-in
that knows the boxes (--model adds a sweep of batch sizes with the real one). Each figure comes from a process of its
own that has done one small scene before, as the tools' process has (libraries are loaded and started). CPU seconds are
told beside wall time, because only they mean something on a machine that does other things too.

What is compared with sahi is reading, tiling and merging. Ours is also told with what comes before: the scene is
opened, described (bands, place, stretch) and digested, which sahi does not do.

With `sahi` importable (--sahi: a folder to find it in, as made by `pip install --target DIR --no-deps sahi
opencv-python-headless`) its slicing and merging get the same file, tiles and boxes, in turn with ours. Small scenes
are also done many times in one process, ours and sahi in turn.

Masks (`segment` with one class and with sixteen, `detect_change`, with outlines and preview) are made by the tools as
they are, at up to `MAX_TILES` tiles a scene, with a stand-in that marks what is bright: thousands of areas.

The scenes are TIFFs whose blocks all point at the same compressed block of a real image: hundreds of megapixels that
have to be decoded, in a file of a megabyte.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

from scene_tables import batches, masks, overlaps, sizes
from scene_tables.child import be_child, write_warm_up

SIZES = [1000, 5000, 10_000, 20_000]
MASKS = [5000, 20_000]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="sides of the scenes in pixels")
    parser.add_argument("--masks", type=int, nargs="*", default=MASKS, help="sides of the scenes that get masks")
    parser.add_argument("--sahi", type=Path, metavar="DIR", help="folder to find sahi in")
    parser.add_argument("--model", action="store_true", help="also sweep batch sizes with this user's model server")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        be_child(*options.child)
        return
    if options.sahi:
        os.environ["PYTHONPATH"] = os.pathsep.join([str(options.sahi.resolve()), os.environ.get("PYTHONPATH", "")])
        sys.path.append(str(options.sahi.resolve()))
    results: dict[str, Any] = {"platform": platform.platform(), "cores": os.cpu_count(), "load": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        write_warm_up(folder)
        tables = {
            "sizes": lambda: sizes.measure(folder, options.sizes),
            "overlaps": lambda: overlaps.measure(folder),
            "batches": lambda: batches.measure(folder, options.model),
            "masks": lambda: masks.measure(folder, options.masks),
        }
        for name, measure in tables.items():
            print(f"\n### {name}\n", flush=True)
            results[name] = measure()
    print(f"\n{results['cores']} cores, load {results['load']:.1f} at the start, {results['platform']}")
    if options.out:
        options.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
