"""What the tests of the doctor share."""

from __future__ import annotations

from pathlib import Path

from rs_tools.doctor import Check, Finding, Setup

SCENES = Path(__file__).parents[2] / "examples" / "data"


def only(check: Check, setup: Setup) -> Finding:
    """The one finding of a check."""
    [finding] = check(setup)
    return finding


def module(folder: Path, name: str, text: str) -> None:
    """Write a module of Python."""
    (folder / f"{name}.py").write_text(text + "\n")
