"""Where this user's model servers leave their state and log, and the tools their files."""

from __future__ import annotations

import os
from pathlib import Path


def user_folder() -> Path:
    """$RS_PERCEPTION_STATE, else a cache folder of the user; it may not exist yet.

    The cache folder and not the session's runtime folder: a desktop application and a login shell have different
    runtime folders, or none, and would not find each other's server.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("RS_PERCEPTION_STATE") or cache / "rs-perception")


def artifacts_folder() -> Path:
    """The folder of files of answers where none is named."""
    return user_folder() / "artifacts"
