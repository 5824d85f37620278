"""Ports, proxies and certificates."""

from __future__ import annotations

import os
import socket
import ssl
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.request import getproxies, proxy_bypass

from rs_tools.doctor.findings import Finding, Setup

LOOPBACK = ("127.0.0.1", "localhost")


def ports(setup: Setup) -> Iterator[Finding]:
    """Whether the servers' usual ports are free. The local model server takes any free one and needs none of them."""
    for port, command in setup.ports:
        check = f"port {port}"
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
                probe.listen()
            except OSError as error:
                who = f"lsof -i :{port}" if sys.platform == "darwin" else f"ss -ltnp 'sport = :{port}'"
                yield Finding(
                    check,
                    "warning",
                    f"taken ({error.strerror}); {command} would not start on it, unless that is what runs there",
                    f"see what has it with `{who}`, or give `{command}` another --port",
                )
                continue
        yield Finding(check, "ok", f"free for {command}")


def proxies(setup: Setup) -> Iterator[Finding]:
    """Whether a proxy would catch calls to servers on this machine."""
    named = {scheme: proxy for scheme, proxy in getproxies().items() if scheme in ("http", "https", "all")}
    shown = ", ".join(f"{scheme} {_without_password(proxy)}" for scheme, proxy in named.items())
    if not named:
        yield Finding("proxies", "ok", "none")
        return
    caught = [host for host in LOOPBACK if not proxy_bypass(host)] if named.keys() & {"http", "all"} else []
    if not caught:
        yield Finding("proxies", "ok", f"{shown}, not for this machine; https images are fetched without a proxy")
        return
    yield Finding(
        "proxies",
        "warning",
        f"{shown} would also catch calls of your client to an rs-mcp --http on {' and '.join(caught)}",
        "export NO_PROXY=localhost,127.0.0.1,::1, also where your client gets its environment from",
    )


def _without_password(proxy: str) -> str:
    head, at, tail = proxy.rpartition("@")
    return f"{head.partition('://')[0]}://...@{tail}" if at else proxy


def certificates(setup: Setup) -> Iterator[Finding]:
    """Whether there are certificates to check https images with."""
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
        value = os.environ.get(name)
        if value and not Path(value).exists():
            found = f"{name} leads to {value}, which does not exist"
            yield Finding("certificates", "problem", found, f"unset {name}, or set it to what exists")
            return
    try:
        import httpcore

        trusted = httpcore.default_ssl_context().cert_store_stats()["x509_ca"]
    except (ImportError, OSError, ssl.SSLError) as error:
        mend = f"{sys.executable} -m pip install --force-reinstall certifi httpcore"
        yield Finding("certificates", "problem", f"none can be loaded: {error}", mend)
        return
    yield Finding("certificates", "ok", f"{trusted} authorities are trusted for https images")
