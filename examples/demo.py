"""Start the MCP server as any client would, ask every tool about real scenes, and write a report to out/demo/.

python examples/demo.py             the bundled scenes
python examples/demo.py IMAGE       an image of your own
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mcp import Client
from mcp.client.stdio import StdioServerParameters
from mcp.types import TextContent
from report import Call, Section, Session, write_report

HERE = Path(__file__).resolve().parent
OUT = HERE.parent / "out" / "demo"


@dataclass(frozen=True)
class Scene:
    """An image and what to ask about it: questions, labels to choose from, things to find and classes to map.

    `regions` name parts worth a closer look, as [x1, y1, x2, y2] in pixels.
    """

    image: Path
    title: str
    questions: tuple[str, ...]
    labels: tuple[str, ...] = ()
    things: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    regions: dict[str, list[int]] = field(default_factory=dict)


DATA = HERE / "data"
BUNDLED = (
    Scene(
        DATA / "itaipu_landsat8.tif",
        "Itaipu dam, Paraguay and Brazil: Landsat 8, 30 m, 16 bit",
        ("Is there water in this image?", "Are there buildings?"),
        ("reservoir", "desert", "airport", "snow"),
        classes=("water", "forest"),
        regions={"the reservoir": [230, 20, 390, 180], "the city": [210, 430, 370, 560]},
    ),
    Scene(
        DATA / "raleigh_landsat7.tif",
        "Raleigh, North Carolina: Landsat 7, 28.5 m, float32 with nodata edges",
        ("Are there roads?", "Is it a rural or an urban area?"),
        ("city", "sea", "mountain", "desert"),
        classes=("forest",),
        regions={"the city centre": [370, 60, 470, 160]},
    ),
    Scene(
        DATA / "ordway_swisher_neon.tif",
        "Pine savanna, Florida: aerial, 10 cm",
        ("Are there trees?", "Is there a road?", "Are there cars?"),
        ("sparse trees on bare ground", "parking lot", "harbor", "farmland"),
        things=("tree", "car"),
    ),
    Scene(
        DATA / "yellowstone_road.jpg",
        "A road in Yellowstone: aerial, no georeference",
        ("Is there a road?", "Are there buildings?", "What is the theme of this picture?"),
        ("road through forest", "beach", "runway", "residential area"),
        things=("car",),
        classes=("road",),
    ),
)


def own_scene(image: Path) -> Scene:
    questions = ("Is there water?", "Are there buildings?", "Are there roads?", "Is it a rural or an urban area?")
    labels = ("city", "farmland", "forest", "water", "bare land")
    return Scene(image, image.name, questions, labels, ("building", "car", "ship"), ("water", "forest", "road"))


class Asker:
    """Calls tools and keeps what was asked, what came back and how long it took."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def ask(self, tool: str, **arguments: Any) -> Call:
        told = {name: value for name, value in arguments.items() if name not in ("image", "before", "after", "preview")}
        print(f"  {tool} {json.dumps(told)}")

        async def heard(progress: float, total: float | None, message: str | None) -> None:
            print(f"    {message}")

        started = time.perf_counter()
        result = await self._client.call_tool(tool, arguments, progress_callback=heard)
        seconds = time.perf_counter() - started
        text = "\n".join(block.text for block in result.content if isinstance(block, TextContent))
        print(f"    -> {text.splitlines()[0]}  [{seconds:.2f} s]")
        return Call(tool, arguments, text, result.structured_content or {}, result.is_error, seconds)


async def look_at(asker: Asker, scene: Scene) -> Section:
    image = str(scene.image)
    print(f"\n{scene.title}")
    inspected = await asker.ask("inspect_image", image=image)
    if inspected.is_error:
        raise SystemExit(f"demo: {inspected.text}")
    calls = [
        await asker.ask("caption", image=image),
        await asker.ask("classify", image=image, top_k=3),
    ]
    calls += [await asker.ask("vqa", image=image, question=question) for question in scene.questions]
    if scene.labels:
        calls.append(await asker.ask("classify", image=image, labels=list(scene.labels)))
    calls += [await asker.ask("ground", image=image, query=thing, preview=True) for thing in scene.things]
    if scene.classes:
        calls.append(await asker.ask("segment", image=image, classes=list(scene.classes), preview=True))
    for region in scene.regions.values():
        calls.append(await asker.ask("caption", image=image, region=region))
        calls.append(await asker.ask("classify", image=image, region=region, top_k=3))
    return Section(scene.title, scene.image, inspected, calls, scene.regions)


async def refusals(asker: Asker, scene: Scene, folder: Path) -> list[Call]:
    """What an agent is told when it asks for the impossible."""
    print("\nErrors, as an agent sees them")
    text_file = folder / "notes.tif"
    text_file.write_text("This is a text file with the name of a raster.\n")
    truncated = folder / "truncated.tif"
    truncated.write_bytes((DATA / "itaipu_landsat8.tif").read_bytes()[:400_000])
    image = str(scene.image)
    return [
        await asker.ask("caption", image="no_such_scene.tif"),
        await asker.ask("caption", image="/etc/passwd"),
        await asker.ask("inspect_image", image=str(text_file)),
        await asker.ask("caption", image=str(truncated)),
        await asker.ask("caption", image=image, region=[100_000, 0, 100_100, 100]),
        await asker.ask("vqa", image=image, question=" "),
        await asker.ask("caption", image=image, bbox=[0, 0, 10, 10]),
    ]


async def demonstrate(scenes: tuple[Scene, ...]) -> Path:
    roots = list(dict.fromkeys(str(scene.image.parent) for scene in scenes))
    with tempfile.TemporaryDirectory() as folder:
        arguments = [part for root in [*roots, folder] for part in ("--root", root)]
        command = str(Path(sys.executable).with_name("rs-mcp"))
        print("$", command, *arguments)
        started = time.perf_counter()
        async with Client(StdioServerParameters(command=command, args=arguments)) as client:
            tools = (await client.list_tools()).tools
            listed_s = time.perf_counter() - started
            server = client.server_info
            name = f"{server.name} {server.version}" if server else "unknown"
            print(f"{name}, MCP {client.protocol_version}: {', '.join(t.name for t in tools)}  [{listed_s:.2f} s]")
            asker = Asker(client)
            listing = await asker.ask("list_images")
            sections = [await look_at(asker, scene) for scene in scenes]
            print("\nChange between two images of one place: here an image and itself, so there is none")
            image = str(scenes[0].image)
            sections[0].calls.append(await asker.ask("detect_change", before=image, after=image, preview=True))
            errors = await refusals(asker, scenes[0], Path(folder))
            last = await asker.ask("caption", image=str(scenes[0].image))
            if last.is_error:
                raise SystemExit(f"demo: the server did not go on serving after the refused calls: {last.text}")
            session = Session(
                server=name,
                protocol=client.protocol_version,
                command=" ".join(["rs-mcp", *arguments[: 2 * len(roots)]]),
                listed_s=listed_s,
                tools=[(tool.name, tool.title or "", tool.description or "") for tool in tools],
                listing=listing,
                again=last,
            )
    return write_report(OUT, session, sections, errors)


def main() -> None:
    match sys.argv[1:]:
        case []:
            scenes = BUNDLED
        case [name]:
            image = Path(name).expanduser().resolve()
            if not image.is_file():
                raise SystemExit(f"demo: there is no file {image}")
            scenes = (own_scene(image),)
        case _:
            raise SystemExit("usage: python examples/demo.py [IMAGE]")
    print(f"\nReport: {asyncio.run(demonstrate(scenes))}")


if __name__ == "__main__":
    main()
