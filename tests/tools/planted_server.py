"""The planted model behind a real socket."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from planted import PlantedModel
from rasters import scripted_answer

from model_server.protocol import PerceiveRequest, PerceiveResponse, decode_request, encode_response


class Words(PlantedModel):
    """Its captions are the script's."""

    async def perceive(self, request: PerceiveRequest, tiles: list[np.ndarray]) -> PerceiveResponse:
        words = request.task == "caption"
        return scripted_answer(request, len(tiles)) if words else await super().perceive(request, tiles)


class Server(ThreadingHTTPServer):
    def __init__(self, model: Callable[[], PlantedModel]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.model = model


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # which keeps connections

    def do_POST(self) -> None:
        assert isinstance(self.server, Server)
        request, tiles = decode_request(self.rfile.read(int(self.headers["Content-Length"])))
        body = encode_response(asyncio.run(self.server.model().perceive(request, tiles)))
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def planted_server(model: Callable[[], PlantedModel] = Words) -> Iterator[str]:
    """Its address. Every call gets a model of its own."""
    with Server(model) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()
