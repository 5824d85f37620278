"""Pack the project into an MCP bundle, which Claude Desktop and other clients install by a double click.

python clients/mcpb/pack.py [OUT]       default: out/rs-perception.mcpb
"""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SINGLE = ("pyproject.toml", "README.md", "LICENSE", "mcp_server.py")  # what an installation needs beside the packages
PACKAGES = ("rs_tools", "model_server")


def contents() -> Iterator[tuple[Path, str]]:
    """Every file of the bundle and its name in it."""
    yield HERE / "manifest.json", "manifest.json"
    for name in SINGLE:
        yield ROOT / name, name
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*")):
            if file.is_file() and "__pycache__" not in file.parts:
                yield file, file.relative_to(ROOT).as_posix()


def pack(out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as bundle:
        for file, name in contents():
            # Weights hardly shrink.
            kind = zipfile.ZIP_STORED if file.suffix == ".safetensors" else zipfile.ZIP_DEFLATED
            bundle.write(file, name, kind)


def main() -> None:
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "out" / "rs-perception.mcpb"
    pack(out)
    print(f"{out}: {out.stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
