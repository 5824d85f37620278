"""What README and the bundle tell clients to start does start, and lists the tools."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from mcp import Client
from mcp.client.stdio import StdioServerParameters
from scripts import loaded

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
IMAGERY = ROOT / "examples" / "data"
BUNDLE = ROOT / "clients" / "mcpb"
MANIFEST = json.loads((BUNDLE / "manifest.json").read_text())
TOOLS = ["inspect_image", "list_images", "caption", "vqa", "ground", "segment", "detect_change", "classify"]
CLIENTS = {"Claude Desktop": "mcpServers", "Claude Code": "mcpServers", "VS Code": "servers", "Cursor": "mcpServers"}


def configuration(client: str) -> dict[str, Any]:
    """The server's entry in the JSON snippet that README gives for a client."""
    section = re.split(r"\n(?=\*\*|## )", README[README.index(f"**{client}**") :], maxsplit=1)[0]
    [snippet] = re.findall(r"```json\n(.*?)```", section, re.DOTALL)
    [(key, servers)] = json.loads(snippet).items()
    assert key == CLIENTS[client]
    [(name, entry)] = servers.items()
    assert name == "rs-perception"
    return entry


def placed(words: list[str]) -> list[str]:
    """A command line of README with the paths of this machine."""
    command = str(Path(sys.executable).with_name("rs-mcp"))
    places = {"/path/to/rs-perception/.venv/bin/rs-mcp": command, "/home/you/imagery": str(IMAGERY)}
    assert places.keys() <= set(words), words
    return [places.get(word, word) for word in words]


async def listed(command: list[str], **environment: str) -> list[str]:
    parameters = StdioServerParameters(command=command[0], args=command[1:], env=environment or None)
    async with Client(parameters) as client:
        return [tool.name for tool in (await client.list_tools()).tools]


@pytest.mark.parametrize("client", CLIENTS)
async def test_the_configuration_that_readme_gives_for_a_client_starts_a_server(client: str) -> None:
    entry = configuration(client)
    assert entry.get("type", "stdio") == "stdio"
    assert await listed(placed([entry["command"], *entry["args"]])) == TOOLS


async def test_the_command_that_readme_gives_for_claude_code_starts_a_server() -> None:
    [line] = re.findall(r"^claude mcp add .*$", README, re.MULTILINE)
    _, _, command = line.partition(" -- ")
    assert await listed(placed(shlex.split(command))) == TOOLS


def test_the_bundles_manifest_fits_its_schema_and_this_project() -> None:
    schema = json.loads((Path(__file__).parent / "schemas" / "mcpb-manifest-v0.4.schema.json").read_text())
    jsonschema.validate(MANIFEST, schema)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (MANIFEST["name"], MANIFEST["version"]) == (project["name"], project["version"])
    assert MANIFEST["license"] == project["license"]
    assert MANIFEST["compatibility"]["runtimes"]["python"] == project["requires-python"]
    assert [tool["name"] for tool in MANIFEST["tools"]] == TOOLS
    words = MANIFEST["server"]["mcp_config"]["args"]
    assert words[words.index("--extra") + 1] in project["optional-dependencies"]
    assert "rs-mcp" in project["scripts"]
    named = {word for arg in words for word in re.findall(r"\$\{user_config\.(\w+)}", arg)}
    assert named == MANIFEST["user_config"].keys()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle, packed and unpacked without its tensors."""
    packer = loaded(BUNDLE / "pack.py")
    folder = tmp_path_factory.mktemp("bundle")
    packer.pack(folder / "it.mcpb")
    with zipfile.ZipFile(folder / "it.mcpb") as packed:
        names = packed.namelist()
        assert "model_server/weights/nano/model.safetensors" in names
        packed.extractall(folder, [name for name in names if not name.endswith(".safetensors")])
    (folder / "it.mcpb").unlink()
    return folder


def test_the_bundle_holds_what_its_installation_needs_and_no_more(bundle: Path) -> None:
    assert json.loads((bundle / "manifest.json").read_text()) == MANIFEST
    project = tomllib.loads((bundle / "pyproject.toml").read_text())
    assert (bundle / project["project"]["readme"]).is_file()
    assert all((bundle / f"{module}.py").is_file() for module in project["tool"]["setuptools"]["py-modules"])
    assert not list(bundle.rglob("__pycache__"))
    assert not (bundle / "tests").exists()


def test_the_bundles_modules_are_its_own(bundle: Path) -> None:
    program = "import mcp_server, rs_tools, model_server; print(mcp_server.__file__, rs_tools.__file__)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", program],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(bundle), "PYTHONDONTWRITEBYTECODE": "1"},
        check=True,
    )
    assert done.stdout.split() == [str(bundle / "mcp_server.py"), str(bundle / "rs_tools" / "__init__.py")]


async def test_the_bundles_server_lists_the_tools(bundle: Path) -> None:
    # As uv would run it, but with the packages of these tests; PYTHONPATH comes before the checkout.
    config = MANIFEST["server"]["mcp_config"]
    values = {"${__dirname}": str(bundle), "${user_config.folder}": str(IMAGERY)}
    words = [values.get(word, word) for word in config["args"]]
    own = words[words.index("rs-mcp") + 1 :]
    command = [sys.executable, "-P", str(bundle / MANIFEST["server"]["entry_point"]), *own]
    assert await listed(command, PYTHONPATH=str(bundle), PYTHONDONTWRITEBYTECODE="1") == TOOLS
