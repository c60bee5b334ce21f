"""What replicas are told at their start: one table of plain values, as a Serve config has it under ``args``.

Knows names, ranges and how they become `Settings` and a runner. Must not know Ray or HTTP.
"""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptive_fusion.budget import Budget
from adaptive_fusion.checks import integer, number
from adaptive_fusion.errors import ConfigError
from adaptive_fusion.serving.settings import KEY_VARIABLE, MODES, Settings

if TYPE_CHECKING:
    from adaptive_fusion.runner import AdaptiveRunner

LIMITS = ("latency_ms", "ttft_ms", "vram_gb", "attainment")
MOST_REPLICAS = 1000


@dataclass(frozen=True)
class ReplicaOptions:
    """How many replicas there are, and how each behaves. All are alike.

    Attributes:
        replicas: How many at least.
        max_replicas: How many at most; None keeps `replicas`.
        target_ongoing: Requests that a replica has on average, waiting and running, above which another is started.
        surge_percent: Replicas that a rolling update may start before it stops old ones, in percent of all; 0 stops
            some first, which is needed where there is no room for more.
        cpus: Cores that Ray counts for a replica, and its threads.
        gpus: Accelerators of a replica.
        model, policy, dtype, attn, cache, quantization, device_map: As of ``adaptive-fusion serve``.
        latency_ms, ttft_ms, vram_gb, attainment: Limits of every request.
        served_name, mode, max_tokens, queue, batch, encoder_cache_mb, calibrate, allowed_media_domains: As of
            ``adaptive-fusion serve``, for each replica.
        explore: As of ``adaptive-fusion serve``.
        rollout: File of experiments with policies, one for all: on the head of the cluster, where an actor has it.
        keep_comments: As of ``adaptive-fusion serve``.
        host: Where clients come from: with one that others can reach there must be a key.
        api_key: What clients must present; None takes the environment variable's, if it is set.
        log: Name of the logs: each replica writes one of its own beside it, ``NAME-REPLICA.jsonl``.
        state: File in which what replicas learn is kept over a restart of all.
        drain_s: How long admitted requests may take once a replica is to end.
        generation: Another text is another version: all replicas are replaced.

    Raises:
        ConfigError: For a value out of range.
    """

    replicas: int = 1
    max_replicas: int | None = None
    target_ongoing: float = 2.0
    surge_percent: int = 100
    cpus: float = 1.0
    gpus: float = 0.0
    model: str = "reference"
    policy: str = "auto"
    latency_ms: float | None = None
    ttft_ms: float | None = None
    vram_gb: float | None = None
    attainment: float | None = None
    dtype: str | None = None
    attn: str | None = None
    cache: str = "dynamic"
    quantization: str | None = None
    device_map: str | None = None
    served_name: str | None = None
    mode: str = "adaptive"
    max_tokens: int = 256
    queue: int = 64
    batch: int = 4
    encoder_cache_mb: int = 0
    calibrate: bool = False
    allowed_media_domains: tuple[str, ...] = ()
    explore: float | None = None
    rollout: str | None = None
    keep_comments: bool = False
    host: str = "127.0.0.1"
    api_key: str | None = None
    log: str | None = None
    state: str | None = None
    drain_s: float = 60.0
    generation: str = ""

    def __post_init__(self) -> None:
        integer(self.replicas, "replicas", 1, MOST_REPLICAS)
        if self.max_replicas is not None:
            integer(self.max_replicas, "max_replicas", self.replicas, MOST_REPLICAS)
        number(self.target_ongoing, "target_ongoing", above=0, high=1e4)
        integer(self.surge_percent, "surge_percent", 0, 100)
        number(self.cpus, "cpus", 0, 4096)
        number(self.gpus, "gpus", 0, 64)
        if self.mode not in MODES:
            raise ConfigError(f"mode is {self.mode!r}; expected one of {', '.join(MODES)}")
        object.__setattr__(self, "allowed_media_domains", tuple(self.allowed_media_domains))
        self.settings()

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "ReplicaOptions":
        """From a table, as a Serve config has it.

        Raises:
            ConfigError: For an unknown name, or a value out of range.
        """
        known = [field.name for field in fields(cls)]
        if unknown := sorted(str(name) for name in values if name not in known):
            raise ConfigError(f"args has {unknown[0][:80]!r}; expected {', '.join(known)}")
        return cls(**values)

    def values(self) -> dict[str, Any]:
        """The table that `of` reads, of JSON's types."""
        return {**asdict(self), "allowed_media_domains": list(self.allowed_media_domains)}

    @property
    def key(self) -> str | None:
        """What clients must present."""
        return self.api_key if self.api_key is not None else os.environ.get(KEY_VARIABLE) or None  # empty is unset

    @property
    def name(self) -> str:
        """The model's name for clients: of a folder its last part, which tells no more of this machine."""
        if self.served_name is not None:
            return self.served_name
        folder = Path(self.model).expanduser()
        return folder.name if folder.is_dir() else self.model

    def settings(self) -> Settings:
        """A replica's settings."""
        from adaptive_fusion.loading import cache_options

        limits = {name: getattr(self, name) for name in LIMITS}
        return Settings(
            model=self.name,
            mode=self.mode,
            budget=Budget.from_dict({name: value for name, value in limits.items() if value is not None}),
            host=self.host,
            api_key=self.key,
            allowed_media_domains=self.allowed_media_domains,
            max_new_tokens=self.max_tokens,
            queue=self.queue,
            batch=self.batch,
            drain_s=self.drain_s,
            calibrate=self.calibrate,
            keep_comments=self.keep_comments,
            generate=cache_options(self.cache),
        )

    def log_of(self, replica: str) -> Path | None:
        """The file that a replica logs to."""
        if self.log is None:
            return None
        path = Path(self.log)
        return path.with_name(f"{path.stem}-{replica}{path.suffix or '.jsonl'}")

    def runner(self, replica: str) -> "AdaptiveRunner":
        """A replica's runner."""
        from adaptive_fusion.loading import model_options, open_runner

        given = model_options(self.dtype, self.attn, self.quantization, self.device_map)
        return open_runner(self.model, self.policy, self.log_of(replica), given, self.encoder_cache_mb, self.explore)
