"""Ray Serve's choice of a replica for a request: the one that has its image, where load allows.

Knows Ray's interface for request routers. Must not know requests: `affinity` has the rule. Ray's own routers by model
or session wait for the one replica that is meant, or send what has no session anywhere; here deadlines count.
"""

import random

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from adaptive_fusion.serving.affinity import choose

KEY = "key"
"""Name of the argument by which a request says what its image is."""


class ImageRouter(RequestRouter):
    """Replicas by image; requests without one go to the less busy of two."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranks of candidates: of each rank the replica with the shortest queue is taken if it has room."""
        if not candidate_replicas:
            return []
        key = pending_request.kwargs.get(KEY, "") if pending_request is not None else ""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # once all were asked
        if not key:
            two = random.sample(candidate_replicas, min(2, len(candidate_replicas)))
            return [two, candidate_replicas]
        names = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        waiting = {name: self.replica_queue_len_cache.get(replica.replica_id) or 0 for name, replica in names.items()}
        return [[names[name]] for name in choose(key, waiting)]
