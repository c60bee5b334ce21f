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


def serve_replicas(given: dict[str, Any], port: int) -> None:
    """Serve by several processes; `given` are the command's options."""
    with refusing((), False):
        options.require_serving()
        from adaptive_fusion.errors import ConfigError
        from adaptive_fusion.serving.ray_run import serve_replicas as run
        from adaptive_fusion.serving.replica_options import ReplicaOptions

        values: dict[str, Any] = {
            name: str(value) if isinstance(value, Path | StrEnum) else value for name, value in given.items()
        }
        domains = values.pop("allowed_media_domains", None)
        if values.pop("ui", False):
            raise ConfigError("--ui goes with one server; expected no --replicas, or no --ui")
        count, most = values.pop("replicas", 1), values.get("max_replicas")
        told = ReplicaOptions(
            replicas=count,
            cpus=max(1, (os.cpu_count() or 1) // (most or count)),
            allowed_media_domains=options.hosts(domains),
            **values,
        )
        answered = run(told, port, complain)
    if not answered:
        raise typer.Exit(1)
