"""Which addresses are of this machine alone."""

from __future__ import annotations

import ipaddress


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`, a name or an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False  # some other name: it may lead anywhere


def is_any(host: str) -> bool:
    """Whether `host` stands for every address of this machine."""
    return host in ("0.0.0.0", "::", "[::]", "")
