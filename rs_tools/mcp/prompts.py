"""Prompts for common analyses: which tools to call in which order, and what to say of what they cannot know."""

from __future__ import annotations

from typing import Annotated, Any

from mcp import MCPError
from mcp.server import MCPServer
from mcp.server.context import CallNext, HandlerResult, ServerRequestContext
from mcp.types import INVALID_PARAMS
from pydantic import Field, ValidationError

from rs_tools.tools import Tools

IMAGE_ARGUMENTS = frozenset({"image", "before", "after", "earlier"})
CLASS_ARGUMENTS = frozenset({"thing", "exposed"})

Before = Annotated[str, Field(description="Path of the image from before")]
After = Annotated[str, Field(description="Path of the image from after, of the same place")]

_REPORT = """\
Give every figure with its unit, its score or confidence, and the warnings that came with it; link the files. Say what \
the images cannot show, and what a person should look at. Figures come from a model: state them as estimates."""


def add_prompts(server: MCPServer[Tools]) -> None:
    """Offer the three analyses."""
    server.prompt(
        title="Damage after a flood",
        description="Where the water stands now and did not before, and what stands in it",
    )(flood_damage)
    server.prompt(
        title="Activity of a port", description="Which ships lie where, and how that differs from an earlier day"
    )(port_activity)
    server.prompt(
        title="Urban growth", description="How far the built-up area grew between two dates, and what it grew over"
    )(urban_growth)


async def told_why(ctx: ServerRequestContext[Any, Any], call_next: CallNext) -> HandlerResult:
    """Middleware: a prompt that does not exist or lacks an argument is told as such, not as a fault of the server."""
    try:
        return await call_next(ctx)
    except ValueError as error:
        if ctx.method != "prompts/get" or isinstance(error, ValidationError):
            raise
        raise MCPError(INVALID_PARAMS, str(error)) from error


def flood_damage(
    before: Before,
    after: After,
    exposed: Annotated[str, Field(description="What may be hit, such as building or car")] = "building",
) -> str:
    return f"""\
Assess the damage after a flood. Image before: {before!r}. Image after: {after!r}. What may be hit: {exposed!r}.

1. inspect_image on both: are they of the same place, kind and metres per pixel? If not, say so and go no further.
2. segment on both with classes ["water"]: the area of water before and after, and the difference. Water that was \
there before is no flood.
3. detect_change from before to after: the largest changed regions, and how much of the two overlaps.
4. For each of the five largest regions: ground {exposed!r} in the after image with the region's bbox_px as region, \
where both images have one grid; then vqa with the box of what was found, "Is there water?", to see whether it is hit.
5. Report: flooded area, what stands in the water and where (lon, lat), what was hit with certainty and what only \
perhaps. {_REPORT}"""


def port_activity(
    image: Annotated[str, Field(description="Path of the image of the port")],
    thing: Annotated[str, Field(description="What to count, such as ship")] = "ship",
    earlier: Annotated[str, Field(description="Path of an image of the same port on an earlier day, if any")] = "",
) -> str:
    then = (
        f"5. The same on the earlier image {earlier!r}, and detect_change from it to {image!r}: what came, what left, "
        "and whether quays or stores changed."
        if earlier
        else "5. There is no earlier image: say nothing of a trend."
    )
    return f"""\
Describe the activity of a port. Image: {image!r}. What to count: {thing!r}.

1. inspect_image: how many metres is a pixel? A thing of fewer than about 8 pixels is hard to find; say so.
2. caption: does the image show a port at all?
3. ground {thing!r} with preview: the count, and each one's size from its box and the metres per pixel.
4. For the five largest and for those with the lowest scores: vqa with their bbox_px as region, "Is there a {thing}?", \
and whether it lies at a quay or at sea.
{then}
6. Report: how many and of what size, how many at quays and how many at anchor, and how sure each is. {_REPORT}"""


def urban_growth(before: Before, after: After) -> str:
    return f"""\
Measure urban growth between two dates. Image before: {before!r}. Image after: {after!r}.

1. inspect_image on both: are they of the same place, kind, season and metres per pixel? Differences of season or \
light look like change; say so.
2. detect_change from before to after: the changed share and area, and the regions.
3. ground "building" on both: how many there are before and after. segment with classes ["road", "forest", "water"] on \
both: what was built over.
4. For each of the five largest changed regions: caption and classify on both images with the region's bbox_px as \
region, where both have one grid: what was it, what is it now? Drop those that are not building.
5. Report: the area that was built over, buildings before and after, what they replaced, and where (lon, lat). \
{_REPORT}"""
