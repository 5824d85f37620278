"""A tree inventory of one aerial image: every tree as a box on Earth, its crown in metres, trees per hectare.

python examples/tree_inventory.py             the bundled scene, 40 x 40 m of pine savanna at 10 cm
python examples/tree_inventory.py IMAGE       an image of your own, with a place on Earth

The trees go to out/IMAGE_trees.geojson, for any GIS. It needs `pip install 'rs-perception[server,geo]'`.
"""

from __future__ import annotations

import sys
from math import sqrt
from pathlib import Path

from pyproj import Geod
from shapely.geometry.base import BaseGeometry

import rs_tools as rs
from rs_tools.errors import PerceptionError
from rs_tools.summary import headline

SCENE = Path(__file__).resolve().parent / "data" / "ordway_swisher_neon.tif"
OUT = Path("out")
EARTH = Geod(ellps="WGS84")


def square_metres(shape: BaseGeometry) -> float:
    """Geodesic area of a shape in lon/lat."""
    return abs(EARTH.geometry_area_perimeter(shape)[0])


def take_inventory(image: Path) -> None:
    scene = rs.open(image)
    facts = scene.inspect()
    print(f"{image.name}: {headline(facts)}")
    if facts.gsd_m is None:
        raise SystemExit("Without a place on Earth there are no metres and no hectares.")
    ground_m2 = facts.width * facts.height * facts.gsd_m**2  # with the pixel at its centre; nodata counts too

    found, mask = scene.ground("tree"), scene.segment(["forest"])
    for warning in dict.fromkeys([*found.warnings, *mask.warnings]):
        print(f"Warning: {warning}")
    if not found.count:
        print("No tree was found, which does not say that there is none.")
        return
    trees = rs.to_geodataframe(found)  # all of them, also beyond the hundred that `objects` lists
    trees["crown_m"] = [round(sqrt(square_metres(box)), 2) for box in trees.geometry]
    OUT.mkdir(exist_ok=True)
    file = OUT / f"{image.stem}_trees.geojson"
    trees.to_file(file, driver="GeoJSON")

    print(f"\n{len(trees)} boxes on {ground_m2 / 1e4:.3g} ha\n\n  score   trees   per ha   median crown")
    for least in (0.0, 0.2, 0.3, 0.4, 0.5):
        kept = trees[trees.score >= least]
        crown = f"{kept.crown_m.median():.1f} m" if len(kept) else "-"
        print(f" >= {least:.1f}  {len(kept):6} {len(kept) / ground_m2 * 1e4:8.1f} {crown:>14}")
    print(f"\nCrowns, the mean side of a box: {trees.crown_m.min():.1f} to {trees.crown_m.max():.1f} m across.")

    wooded = (mask.classes[0].area_m2 or 0.0) / ground_m2
    boxed = square_metres(trees.union_all()) / ground_m2
    print(f"""
What the model does not know
- Which boxes are right. A score is the chance of that; together they promise {trees.score.sum():.1f} of {len(trees)}.
- What it missed: no score tells. Another look, at pixels, sees forest on {wooded:.0%} of the ground; the boxes
  cover {boxed:.0%}. Where the first is much more, expect trees without a box, or crowns larger than theirs.
- Crowns that touch, species, height and trunks. A box holds a crown and what lies in its corners.

Written: {file}""")


if __name__ == "__main__":
    try:
        take_inventory(Path(sys.argv[1]) if len(sys.argv) > 1 else SCENE)
    except (PerceptionError, ModuleNotFoundError) as error:  # both say what to try
        raise SystemExit(f"tree_inventory: {error}") from error
