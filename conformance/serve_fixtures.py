"""Serve the product's server with the suite's fixtures over the product's HTTP: `serve_fixtures.py PORT`."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from fixtures import add_fixtures

from mcp_server import build_server
from rs_tools.imagery.access import AccessPolicy
from rs_tools.serving.http import HttpSettings, http_app, serve


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        policy = AccessPolicy([Path(folder)])
        server = build_server(policy)
        add_fixtures(server)
        settings = HttpSettings(port=int(sys.argv[1]))
        serve(http_app(server, settings, policy), settings)


if __name__ == "__main__":
    main()
