"""The demo's report: one HTML file that needs nothing else, beside the pictures and the raw answers."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from rs_tools.imagery.access import AccessPolicy
from rs_tools.imagery.scene import Scene

STYLE = (Path(__file__).parent / "report.css").read_text()
PICTURE_SIDE = 900
REGION_COLOURS = ("#ffd166", "#06d6a0", "#ef476f", "#118ab2")


@dataclass(frozen=True)
class Call:
    """One tool call: what was asked and what came back over the wire."""

    tool: str
    arguments: dict[str, Any]
    text: str
    structured: dict[str, Any]
    is_error: bool
    seconds: float


@dataclass(frozen=True)
class Section:
    """A scene, its inspection and everything that was asked about it."""

    title: str
    image: Path
    inspected: Call
    calls: list[Call]
    regions: dict[str, list[int]]


@dataclass(frozen=True)
class Session:
    """The MCP session as a whole. `tools` are (name, title, description)."""

    server: str
    protocol: str
    command: str
    listed_s: float
    tools: list[tuple[str, str, str]]
    listing: Call
    again: Call


def write_report(out: Path, session: Session, sections: list[Section], errors: list[Call]) -> Path:
    """Write index.html, a PNG for each scene and answers.json to `out`; return the path of the HTML file."""
    out.mkdir(parents=True, exist_ok=True)
    body = [_head(session, sections)]
    for section in sections:
        png = out / f"{section.image.stem}.png"
        _picture(section.image).save(png, optimize=True)
        body.append(_scene(section, png))
    body += [_errors(errors), _session(session)]
    page = out / "index.html"
    page.write_text(_page("\n".join(body)), encoding="utf-8")
    answers = {
        "session": asdict(session),
        "scenes": [asdict(s) for s in sections],
        "errors": [asdict(e) for e in errors],
    }
    (out / "answers.json").write_text(json.dumps(answers, indent=1, default=str), encoding="utf-8")
    return page


def _picture(path: Path) -> Image.Image:
    """The scene with the bands and the stretch that the model saw; missing pixels are transparent."""
    scene = Scene.open(AccessPolicy([path.parent]), str(path))
    scale = max(1.0, max(scene.width, scene.height) / PICTURE_SIDE)
    size = max(1, round(scene.width / scale)), max(1, round(scene.height / scale))
    rgb, valid = scene.read(scene.region([]), size)
    picture = Image.fromarray(rgb)
    picture.putalpha(Image.fromarray(valid.astype("uint8") * 255))
    return picture


def _page(body: str) -> str:
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>rs-perception demo</title><style>{STYLE}</style></head><body><main>\n{body}\n</main></body></html>\n"
    )


def _head(session: Session, sections: list[Section]) -> str:
    model = next((p for s in sections for c in s.calls if (p := c.structured.get("provenance", {})).get("model")), {})
    first = sections[0].calls[0]
    warm = sorted(call.seconds for section in sections for call in section.calls[1:] if not call.is_error)
    facts = [
        ("tools/list after process start", f"{session.listed_s:.2f} s"),
        ("first answer; starts the model if none runs", f"{first.seconds:.2f} s"),
        ("later answers, median of " + str(len(warm)), f"{warm[len(warm) // 2]:.2f} s" if warm else "none"),
        ("model", f"{model.get('model', 'none')} {str(model.get('weights_digest', ''))[:12]}"),
        ("precision", f"{model.get('precision', '')} {model.get('attention_backend', '')}"),
    ]
    tiles = "".join(f"<div><b>{_e(value)}</b><span>{_e(name)}</span></div>" for name, value in facts)
    links = " ".join(f'<a href="#{_e(s.image.stem)}">{_e(s.title.split(":")[0])}</a>' for s in sections)
    return (
        "<header><h1>What the tools see</h1>"
        f"<p>Every answer below came over the Model Context Protocol from <code>{_e(session.command)}</code>, "
        f"started for this report as an agent's client would start it.</p>"
        f'<div class="tiles">{tiles}</div><nav>{links} <a href="#errors">Errors</a> '
        '<a href="#session">Session</a></nav></header>'
    )


def _scene(section: Section, png: Path) -> str:
    facts, shared = section.inspected.structured, _shared(section)
    boxes = "".join(
        _box(region, facts, colour, name)
        for (name, region), colour in zip(section.regions.items(), REGION_COLOURS * 4, strict=False)
    )
    whole = [call for call in section.calls if not call.arguments.get("region")]
    parts = [
        f'<h3><i style="background:{colour}"></i>A closer look: {_e(name)} '
        f"<small>{_e(region)}</small></h3>"
        + _answers((call for call in section.calls if call.arguments.get("region") == region), shared)
        for (name, region), colour in zip(section.regions.items(), REGION_COLOURS * 4, strict=False)
    ]
    encoded = base64.b64encode(png.read_bytes()).decode()
    return (
        f'<section id="{_e(section.image.stem)}"><h2>{_e(section.title)}</h2><div class="scene"><div class="left">'
        f'<figure><img alt="{_e(section.title)}" src="data:image/png;base64,{encoded}">{boxes}</figure>'
        f"{_facts(facts)}{_warnings(shared)}</div><div>{_answers(whole, shared)}{''.join(parts)}</div></div></section>"
    )


def _box(region: list[int], facts: dict[str, Any], colour: str, name: str) -> str:
    x1, y1, x2, y2 = region
    width, height = facts["width"], facts["height"]
    place = f"left:{x1 / width:.2%};top:{y1 / height:.2%};width:{(x2 - x1) / width:.2%};height:{(y2 - y1) / height:.2%}"
    return f'<div class="box" style="{place};border-color:{colour}" title="{_e(name)}"></div>'


def _facts(facts: dict[str, Any]) -> str:
    rows = [
        ("size", f"{facts['width']} x {facts['height']} px, {facts['band_count']} x {facts['dtype']}"),
        ("bands", ", ".join(band["description"] or band["color"] for band in facts["bands"])),
        ("nodata", facts["nodata"] if facts["nodata"] is not None else "none declared"),
        ("CRS", f"EPSG:{facts['epsg']}" if facts["epsg"] else "without EPSG code" if facts["crs_wkt"] else "none"),
        ("pixel", f"{facts['gsd_m']:.3g} m" if facts["gsd_m"] else "unknown"),
        ("modality", f"{facts['modality']} ({facts['modality_reason']})"),
    ]
    if facts["bounds_wgs84"]:
        west, south, east, north = facts["bounds_wgs84"]
        centre = f"{(south + north) / 2:.5f}/{(west + east) / 2:.5f}"
        rows.insert(4, ("west, south, east, north", f"{west:.5f}, {south:.5f}, {east:.5f}, {north:.5f}"))
        map_link = f'<p><a href="https://www.openstreetmap.org/#map=13/{centre}">this place on OpenStreetMap</a></p>'
    else:
        map_link = "<p>Not georeferenced: answers are in pixels, and no place is invented.</p>"
    table = "".join(f"<tr><th>{_e(name)}</th><td>{_e(value)}</td></tr>" for name, value in rows)
    return f'<table class="facts">{table}</table>{map_link}'


def _answers(calls: Iterable[Call], shared: list[str]) -> str:
    return "".join(_answer(call, shared) for call in calls)


def _answer(call: Call, shared: list[str]) -> str:
    """One answer. Warnings in `shared` hold for the whole scene and stand beside its facts."""
    if call.is_error:
        return f'<article class="refused">{_asked(call)}<p>{_e(call.text)}</p></article>'
    words = {"caption": _caption, "vqa": _vqa, "classify": _classes}
    shown = words[call.tool](call.structured) if call.tool in words else _mapped(call)
    raw = _e(json.dumps(call.structured, indent=1))
    warnings = _warnings(one for one in call.structured["warnings"] if one not in shared)
    details = f"<details><summary>whole answer</summary><pre>{raw}</pre></details>"
    return f"<article>{_asked(call)}{shown}{warnings}{details}</article>"


def _asked(call: Call) -> str:
    arguments = {name: value for name, value in call.arguments.items() if name not in ("image", "region")}
    arguments = {name: value for name, value in arguments.items() if name not in ("before", "preview")}
    for name in ("labels", "classes"):
        if listed := arguments.pop(name, []):
            arguments["among" if name == "labels" else name] = ", ".join(listed)
    if "after" in arguments:
        arguments["after"] = Path(arguments["after"]).name
    words = arguments.pop("question", "") or arguments.pop("query", "")
    asked = words or ", ".join(f"{name}: {value}" for name, value in arguments.items())
    return f'<p class="asked"><code>{call.tool}</code> {_e(asked)} <span>{call.seconds:.2f} s</span></p>'


def _caption(answer: dict[str, Any]) -> str:
    parts = "".join(f"<li>{_e(part['region'])}: {_e(part['caption'])}</li>" for part in answer["parts"])
    listed = f"<details><summary>{len(answer['parts'])} parts</summary><ul>{parts}</ul></details>" if parts else ""
    return f'<p class="said">{_e(answer["caption"])}</p>{_bar("confidence", answer["confidence"])}{listed}'


def _vqa(answer: dict[str, Any]) -> str:
    unsure = ' <em class="unsure">not certain enough to rely on</em>' if answer["abstained"] else ""
    others = "".join(_bar(other["answer"], other["confidence"], faint=True) for other in answer["alternatives"][:2])
    return f'<p class="said">{_e(answer["answer"])}{unsure}</p>{_bar("confidence", answer["confidence"])}{others}'


def _classes(answer: dict[str, Any]) -> str:
    return f'<p class="said">{_e(answer["label"] or "no class: nothing to see")}</p>' + "".join(
        _bar(one["label"], one["score"], faint=index > 0) for index, one in enumerate(answer["top"])
    )


def _mapped(call: Call) -> str:
    """Boxes, masks and change: the answer in words, and its preview, whose file lives on this machine."""
    pictures = [Path(one["path"]) for one in call.structured["artifacts"] if one["kind"] == "preview"]
    shown = "".join(
        f'<img alt="{_e(call.tool)}" src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'
        for path in pictures
    )
    return f'<p class="said">{_e(call.text.splitlines()[0])}</p>{shown}'


def _bar(name: str, share: float, faint: bool = False) -> str:
    kind = "bar faint" if faint else "bar"
    filled = f'<i style="width:{share:.1%}"></i>'
    return f'<div class="{kind}"><span>{_e(name)}</span><div>{filled}</div><b>{share:.2f}</b></div>'


def _warnings(warnings: Iterable[str]) -> str:
    return "".join(f'<p class="warning">{_e(warning)}</p>' for warning in warnings)


def _shared(section: Section) -> list[str]:
    answers = [call.structured["warnings"] for call in section.calls if not call.is_error]
    return [one for one in answers[0] if all(one in warnings for warnings in answers)] if answers else []


def _errors(errors: list[Call]) -> str:
    rows = "".join(
        f"<tr><td><code>{_e(call.tool)}</code><br><small>{_e(_short(call.arguments))}</small></td>"
        f"<td>{_e(call.text)}</td></tr>"
        for call in errors
    )
    return (
        '<section id="errors"><h2>What an agent is told when something is wrong</h2>'
        "<p>The text on the right is all that the agent gets, so it says what was wrong, what is allowed and what to "
        f'try. The server went on serving after each.</p><table class="errors">{rows}</table></section>'
    )


def _short(arguments: dict[str, Any]) -> str:
    shown = dict(arguments)
    if len(str(shown.get("image", ""))) > 40:
        shown["image"] = ".../" + Path(shown["image"]).name
    return json.dumps(shown)


def _session(session: Session) -> str:
    tools = "".join(
        f"<tr><td><code>{_e(name)}</code><br><small>{_e(title)}</small></td><td>{_e(description)}</td></tr>"
        for name, title, description in session.tools
    )
    provenance = _e(json.dumps(session.again.structured.get("provenance", {}), indent=1))
    return (
        f'<section id="session"><h2>The session</h2><p>{_e(session.server)}, protocol {_e(session.protocol)}.</p>'
        f"<table>{tools}</table><h3>list_images</h3><pre>{_e(session.listing.text)}</pre>"
        f"<h3>What every answer carries</h3><pre>{provenance}</pre></section>"
    )


def _e(value: object) -> str:
    return html.escape(str(value))
