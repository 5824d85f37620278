"""The configurations of MCP clients on this machine, where they name our server."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from rs_tools.doctor.findings import Finding, Setup

# Relative to the user's home.
_OF_USER = {
    "Claude Desktop": (
        "Library/Application Support/Claude/claude_desktop_config.json",
        ".config/Claude/claude_desktop_config.json",
        "AppData/Roaming/Claude/claude_desktop_config.json",
    ),
    "Claude Code": (".claude.json",),
    "VS Code": (
        "Library/Application Support/Code/User/mcp.json",
        ".config/Code/User/mcp.json",
        "AppData/Roaming/Code/User/mcp.json",
    ),
    "Cursor": (".cursor/mcp.json",),
}
# Relative to the working folder.
_OF_PROJECT = {"Claude Code": ".mcp.json", "VS Code": ".vscode/mcp.json", "Cursor": ".cursor/mcp.json"}
_COMMENT = re.compile(r'("(?:[^"\\]|\\.)*")|//[^\n]*|/\*.*?\*/', re.DOTALL)
_LAST_COMMA = re.compile(r'("(?:[^"\\]|\\.)*")|,(?=\s*[}\]])')


def configurations(setup: Setup) -> Iterator[Finding]:
    """Whether what clients are told to start can be started, and may read folders that exist."""
    files = [(client, setup.home / name) for client, names in _OF_USER.items() for name in names]
    files += [(client, setup.folder / name) for client, name in _OF_PROJECT.items()]
    found = [finding for client, file in dict.fromkeys(files) for finding in _file(client, file)]
    yield from found or [Finding("clients", "ok", "no configuration of a client on this machine names rs-mcp yet")]


def _file(client: str, file: Path) -> Iterator[Finding]:
    check = f"client {client}"
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, UnicodeDecodeError) as error:
        yield Finding(check, "warning", f"{file} cannot be read: {error}", f"make {file} readable for you")
        return
    try:
        config = json.loads(_plain(text) if client == "VS Code" else text)
    except json.JSONDecodeError as error:
        if "rs-mcp" in text or "rs-perception" in text:
            found = f"{file} is not JSON: {error.msg} in line {error.lineno}, column {error.colno}"
            mend = "mend that place (often a comma too many or too few, or a single \\ in a Windows path)"
            yield Finding(check, "problem", found, mend)
        return
    for name, entry in _entries(config):
        if _is_ours(name, entry):
            yield _entry(check, f"{name!r} in {file}", entry)


def _plain(text: str) -> str:
    """VS Code's JSON without its comments and last commas."""
    return _LAST_COMMA.sub(lambda m: m[1] or "", _COMMENT.sub(lambda m: m[1] or "", text))


def _entries(config: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every server of a configuration, also those that Claude Code keeps for one project."""
    if not isinstance(config, dict):
        return
    for key in ("mcpServers", "servers"):
        servers = config.get(key)
        for name, entry in servers.items() if isinstance(servers, dict) else ():
            if isinstance(entry, dict):
                yield name, entry
    projects = config.get("projects")
    for project in projects.values() if isinstance(projects, dict) else ():
        yield from _entries(project)


def _is_ours(name: str, entry: dict[str, Any]) -> bool:
    words = [name, str(entry.get("command", "")), *map(str, entry.get("args") or [])]
    return any(re.search(r"rs-mcp|rs-perception|mcp_server", word) for word in words)


def _entry(check: str, where: str, entry: dict[str, Any]) -> Finding:
    command = entry.get("command")
    if command is None and "url" in entry:
        return Finding(check, "ok", f"{where} leads to {entry['url']}")
    own = shutil.which("rs-mcp") or "/path/to/.venv/bin/rs-mcp"
    if not isinstance(command, str) or not command.strip():
        return Finding(check, "problem", f"{where} has no command", f'write "command": "{own}"')
    if command.startswith("~"):
        found = f"{where} names {command}, and clients do not know what ~ means"
        return Finding(check, "problem", found, f'write "command": "{own}"')
    resolved = shutil.which(command)
    if resolved is None:
        absent = "is not an executable file" if os.sep in command else "is not on PATH"
        return Finding(check, "problem", f"{where} names {command}, which {absent}", f'write "command": "{own}"')
    if wrong := _wrong_roots(entry.get("args") or []):
        return Finding(check, "problem", f"{where}: {wrong}", 'write "args": ["--root", "/a/folder/that/exists"]')
    if os.sep not in command:
        found = f"{where} names {command} without its path; applications started from the desktop often do not find it"
        return Finding(check, "warning", found, f'write "command": "{resolved}"')
    return Finding(check, "ok", f"{where} starts {command}")


def _wrong_roots(arguments: list[Any]) -> str:
    words = [str(one) for one in arguments]
    named = [after for before, after in pairwise(words) if before == "--root"]
    named += [word.removeprefix("--root=") for word in words if word.startswith("--root=")]
    missing = [root for root in named if not Path(root).expanduser().is_dir()]
    if missing:
        return f"its --root {', '.join(missing)} is no folder"
    return "" if named else "it names no --root, so nothing could be read"
