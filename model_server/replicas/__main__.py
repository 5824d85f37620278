"""`python -m model_server.replicas`: the model server as replicas on Ray Serve (extra `ray`)."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Annotated

import typer

from model_server.app import end_on_signals, end_with, listen, serve
from model_server.http.entry import Entry
from model_server.precision import Precision
from model_server.replicas.cluster import connect
from model_server.replicas.door import create_door


def command(
    least: Annotated[int, typer.Option("--min", min=1, help="Replicas that always run.")] = 1,
    most: Annotated[int, typer.Option("--max", min=1, help="Replicas when there is much to do.")] = 1,
    target: Annotated[
        int, typer.Option(min=1, help="Calls in work for each replica; beyond, another one is started.")
    ] = 8,
    cpus: Annotated[int, typer.Option(min=1, help="CPUs, and threads of the model, of each replica.")] = 1,
    gpus: Annotated[float, typer.Option(min=0, help="GPUs of each replica; 0.5 = two on one; 0 = on the CPU.")] = 0,
    address: Annotated[
        str | None,
        typer.Option(help="Of a Ray cluster, or auto; without it one is started on this machine, and ends with this."),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; others than loopback need --token-file.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 = any free one.")] = 8765,
    token_file: Annotated[
        str | None, typer.Option(help="File with the bearer token that callers must send; - = first line of stdin.")
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(help="As of rs-model-server; every machine of the cluster must find them under this name."),
    ] = None,
    precision: Annotated[Precision, typer.Option(help="As of rs-model-server.")] = Precision.AUTO,
) -> None:
    """Serve the model from several processes behind one address: the routes, limits and errors of rs-model-server.

    Each replica has a model of its own; as many run as the calls in work ask for. Calls about one image go to the
    replica that has its features, while that is not overloaded. SIGTERM lets running calls finish.

        python -m model_server.replicas --min 1 --max 4 --gpus 1 --address auto
    """
    if most < least:
        raise typer.BadParameter(f"--max is {most}, fewer than the {least} of --min")
    if find_spec("ray") is None:
        raise typer.BadParameter("Ray is not installed: pip install 'rs-perception[ray]'")
    sock, token = listen(host, port, token_file)
    try:
        connect(address)
    except ConnectionError as error:
        raise typer.BadParameter(f"no Ray cluster answers at {address}: {error}") from error
    end_on_signals()  # Ray has set its own
    from model_server.replicas.serving import Plan, ServeReplicas

    replicas = ServeReplicas(Plan(least, most, target, cpus, gpus, weights, precision))
    end_with(serve(replicas, create_door(replicas, Entry(token)), sock))


if __name__ == "__main__":
    typer.run(command)
