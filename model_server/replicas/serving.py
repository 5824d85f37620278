"""Replicas on Ray Serve: how many there are, and which one a call goes to.

Serve counts calls, starts and stops replicas, replaces those that end, and finds the replica of an image on a
consistent-hash ring. Its own HTTP proxies stay off: they would hold bodies without bound, and before a token is seen.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import ray
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponse

from model_server.app import DRAIN_S
from model_server.engine import EngineNotReady
from model_server.precision import Precision
from model_server.replicas.calls import AllBusy, Answer, Call, ReplicaLost
from model_server.replicas.replica import Replica

logger = logging.getLogger(__name__)

APP = "rs-perception"
ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
OVERLOAD = 2  # times the calls that a replica should have: beyond, those about its images go to others too
HEALTHY_S = 10.0  # what a replica has to answer Serve; the third time in a row that it does not, it is replaced
EVERYONE_S = 2.0  # what a replica has to answer a probe


@dataclass(frozen=True)
class Plan:
    """How many replicas, and what each is.

    Args:
        least, most: replicas; `target` is the calls in work that each should have, which decides how many run.
        cpus, gpus: of each replica; its model is on a GPU where it has one, or a share of one.
        weights, precision: as of `rs-model-server`; every machine of the cluster finds the weights under this name.
    """

    least: int = 1
    most: int = 1
    target: int = 8
    cpus: int = 1
    gpus: float = 0.0
    weights: str | None = None
    precision: str = Precision.AUTO


class ServeReplicas:
    """`calls.Replicas` over Ray Serve, on the cluster that this process is connected to."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._handle: DeploymentHandle[Replica] | None = None
        self._starter = ThreadPoolExecutor(1)  # of its own: nobody waits for it at the end

    async def start(self) -> None:
        """Returns when the least number of replicas have loaded the model. Raises RuntimeError where they cannot."""
        self._handle = await asyncio.get_running_loop().run_in_executor(self._starter, self._run)

    async def failed(self) -> None:
        """Never returns: Serve puts another replica in the place of one that fails."""
        await asyncio.Event().wait()

    async def close(self) -> None:
        """Let replicas answer what they have, and end them. A start that still waits for them is left to wait."""
        started, self._handle = self._handle is not None, None
        await asyncio.to_thread(serve.delete, APP)
        if started:
            await asyncio.to_thread(ray.shutdown)

    def _run(self) -> DeploymentHandle[Replica]:
        plan, quiet = self._plan, {"enable_access_log": False, "log_level": "WARNING"}
        deployment = serve.deployment(Replica).options(
            name="Replica",
            ray_actor_options={"num_cpus": plan.cpus, "num_gpus": plan.gpus},
            autoscaling_config=AutoscalingConfig(
                min_replicas=plan.least, max_replicas=plan.most, target_ongoing_requests=plan.target
            ),
            max_ongoing_requests=OVERLOAD * plan.target,
            max_queued_requests=OVERLOAD * plan.target * plan.most,
            request_router_config=RequestRouterConfig(
                request_router_class=ROUTER, request_router_kwargs={"num_fallback_replicas": plan.most - 1}
            ),
            graceful_shutdown_timeout_s=DRAIN_S,
            health_check_timeout_s=HEALTHY_S,
            logging_config=quiet,
        )
        serve.start(proxy_location="Disabled", logging_config=quiet)
        device = "cuda" if plan.gpus else "cpu"
        return serve.run(
            deployment.bind(plan.weights, device, plan.precision, plan.cpus), name=APP, route_prefix=None
        )

    async def answer(self, call: Call, image: str | None) -> Answer:
        response: DeploymentResponse[Answer] = self._ready().options(session_id=image or "").answer.remote(call)
        try:
            return await response
        except asyncio.CancelledError:
            response.cancel()  # to stop waiting does not stop the work
            raise
        except BackPressureError as error:
            raise AllBusy from error
        except DeploymentUnavailableError as error:
            raise EngineNotReady("no replica runs") from error
        except RayActorError as error:
            logger.warning("a replica has ended in the middle of call %s: %s", call.id, type(error).__name__)
            raise ReplicaLost from error

    async def everyone(self, call: Call) -> list[Answer]:
        if self._handle is None:
            return []
        try:
            asked = self._handle.broadcast("answer", call)
            # Its public `results_async` has one limit for all: a replica that hangs would silence the others.
            results = await asyncio.wait_for(asked._fetch_replica_results_async(), EVERYONE_S)
        except (TimeoutError, DeploymentUnavailableError):
            return []
        waits = (asyncio.wait_for(result.get_async(), EVERYONE_S) for result in results)
        answers = await asyncio.gather(*waits, return_exceptions=True)
        return [answer for answer in answers if isinstance(answer, Answer)]

    def _ready(self) -> DeploymentHandle[Replica]:
        if self._handle is None:
            raise EngineNotReady("the first replica is still loading its model")
        return self._handle
