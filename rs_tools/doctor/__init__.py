"""`rs-tools doctor`: what a user can have wrong, and how to mend it.

Each check is a function from a `Setup` to findings. The checks need the standard library alone and try the rest in
processes of their own, so that they also run where the installation is what is broken: then
`python -m rs_tools.doctor` works when `rs-tools` does not. Nothing is changed and no server is started.
"""

from __future__ import annotations

from rs_tools.doctor import clients, files, installation, machine, network, server
from rs_tools.doctor.findings import Check, Finding, Report, Setup, Status

__all__ = ["CHECKS", "Check", "Finding", "Report", "Setup", "Status", "examine"]

CHECKS: tuple[Check, ...] = (
    installation.python,
    installation.packages,
    installation.extras,
    installation.torch,
    installation.start,
    installation.commands,
    files.raster_libraries,
    files.weights,
    files.roots,
    files.folders,
    server.local_server,
    server.remote_server,
    network.ports,
    network.proxies,
    network.certificates,
    clients.configurations,
    machine.memory,
    machine.cores,
)


def examine(setup: Setup, checks: tuple[Check, ...] = CHECKS) -> Report:
    """Make every check. Takes seconds: packages are imported in processes of their own."""
    return Report([finding for check in checks for finding in check(setup)])
