"""The model server's process and the `rs-model-server` command: socket, start in the background, idle end, drain.

Nothing here imports torch: the socket listens within a fraction of a second of the start, while the worker thread
imports torch and loads the model. `/ready` says when that is done.
"""

from __future__ import annotations

import asyncio
import ctypes
import ipaddress
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, Protocol

import typer
import uvicorn
from starlette.applications import Starlette

from model_server.engine import Engine
from model_server.http.api import create_app
from model_server.http.entry import Activity
from model_server.precision import Precision

if TYPE_CHECKING:
    from model_server.resident import Resident

logger = logging.getLogger("model_server.app")  # also when it runs as __main__

DRAIN_S = 60


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # some other name: it may lead anywhere


def bind(host: str, port: int) -> socket.socket:
    """A bound socket. Raises OSError: the address is taken or not ours."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    sock = socket.socket(family, kind, protocol)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(address)
    sock.listen(128)
    return sock


class Answering(Protocol):
    """What stands behind an application: an engine, or several."""

    async def start(self) -> None:
        """Ready when it returns; whatever it raises ends the server."""
        ...

    async def failed(self) -> None:
        """Returns when a fault of its own keeps it from answering."""
        ...

    async def close(self) -> None:
        """Answer what waits, take nothing more."""
        ...


async def serve(engine: Answering, app: Starlette, sock: socket.socket, *, idle_exit_s: float = 0) -> int:
    """Serve until SIGTERM, SIGINT or `idle_exit_s` seconds without a call (0 = for ever); drain; return the exit code.

    The engine behind `app` starts in the background. When that fails, or the engine does later, the server ends with
    code 1: whoever wants an answer starts another.
    """
    config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=DRAIN_S)
    server = uvicorn.Server(config)
    background = asyncio.create_task(_load_then_watch(engine, app.state.activity, idle_exit_s))
    background.add_done_callback(lambda _: setattr(server, "should_exit", True))
    try:
        await server.serve(sockets=[sock])
    finally:
        failed = background.done() and background.exception() is not None
        background.cancel()
        await engine.close()
        logger.info("stopped")
    return int(failed)


async def _load_then_watch(engine: Answering, activity: Activity, idle_exit_s: float) -> None:
    started = time.monotonic()
    try:
        await engine.start()
    except Exception as error:
        logger.exception("the model could not be loaded: %s: %s", type(error).__name__, error)
        raise
    logger.info("ready load_s=%.2f", time.monotonic() - started)
    activity.last = time.monotonic()
    failed = asyncio.create_task(engine.failed())
    watched = {failed}
    if idle_exit_s:
        watched.add(asyncio.create_task(_idle(activity, idle_exit_s)))
    try:
        ended, _ = await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in watched:
            task.cancel()
    if failed in ended:
        raise RuntimeError("the engine has failed")
    logger.info("idle for %.0f s, ending", idle_exit_s)


async def _idle(activity: Activity, seconds: float) -> None:
    """Returns when there has been nothing to do for so long."""
    while (left := seconds - activity.idle_s()) > 0:  # noqa: ASYNC110 - what is waited for is the clock
        await asyncio.sleep(max(left, 0.1))


class OneLine(logging.Formatter):
    """One record, one line: a message or traceback with line breaks has them escaped."""

    def format(self, record: logging.LogRecord) -> str:
        return super().format(record).replace("\r", "\\r").replace("\n", "\\n")


def log_to_stderr() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(OneLine("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.getLogger("uvicorn").setLevel(logging.WARNING)


def keep_freed_memory() -> None:
    """Tell glibc to keep freed blocks for the next batch, whose shapes are the same.

    By default each large activation is mapped, zeroed page by page and unmapped again: for a batch of 16 tiles more
    CPU time than its arithmetic. Only the one main arena may grow without limit, so the worker thread shares it.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, TypeError, OSError):
        return  # not glibc
    m_trim_threshold, m_mmap_max, m_arena_max = -1, -4, -8  # malloc.h
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, 2**31 - 1)
    mallopt(m_arena_max, 1)


def loader(weights: str | None, device: str, precision: str, threads: int) -> Callable[[], Resident]:
    """What loads the model that the options of `command` name, for `Engine`."""

    def load() -> Resident:
        # Threads that wait for each other sleep rather than spin: as fast on a quiet machine, and several times as
        # fast on a busy one, where a spinning thread takes the core from the one it waits for. Read when torch loads.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        import torch

        from model_server.opening import open_weights

        if threads:
            torch.set_num_threads(threads)
        place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        perceiver = open_weights(weights, place, precision)
        perceiver.warm_up()
        return perceiver

    return load


def read_token(path: str) -> str:
    """The token of a `--token-file`. Raises typer.BadParameter where there is none."""
    token = (sys.stdin.readline() if path == "-" else Path(path).read_text()).strip()
    if not token:
        raise typer.BadParameter(f"{path} holds no token")
    return token


def end_on_signals() -> None:
    """Before uvicorn takes over the signals there is nothing to drain; after it has drained it raises them again."""
    for stop in (signal.SIGTERM, signal.SIGINT):
        signal.signal(stop, lambda *_: sys.exit(0))


def listen(host: str, port: int, token_file: str | None) -> tuple[socket.socket, str | None]:
    """What a serving process does first: says on stdout where it listens. Returns the socket and callers' token.

    Raises typer.BadParameter: no token in the file, none for an address that others reach, or an address in use.
    """
    end_on_signals()
    token = read_token(token_file) if token_file else None
    if token is None and not is_loopback(host):
        raise typer.BadParameter(f"{host} can be reached from other machines: give --token-file, or use 127.0.0.1")
    log_to_stderr()
    try:
        sock = bind(host, port)
    except OSError as error:
        raise typer.BadParameter(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
    name, bound = sock.getsockname()[:2]
    url = f"http://[{name}]:{bound}" if ":" in name else f"http://{name}:{bound}"
    print(json.dumps({"url": url, "pid": os.getpid()}), flush=True)
    logger.info("listening url=%s", url)
    return sock, token


def command(
    host: Annotated[
        str, typer.Option(help="Address to listen on; others than loopback need --token-file.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 = any free one.")] = 8765,
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="PATH|OWNER/NAME[@REVISION]",
            help="Folder of a checkpoint, our own or a published one, or its id on the Hugging Face hub; without it "
            "the embedded model.",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1; auto = the GPU where there is one.")] = "auto",
    precision: Annotated[
        Precision,
        typer.Option(
            help="Of the network; auto = bfloat16 on a GPU that computes in it, else float32; int8 = bfloat16, with "
            "the weights of the decoder's linear layers in eight bits."
        ),
    ] = Precision.AUTO,
    token_file: Annotated[
        str | None, typer.Option(help="File with the bearer token that callers must send; - = first line of stdin.")
    ] = None,
    idle_exit: Annotated[float, typer.Option(min=0, help="End after so many SECONDS without a call; 0 = never.")] = 0,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads of the model; 0 = one per core.")] = 0,
) -> None:
    """Keep one remote-sensing model in memory and answer many callers over HTTP.

    The first line on stdout is JSON with the url and the pid; log lines go to stderr. The url answers at once;
    GET /ready turns from 503 to 200 when the model is loaded and warm. SIGTERM lets running requests finish.

    You need not start it yourself: rs-mcp and rs-tools start one for you and share it. Start it by hand to put it on
    another machine or GPU:

        rs-model-server --device cuda --host 0.0.0.0 --token-file ~/.rs-token
    """
    sock, token = listen(host, port, token_file)
    keep_freed_memory()
    engine = Engine(loader(weights, device, precision, threads))
    end_with(serve(engine, create_app(engine, token=token), sock, idle_exit_s=idle_exit))


def end_with(serving: Coroutine[Any, Any, int]) -> NoReturn:
    """Run to the end and leave with its code, at once: a thread that loads a model, which may be fetched for an hour,
    cannot be stopped, and Python would wait for it. All who waited for an answer have it by then."""
    try:
        code = asyncio.run(serving)
    except SystemExit as stopped:  # of a signal, which uvicorn raises again
        code = int(stopped.code or 0)
    logging.shutdown()
    sys.stdout.flush()
    os._exit(code)


def main() -> None:
    """Console script `rs-model-server`."""
    typer.run(command)


if __name__ == "__main__":
    main()
