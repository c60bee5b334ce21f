"""The server as replicas under Ray Serve: ``adaptive_fusion.serving.ray:app``, in a Serve config or from Python.

Knows Ray. Must not know what is asked or answered: `front` and `replica` do. Ray pickles what it sends between its own
processes, and unpickles it; nothing of a client is among that but bytes and texts. No other module imports this one,
but when replicas are asked for.
"""

import json
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp, Message

from adaptive_fusion.serving.commons import Commons
from adaptive_fusion.serving.front import Answering, Front
from adaptive_fusion.serving.gently import gently
from adaptive_fusion.serving.http import Guard
from adaptive_fusion.serving.replica_options import ReplicaOptions
from adaptive_fusion.serving.settings import Settings

APP = "adaptive-fusion"
NAMESPACE = "adaptive_fusion"
FRONT_ONGOING = 1000
"""Requests that one front has at a time; it only passes on."""
HEALTH_S = 5.0
ROUTER: Any = "adaptive_fusion.serving.router.ImageRouter"
REPLICA = "adaptive_fusion.serving.replica"
TRIALS, PLACE = "adaptive_fusion.commands.options:trials_at", "adaptive_fusion.rollout.place:Place"
"""Who makes experiments with policies, and where they are kept: the server itself does not know how."""
ASK_S = 5.0
BEYOND = 64
"""Requests beyond a replica's own queue that Ray lets it have, so that it is the replica that refuses: it knows when a
turn would come too late."""


def plain(values: Any) -> Any:
    """The same in JSON's own types and no others."""
    return json.loads(json.dumps(values))


class Reach:
    """The actor that all replicas share, one an application, made by whoever comes first.

    Nothing but JSON's types goes there: a text of another library's class, as PyTorch's version is, would
    have the actor import that library.
    """

    def __init__(self, options: ReplicaOptions) -> None:
        kept = Settings().keep_decisions
        self.actor = (
            ray.remote(Commons)
            .options(
                name=f"{APP}-commons",
                namespace=NAMESPACE,
                get_if_exists=True,
                lifetime="detached",
                num_cpus=0,
                max_restarts=-1,
                max_task_retries=3,
            )
            .remote(kept, options.state)
        )

    def tell(self, method: str, *arguments: Any) -> None:
        """Call and wait for nothing."""
        getattr(self.actor, method).remote(*plain(arguments))

    async def ask(self, method: str, *arguments: Any) -> Any:
        """Call and give the answer."""
        return await getattr(self.actor, method).remote(*plain(arguments))

    async def replicas(self) -> list[dict[str, Any]]:
        """Those that are there."""
        found: list[dict[str, Any]] = await self.ask("replicas")
        return found

    async def metrics(self) -> dict[str, str]:
        """Their metrics by name."""
        found: dict[str, str] = await self.ask("metrics")
        return found


def trials(file: Path, runner: Any) -> Any:
    """The experiments of a file that one actor has, on the head of the cluster, where the command finds it."""
    actor = (
        ray.remote(resolve_name(PLACE))
        .options(
            name=f"{APP}-rollout",
            namespace=NAMESPACE,
            get_if_exists=True,
            lifetime="detached",
            num_cpus=0,
            resources={"node:__internal_head__": 0.001},
            max_restarts=-1,
            max_task_retries=3,
        )
        .remote(str(file))
    )
    pool = ThreadPoolExecutor(2, thread_name_prefix="rollout")  # the event loop of an actor is not to wait in Ray

    def ask(method: str, *arguments: Any) -> Any:
        return pool.submit(lambda: ray.get(getattr(actor, method).remote(*arguments), timeout=ASK_S)).result()

    def tell(method: str, *arguments: Any) -> None:
        getattr(actor, method).remote(*arguments)

    return resolve_name(TRIALS)(ask, tell, runner)


@serve.deployment
class ReplicaServer:
    """One replica."""

    async def __init__(self, values: Mapping[str, Any]) -> None:  # type: ignore[misc]
        module = await gently(import_module, REPLICA)  # with the model's stack, which the others do without
        options = ReplicaOptions.of(values)
        reach = Reach(options)
        name = serve.get_replica_context().replica_tag
        self._replica = module.Replica(name, options, reach.tell, reach.ask, trials)
        await self._replica.begin()

    async def answer(self, told: Mapping[str, Any], body: bytes, key: str = "") -> AsyncIterator[list[Message]]:
        """The messages of an answer; `key` is for the router."""
        async for messages in self._replica.answer(told, body):
            yield messages

    async def notes(self) -> list[str]:
        """What was found at the start."""
        found: list[str] = self._replica.notes
        return found

    async def __del__(self) -> None:
        await self._replica.end()


@serve.deployment
@serve.ingress()
class FrontServer:
    """What clients reach."""

    def __init__(self, values: Mapping[str, Any], replicas: DeploymentHandle[Any]) -> None:
        options = ReplicaOptions.of(values)
        self._options, self._reach = options, Reach(options)
        streamed = replicas.options(method_name="answer", stream=True)
        self._notes = replicas.options(method_name="notes")

        def ask(told: dict[str, Any], body: bytes, key: str) -> Answering:
            found: Any = streamed.remote(told, body, key=key)
            return found  # type: ignore[no-any-return]

        self._front = Front(ask, self._reach, (RayActorError,), (RayServeException,), options.settings().max_body_mib)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return Guard(self._front, self._options.key, self._options.settings().is_local, self._front.refused)

    async def drain(self, most_s: float) -> bool:
        """Let nobody else in and wait for those who are."""
        return await self._front.drain(most_s)

    async def notes(self) -> list[str]:
        """What a replica found at its start."""
        found: list[str] = await self._notes.remote()
        return found

    async def keep(self) -> str:
        """Have what was learned written; why it could not be, or nothing."""
        return str(await self._reach.ask("save"))


def app(args: Mapping[str, Any]) -> Application:
    """The application, as ``import_path`` of a Serve config names it.

    Args:
        args: As `ReplicaOptions` has them.

    Raises:
        ConfigError: For an unknown name, or a value out of range.
    """
    options = ReplicaOptions.of(args)
    values = options.values()
    replica: Any = ReplicaServer.options(  # type: ignore[attr-defined]
        **_count(options),
        max_ongoing_requests=options.queue + 1 + BEYOND,
        max_surge_percent=options.surge_percent,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=options.drain_s + 10.0,
        health_check_period_s=HEALTH_S,
        request_router_config=RequestRouterConfig(request_router_class=ROUTER),
        # Ray sets threads by the cores, else replicas of one machine would stand in each other's way.
        ray_actor_options={"num_cpus": options.cpus, "num_gpus": options.gpus},
    )
    front: Any = FrontServer.options(  # type: ignore[attr-defined]
        num_replicas=1,
        max_ongoing_requests=FRONT_ONGOING,
        max_surge_percent=100,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=options.drain_s + 10.0,
        ray_actor_options={"num_cpus": 0},
    )
    # Ray replaces what stands before the replicas with them: the next one is there before the last one ends.
    found: Application = front.bind(values, replica.bind(values))
    return found


def _count(options: ReplicaOptions) -> dict[str, Any]:
    if options.max_replicas is None or options.max_replicas == options.replicas:
        return {"num_replicas": options.replicas}
    scaling = AutoscalingConfig(
        min_replicas=options.replicas,
        max_replicas=options.max_replicas,
        target_ongoing_requests=options.target_ongoing,
    )
    return {"autoscaling_config": scaling}
