"""The Ray cluster that replicas run on: one that is there, or one of this process's own."""

from __future__ import annotations

import logging
import os
import secrets

from model_server.protocol import MAX_BODY_BYTES

NAMESPACE = "rs-perception"
STORE_BYTES = 4 * MAX_BODY_BYTES  # of Ray's own store: twice the bodies that the door holds

ALWAYS = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is reported to anyone
    "RAY_ENABLE_AUTO_CONNECT": "0",  # what still asks Ray when it has been left would start another
    "RAY_DEDUP_LOGS": "0",  # lines that look alike are calls of their own
    "RAY_worker_niceness": "0",  # Ray's workers step back behind everything else otherwise
}


def connect(address: str | None) -> None:
    """Join the cluster at an address, or start one on this machine, which ends with this process.

    Before Ray is imported, since it reads its environment then, and in the main thread. What the environment says
    already holds. Raises ConnectionError where no cluster answers.
    """
    for name, value in ALWAYS.items():
        os.environ.setdefault(name, value)
    if address is None:
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # as there: listen on loopback
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # other users of this machine have no business in it
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    import ray  # pyright: ignore[reportMissingImports] (of an extra)

    if address is not None:
        ray.init(address=address, namespace=NAMESPACE, logging_level=logging.WARNING)
        return
    ray.init(
        address="local",
        namespace=NAMESPACE,
        include_dashboard=False,
        object_store_memory=STORE_BYTES,
        logging_level=logging.WARNING,
    )
