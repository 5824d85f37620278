"""The project around the code: what it installs, what it bundles and what its documents promise."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import rasterio
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = {
    canonicalize_name(Requirement(line).name): Requirement(line)
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
}
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SCENES = sorted(path for path in (ROOT / "examples" / "data").iterdir() if path.suffix in (".tif", ".jpg"))


def test_everything_that_make_installs_is_pinned_within_what_the_project_allows() -> None:
    extras = PROJECT["optional-dependencies"]
    for text in [*PROJECT["dependencies"], *extras["server"], *extras["dev"]]:
        wanted = Requirement(text)
        if wanted.name == PROJECT["name"]:
            continue
        (pin,) = PINS[canonicalize_name(wanted.name)].specifier
        assert pin.operator == "=="
        assert wanted.specifier.contains(pin.version), f"{wanted} is pinned to {pin.version}"


def test_the_light_core_does_not_ask_for_torch() -> None:
    assert not {"torch", "tokenizers", "transformers"} & {Requirement(one).name for one in PROJECT["dependencies"]}


def test_no_module_of_the_tools_loads_torch() -> None:
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in (ROOT / "rs_tools").rglob("*.py")]
    code = (
        f"import sys, importlib; [importlib.import_module(name) for name in {modules!r}]; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "False"


def test_bundled_scenes_are_few_small_and_sourced() -> None:
    sources = (ROOT / "examples" / "data" / "SOURCES.md").read_text()
    assert len(SCENES) >= 3
    assert sum(path.stat().st_size for path in SCENES) < 3_000_000
    for path in SCENES:
        assert f"`{path.name}`" in sources


@pytest.mark.parametrize("path", [path for path in SCENES if path.suffix == ".tif"], ids=lambda path: path.stem)
def test_a_bundled_geotiff_lies_where_its_sources_say(path: Path) -> None:
    sources = (ROOT / "examples" / "data" / "SOURCES.md").read_text()
    (row,) = [line for line in sources.splitlines() if line.startswith(f"| `{path.name}`")]
    with rasterio.open(path) as scene:
        assert scene.crs is not None
        assert f"EPSG:{scene.crs.to_epsg()}" in row
        assert f"{scene.width} x {scene.height}" in row
        assert scene.dtypes[0] in row


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_in_the_documents_lead_to_files_that_exist(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), target


def test_commands_named_in_the_readme_exist() -> None:
    readme = (ROOT / "README.md").read_text()
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"\bmake ([a-z]+)", readme)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for script in set(re.findall(r"\brs-(?:mcp|tools|model-server)\b", readme)):
        assert script in PROJECT["scripts"]
