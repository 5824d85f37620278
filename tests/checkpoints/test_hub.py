"""Where weights lie: folders first, then ids on the hub, pinned by commit; what cannot be fetched is said plainly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from model_server.checkpoints import hub
from model_server.checkpoints.hub import CannotFetch, companion, locate
from model_server.checkpoints.store import WeightsError

huggingface_hub = pytest.importorskip("huggingface_hub")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No network, and an empty cache of the hub's, whose folder this is."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def cached(cache: Path, repo: str, commit: str, reference: str | None = None) -> Path:
    """A repository in the hub's cache, as its client keeps it."""
    root = cache / f"models--{repo.replace('/', '--')}"
    snapshot = root / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    if reference:
        (root / "refs").mkdir(exist_ok=True)
        (root / "refs" / reference).write_text(commit)
    return snapshot


def test_a_folder_comes_before_an_id_of_the_same_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert locate("owner/name").folder == Path("owner/name")
    assert locate("owner/name").label is None


def test_what_is_neither_a_folder_nor_an_id_is_said(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="is no folder, and no id on the hub"):
        locate(str(tmp_path / "missing"))


def test_without_a_network_the_way_out_is_named(offline: Path) -> None:
    with pytest.raises(CannotFetch, match=r"owner/name@v1 is no folder.*cannot be reached.*hf download owner/name"):
        locate("owner/name@v1")


def test_what_was_fetched_is_named_by_its_commit_whatever_was_asked_for(offline: Path) -> None:
    snapshot = cached(offline, "owner/name", COMMIT, "main")
    for asked in ("owner/name", "owner/name@main", f"owner/name@{COMMIT}"):
        found = locate(asked)
        assert found.folder == snapshot
        assert found.label == f"owner/name@{COMMIT}"


def test_a_part_lies_beside_its_checkpoint_or_comes_from_the_hub_or_both_reasons_are_said(offline: Path) -> None:
    def missing() -> Path:
        raise WeightsError("it keeps no tower")

    assert companion(lambda: offline, "owner/tower") == offline
    with pytest.raises(WeightsError, match=r"^it keeps no tower$"):
        companion(missing, "/a/path/of/the/authors")
    with pytest.raises(CannotFetch, match=r"it keeps no tower; owner/tower is no folder"):
        companion(missing, "owner/tower")
    snapshot = cached(offline, "owner/tower", COMMIT, "main")
    assert companion(missing, "owner/tower") == snapshot


def test_a_repository_that_the_hub_does_not_know_is_no_network_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    import httpx
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    response = httpx.Response(404, request=httpx.Request("GET", "https://hub"))
    said = {
        RepositoryNotFoundError: "no folder and no public repository 'owner/name'",
        RevisionNotFoundError: "owner/name has no revision 'v9'",
        GatedRepoError: "given out on request only",
    }
    for kind, words in said.items():

        def refuse(*_: Any, kind: type[Any] = kind, **__: Any) -> str:
            raise kind("refused", response=response)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
        with pytest.raises(CannotFetch, match=words):
            hub.fetch("owner/name", "v9")
