"""What the doctor finds in the configurations of MCP clients."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from examining import SCENES, only

from rs_tools.doctor import Setup, clients


def configured(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


@pytest.mark.parametrize(
    ("entry", "status", "said"),
    [
        ({"command": sys.executable, "args": ["-m", "mcp_server", "--root", str(SCENES)]}, "ok", sys.executable),
        ({"command": "/gone/bin/rs-mcp", "args": ["--root", str(SCENES)]}, "problem", "not an executable file"),
        ({"command": "rs-mcp-of-nobody", "args": ["--root", str(SCENES)]}, "problem", "not on PATH"),
        ({"command": "~/venv/bin/rs-mcp", "args": ["--root", str(SCENES)]}, "problem", "~"),
        ({"command": "sh", "args": ["rs-mcp", "--root", str(SCENES)]}, "warning", "without its path"),
        ({"command": sys.executable, "args": ["--root=/nowhere"]}, "problem", "/nowhere is no folder"),
        ({"command": sys.executable, "args": []}, "problem", "no --root"),
        ({"args": []}, "problem", "no command"),
        ({"url": "http://127.0.0.1:8000/mcp"}, "ok", "leads to"),
    ],
)
def test_what_a_client_is_told_to_start_must_be_there(
    setup: Setup, entry: dict[str, object], status: str, said: str
) -> None:
    configured(setup.home / ".cursor" / "mcp.json", json.dumps({"mcpServers": {"rs-perception": entry}}))
    finding = only(clients.configurations, setup)
    assert (finding.check, finding.status) == ("client Cursor", status)
    assert said in finding.found


def test_every_client_is_looked_for_where_it_keeps_its_configuration(setup: Setup) -> None:
    bad = {"rs-perception": {"command": "/gone"}}
    servers = json.dumps({"mcpServers": bad})
    configured(setup.home / ".config/Claude/claude_desktop_config.json", servers)
    configured(setup.home / ".claude.json", json.dumps({"projects": {"/p": {"mcpServers": bad}}}))
    configured(setup.folder / ".mcp.json", servers)
    configured(setup.folder / ".vscode/mcp.json", f'{{\n // ours\n "servers": {json.dumps(bad)},\n}}')
    found = list(clients.configurations(setup))
    assert sorted(one.check for one in found) == [
        "client Claude Code", "client Claude Code", "client Claude Desktop", "client VS Code",
    ]  # fmt: skip
    assert {one.status for one in found} == {"problem"}


def test_a_configuration_that_is_not_json_is_named_with_the_place_of_the_fault(setup: Setup) -> None:
    configured(setup.folder / ".mcp.json", '{"mcpServers": {\n"rs-mcp": {},\n}}')
    finding = only(clients.configurations, setup)
    assert finding.status == "problem"
    assert "line 3" in finding.found


def test_configurations_of_other_servers_are_no_business_of_ours(setup: Setup) -> None:
    configured(setup.folder / ".mcp.json", '{"mcpServers": {"weather": {"command": "/gone"}}}')
    configured(setup.home / ".cursor" / "mcp.json", "{ not json")
    finding = only(clients.configurations, setup)
    assert finding.status == "ok"
    assert "yet" in finding.found
