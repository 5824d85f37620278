"""Where this user's model servers leave their state and log, and the tools their files."""

from __future__ import annotations

import os
from pathlib import Path

from rs_tools.errors import AccessError


def user_folder() -> Path:
    """$RS_PERCEPTION_STATE, else a cache folder of the user; it may not exist yet.

    The cache folder and not the session's runtime folder: a desktop application and a login shell have different
    runtime folders, or none, and would not find each other's server.

    Raises:
        AccessError: this user has no home folder, and no other one is named.
    """
    try:
        if named := os.environ.get("RS_PERCEPTION_STATE"):
            return Path(named).expanduser().absolute()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rs-perception"
    except RuntimeError as error:
        raise AccessError("This user has no home folder: set RS_PERCEPTION_STATE to a folder that you own.") from error


def make_user_folder() -> Path:
    """`user_folder`, made where it is missing. Raises OSError.

    For this user alone, and so before any folder in it: made along with one, it would get what the umask leaves, and a
    folder that others may write is no place for the state of a server.
    """
    folder = user_folder()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def artifacts_folder() -> Path:
    """The folder of files of answers where none is named."""
    return user_folder() / "artifacts"
