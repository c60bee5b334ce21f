"""``adaptive-fusion serve --replicas``: the command's options as replicas are told them.

Knows options and cores. Must not know Ray, or load what models need: the process only starts others.
"""

import os
from enum import StrEnum
from pathlib import Path
from typing import Any

import typer

from adaptive_fusion.commands import options
from adaptive_fusion.commands.output import complain, refusing

LEAST_BYTES = 512 << 20
"""What PyTorch and transformers take in a process of their own."""


def serve_replicas(given: dict[str, Any], port: int) -> None:
    """Serve by several processes; `given` are the command's options."""
    with refusing((), False):
        options.require_serving()
        from adaptive_fusion.errors import ConfigError
        from adaptive_fusion.loading import checked
        from adaptive_fusion.serving.ray_run import serve_replicas as run
        from adaptive_fusion.serving.replica_options import ReplicaOptions

        values: dict[str, Any] = {
            name: str(value) if isinstance(value, Path | StrEnum) else value for name, value in given.items()
        }
        domains = values.pop("allowed_media_domains", None)
        if values.pop("ui", False):
            raise ConfigError("--ui goes with one server; expected no --replicas, or no --ui")
        count, most = values.pop("replicas", 1), values.get("max_replicas")
        _must_fit(most or count)
        told = ReplicaOptions(
            replicas=count,
            cpus=max(1, (os.cpu_count() or 1) // (most or count)),
            surge_percent=max(1, 100 // count),  # one by one: a start takes cores from those that answer
            allowed_media_domains=options.hosts(domains),
            **values,
        )
        checked(told.model, told.policy)  # here, where it can be said at once
        answered = run(told, port, complain)
    if not answered:
        raise typer.Exit(1)


def _must_fit(count: int) -> None:
    """Raises ConfigError for more replicas than this machine's memory has room for, whatever the model."""
    from adaptive_fusion.errors import ConfigError

    fit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // LEAST_BYTES
    if count > fit:
        raise ConfigError(
            f"{count} replicas do not fit into this machine's memory, of which each takes {LEAST_BYTES >> 20} MiB at "
            f"least, without its model; expected at most {fit}, or a cluster"
        )
