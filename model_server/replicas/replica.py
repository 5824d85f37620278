"""One replica: a process of Ray's with a resident model, its engine and the application of a single server."""

from __future__ import annotations

from urllib.parse import quote

import httpx

from model_server.app import keep_freed_memory, loader, log_to_stderr
from model_server.engine import Engine
from model_server.http.api import create_app
from model_server.http.request_log import HEADER
from model_server.replicas.calls import Answer, Call


class Replica:
    """What Ray Serve runs. Callers were let in by the door, so nobody is asked for a token here."""

    async def __init__(  # pyright: ignore[reportGeneralTypeIssues] - Serve awaits it: no call comes before
        self, weights: str | None, device: str, precision: str, threads: int
    ) -> None:
        """Loads the model; whatever that raises, Serve reports. Arguments as of `rs-model-server`."""
        from ray import serve  # pyright: ignore[reportMissingImports] (of an extra)

        log_to_stderr()
        keep_freed_memory()
        self._name = serve.get_replica_context().replica_id.unique_id
        self._engine = Engine(loader(weights, device, precision, threads))
        await self._engine.start()
        self._app = httpx.ASGITransport(create_app(self._engine), raise_app_exceptions=False)

    async def answer(self, call: Call) -> Answer:
        """What the application answers. Cancelling it frees the call's place in the engine."""
        headers = {"Content-Type": call.content_type, HEADER: call.id}
        request = httpx.Request(
            call.method, f"http://localhost{quote(call.path)}", headers=headers, content=call.body or None
        )
        response = await self._app.handle_async_request(request)
        return Answer(self._name, response.status_code, dict(response.headers), await response.aread())

    def check_health(self) -> None:
        """Serve puts another replica in the place of one that raises."""
        if not self._engine.ready:
            raise RuntimeError("the engine has failed and takes nothing more")
