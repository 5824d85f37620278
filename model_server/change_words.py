"""What is said of a change: how much, in how many places, and where most of it lies.

Shared by both sides of the wire, as `relations` is: the tools word a caption with it, the evaluation holds what was
worded against labels. Needs the standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass

Corners = tuple[float, float, float, float]


@dataclass(frozen=True)
class ChangeFacts:
    """`regions`: connected ones, at least one; `share`: of what both images show; `largest`: the share of the largest
    in the whole change; `place`: where the middle of its box lies."""

    regions: int
    share: float
    largest: float
    place: str

    def said(self, ground: str = "") -> str:
        """In words; `ground`: the area on Earth, where it is known."""
        how_many = "One region" if self.regions == 1 else f"{self.regions} regions"
        text = f"{how_many} changed: {self.share:.2%} of what both images show{f', {ground}' if ground else ''}."
        if self.regions == 1:
            return f"{text} It lies in the {self.place}."
        return f"{text} The largest, {self.largest:.0%} of the change, lies in the {self.place}."


def place_in(region: Corners, whole: Corners) -> str:
    """Which ninth of the whole the region's centre lies in: "upper left", "centre"."""
    x = (region[0] + region[2] - 2 * whole[0]) / (2 * (whole[2] - whole[0]))
    y = (region[1] + region[3] - 2 * whole[1]) / (2 * (whole[3] - whole[1]))
    row = "upper" if y < 1 / 3 else "lower" if y > 2 / 3 else ""
    column = "left" if x < 1 / 3 else "right" if x > 2 / 3 else ""
    if row and column:
        return f"{row} {column}"
    return f"{row} part" if row else f"{column} part" if column else "centre"
