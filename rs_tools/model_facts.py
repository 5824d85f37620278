"""What can be known of the model without having it look: the classes that it was taught, and its card.

Of a checkpoint on this machine both are read from its folder, so that nothing is started for them; a server elsewhere
is asked. Neither needs torch.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
from pydantic import BaseModel, ValidationError

from model_server import protocol
from rs_tools.endpoint import base_url, bearer, through_proxy
from rs_tools.errors import ServerUnavailable

EMBEDDED = Path(protocol.__file__).parent / "weights" / "nano"
TIMEOUT_S = 5.0
MAX_CARD = 200_000  # bytes


class Taxonomy(BaseModel):
    """Words that the model was taught; others are understood by likeness, and an answer warns where they are not.

    Attributes:
        model: its name.
        scenes: the classes of `classify` where none are given.
        things: what `ground` was taught to box.
        covers: what `segment` was taught to map.
    """

    model: str = ""
    scenes: list[str] = []
    things: list[str] = []
    covers: list[str] = []


class ModelFacts:
    """Facts of the model at `url`, or of the one that a local model server loads from `weights` (None: the embedded).

    `model` is its name where several may be at `url`.

    Raises (both methods):
        ServerUnavailable: the server at `url` does not answer, or not as a model server does.
    """

    def __init__(self, url: str | None, token: str | None, weights: str | None, model: str | None = None) -> None:
        self._url = base_url(url) if url else None
        self._authorization = bearer(token)
        self._model = model
        self._folder = Path(weights).expanduser() if weights else EMBEDDED
        self._said: dict[str, Any] | None = None

    async def taxonomy(self) -> Taxonomy:
        """The classes; empty lists where a checkpoint names none."""
        if self._url is None:
            return await asyncio.to_thread(_taxonomy, self._folder)
        said = await self._asked(self._url)
        try:
            return Taxonomy(model=said.get("id", ""), scenes=said.get("taxonomy", []))
        except ValidationError as error:
            raise self._strange() from error

    async def card(self) -> str:
        """The model card, Markdown."""
        if self._url is not None:
            return _described(await self._asked(self._url))
        card = self._folder / "README.md"
        if not card.is_file():
            return f"# {self._folder.name}\n\nThis checkpoint came without a model card.\n"
        with card.open("rb") as file:
            return (await asyncio.to_thread(file.read, MAX_CARD)).decode(errors="replace")

    async def _asked(self, url: str) -> dict[str, Any]:
        """What the server says of its model; asked once, for a server keeps its model."""
        if self._said is None:
            try:
                async with httpx.AsyncClient(
                    timeout=TIMEOUT_S, headers=self._authorization, trust_env=through_proxy(url)
                ) as client:
                    response = await client.get(f"{url}/v1/models")
                listed = response.raise_for_status().json()["data"]
                self._said = dict(next(one for one in listed if self._model in (None, one["id"])))
            except httpx.HTTPError as error:
                raise ServerUnavailable(
                    f"The model server at {url} does not say what it serves ({error}); is it running?"
                ) from error
            except StopIteration as error:
                raise ServerUnavailable(f"{url} does not list a model {self._model or ''}.") from error
            except (ValueError, KeyError, TypeError) as error:
                raise self._strange() from error
        return self._said

    def _strange(self) -> ServerUnavailable:
        return ServerUnavailable(f"{self._url} does not answer as an rs-model-server does.")


def _taxonomy(folder: Path) -> Taxonomy:
    config, dense = _read(folder / "config.json"), _read(folder / "dense.json")
    merged = dict(config.get("merged_labels", []))
    return Taxonomy(
        model=config.get("name", folder.name),
        scenes=[label for label in config.get("labels", []) if label not in merged],
        things=_taught(dense.get("detect", {})),
        covers=_taught(dense.get("mask", {})),
    )


def _taught(thresholds: dict[str, float]) -> list[str]:
    return sorted(name for name in thresholds if name != "default")


def _read(path: Path) -> dict[str, Any]:
    """A file of the checkpoint; {} where it has none, as published checkpoints of other make do."""
    return json.loads(path.read_text()) if path.is_file() else {}


def _described(said: dict[str, Any]) -> str:
    """A card from what a server says, where its own is out of reach."""
    facts = "\n".join(f"- {name}: {json.dumps(value)}" for name, value in said.items() if name != "taxonomy")
    return f"# {said.get('id', 'The model')}\n\nServed from another machine; it says of itself:\n\n{facts}\n"
