"""``adaptive-fusion serve --replicas``: Ray, Ray Serve and the replicas on this machine, from a start to a signal.

Knows Ray, signals and processes. Must not know what is served. The Ray that is started here is this process's own and
ends with it. SIGTERM answers who was admitted, then ends; SIGHUP replaces all replicas, one after the other.
"""

import logging
import math
import os
import queue
import secrets
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

from adaptive_fusion.errors import AdaptiveFusionError, ConfigError, MissingExtraError
from adaptive_fusion.serving.replica_options import ReplicaOptions
from adaptive_fusion.serving.settings import KEEP_ALIVE_S

STORE_BYTES = 128 << 20
"""Memory for what goes between processes: bodies of requests, for as long as they are read."""
_STARTS = 6
"""Tries to start Ray, which gives its own processes half a minute each time."""
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # it would be sent to its makers
    "RAY_SERVE_ENABLE_QUEUE_LENGTH_CACHE": "1",
    "RAY_worker_niceness": "0",  # else whatever else the machine does goes before answers
    # On a machine with other work Ray's own processes may take long.
    "RAY_worker_register_timeout_seconds": "300",
}


def serve_replicas(options: ReplicaOptions, port: int, announce: Callable[[str], None]) -> bool:
    """Serve until a signal comes; whether it began, and who was admitted was answered.

    Args:
        options: How many replicas, and how they behave.
        port: To listen on; 0 takes a free one.
        announce: Called with a line once the first request can come, and when replicas were replaced.

    Raises:
        MissingExtraError: Without Ray.
        ConfigError: If the port is taken.
    """
    os.environ.update({name: os.environ.get(name, value) for name, value in _ENVIRONMENT.items()})
    try:
        import ray
        from ray import serve
    except ImportError as error:
        raise MissingExtraError(f"{error.name} is missing; expected pip install 'adaptive-fusion[ray]'") from error
    logging.getLogger("ray.serve").setLevel(logging.WARNING)

    port = _free(options.host, port)
    signals: queue.SimpleQueue[int] = queue.SimpleQueue()  # put from a handler: it may interrupt itself
    before = {sig: signal.getsignal(sig) for sig in _SIGNALS}
    try:
        _start_ray(options)
        options = _placed(options)
        for sig in _SIGNALS:  # after Ray has set its own, which end the process at once
            signal.signal(sig, lambda number, frame: signals.put(number))
        serve.start(
            http_options={"host": options.host, "port": port, "keep_alive_timeout_s": KEEP_ALIVE_S},
            logging_config={"log_level": "WARNING", "enable_access_log": False},
        )
        handle = _run(options)
        announce(_ready(options, port, handle.notes.remote().result()))
        while signals.get() == signal.SIGHUP:
            try:
                _run(replace(options, generation=secrets.token_hex(4)))
            except ConfigError as error:  # those that serve go on
                announce(f"not replaced: {error}")
            else:
                announce(f"replaced: {options.replicas} replicas")
        return _end(handle, options, announce)
    finally:
        with suppress(Exception):
            serve.shutdown()  # type: ignore[no-untyped-call]
        ray.shutdown()
        for sig, handler in before.items():
            signal.signal(sig, handler)


def _start_ray(options: ReplicaOptions) -> None:
    """Ray on this machine, of this process alone.

    Raises:
        ConfigError: If it does not start.
    """
    import ray

    most = 2 * (options.max_replicas or options.replicas)  # while they are replaced there may be twice as many
    for left in reversed(range(_STARTS)):
        try:
            ray.init(
                address="local",
                num_cpus=max(os.cpu_count() or 1, math.ceil(most * options.cpus)),
                include_dashboard=False,
                object_store_memory=STORE_BYTES,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
            return
        except Exception as error:  # Ray raises plain ones
            ray.shutdown()
            if not left:
                raise ConfigError(f"Ray cannot be started on this machine: {str(error)[:300]}") from error


def _run(options: ReplicaOptions) -> Any:
    """Have the replicas that are wanted, all warm; a handle of what stands before them.

    Raises:
        ConfigError: If they cannot be started.
    """
    from ray import serve

    from adaptive_fusion.serving.ray import APP, app

    try:
        return serve.run(app(options.values()), name=APP, route_prefix="/")
    except AdaptiveFusionError:
        raise
    except Exception as error:  # Ray raises plain ones, with the replica's own at their end
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        own = next(
            (line for line in reversed(lines) if "Error: " in line), lines[-1] if lines else type(error).__name__
        )
        raise ConfigError(f"the replicas cannot be started: {own[:300]}") from error


def _placed(options: ReplicaOptions) -> ReplicaOptions:
    """The options with each replica's share of this machine's accelerators, which Ray has counted."""
    import ray

    cluster: Callable[[], dict[str, float]] = ray.cluster_resources
    gpus = int(cluster().get("GPU", 0))
    if not gpus:
        return options
    # There is seldom room for one more model on an accelerator: some old ones end first.
    return replace(options, gpus=min(1.0, gpus / (options.max_replicas or options.replicas)), surge_percent=0)


def _ready(options: ReplicaOptions, port: int, notes: list[str]) -> str:
    host = f"[{options.host}]" if ":" in options.host else options.host
    count = options.replicas if options.max_replicas is None else f"{options.replicas} to {options.max_replicas}"
    return (
        f"ready: {options.name} at http://{host}:{port}/v1 ({options.mode}, {count} replicas, "
        f"policy {options.policy}, {'; '.join(notes)})"
    )


def _end(handle: Any, options: ReplicaOptions, announce: Callable[[str], None]) -> bool:
    """Answer who was admitted; whether all were."""
    answered = bool(handle.drain.remote(options.drain_s).result())
    if trouble := handle.keep.remote().result():
        announce(trouble)
    if not answered:
        announce(f"some were not answered within {options.drain_s:g} s")
    return answered


def _free(host: str, port: int) -> int:
    """The port, or a free one for 0.

    Raises:
        ConfigError: If it cannot be listened on.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(f"port {port} of {host} cannot be listened on ({error.strerror})") from None
        return int(probe.getsockname()[1])
