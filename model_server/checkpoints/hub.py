"""Where a checkpoint lies: a folder on this machine, or a repository on the Hugging Face hub, fetched and pinned.

What was fetched is named by its commit, so that an answer's provenance says which weights made it even where the caller
named none or a branch.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from model_server.checkpoints.store import WeightsError

logger = logging.getLogger(__name__)

_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
# Tensors, configs and tokenizers; not training states, other frameworks' copies or example pictures.
_WANTED = ["*.json", "*.safetensors", "*.bin", "*.pt", "*.model", "*.txt", "*.jinja"]
_UNWANTED = ["*optimizer*", "*scheduler*", "*rng_state*", "training_args.bin", "*trainer_state*", "checkpoint-*/*"]


class CannotFetch(WeightsError):
    """A checkpoint on the hub could not be fetched; the message says why and what to try."""


@dataclass(frozen=True)
class Located:
    """A checkpoint's folder; label: what to call it in provenance, `owner/name@commit` where it was fetched."""

    folder: Path
    label: str | None = None


def locate(weights: str) -> Located:
    """The folder of `PATH` or `OWNER/NAME[@REVISION]`; a folder of that name comes first.

    Raises:
        WeightsError: there is no such folder and the name is no hub id.
        CannotFetch: the hub has no such repository or revision, keeps it back, or cannot be reached.
    """
    folder = Path(weights).expanduser()
    if folder.is_dir():
        return Located(folder)
    named = _HUB_ID.fullmatch(weights)
    if named is None:
        raise WeightsError(f"{weights} is no folder, and no id on the hub like owner/name or owner/name@revision")
    return fetch(named["repo"], named["revision"])


def fetch(repo: str, revision: str | None) -> Located:
    """Fetch a repository into the hub's cache, or find it there; None = the newest commit of its main branch.

    Raises:
        CannotFetch: as `locate`.
    """
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            GatedRepoError,
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )
    except ImportError as error:
        raise CannotFetch(
            f"{repo} is no folder; fetching it needs huggingface_hub; try: pip install 'rs-perception[hub]'"
        ) from error
    wanted = f"{repo}@{revision}" if revision else repo
    try:
        path = Path(snapshot_download(repo, revision=revision, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))
    except GatedRepoError as error:
        raise CannotFetch(f"{repo} is given out on request only: ask for it there, then `hf auth login`") from error
    except RevisionNotFoundError as error:
        raise CannotFetch(f"{repo} has no revision {revision!r}: name a commit, tag or branch of it") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise CannotFetch(f"there is no folder and no public repository {repo!r} on the hub") from error
    except LocalEntryNotFoundError as error:
        raise CannotFetch(
            f"{wanted} is no folder, not in the hub's cache, and the hub cannot be reached from here: fetch it on a "
            f"machine with a network (hf download {repo}) and give the folder"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise CannotFetch(f"{wanted} could not be fetched from the hub: {error}") from error
    label = f"{repo}@{path.name}"  # a snapshot's folder is named by its commit
    if revision != path.name:
        logger.info("fetched %s; pin it with --weights %s", wanted, label)
    return Located(path, label)


def companion(beside: Callable[[], Path], named: object) -> Path:
    """The folder of a part that a checkpoint names and may not hold: found by `beside`, else fetched by its hub id.

    Raises:
        WeightsError: neither; it says both reasons.
    """
    try:
        return beside()
    except WeightsError as missing:
        if not isinstance(named, str) or not _HUB_ID.fullmatch(named):
            raise
        try:
            found = locate(named)
        except WeightsError as error:
            raise CannotFetch(f"{missing}; {error}") from error
        logger.info("%s comes from %s", named, found.label or found.folder)
        return found.folder
