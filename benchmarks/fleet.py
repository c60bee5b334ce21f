"""A simulation of replicas: who waits for whom, whose image is cached where, and whose cores are shared.

Knows service times, arrivals and the rule by which requests find a replica. Must not know servers: `scale` measures.

A request takes `around_s` of processor time outside its replica (proxy, front, client), half before and half after, and
in its replica, which does one at a time in the order of their coming, a time drawn from those measured: one with the
encoder, or one without where the image is cached there. `delay_s` more nobody computes: processes are woken.

All that is under way on one machine shares its cores evenly (processor sharing: with k at work on c cores each goes at
the speed min(1, c / k)), and takes `slowed` times as long where it runs beside others, as they share memory, caches and
clock; replicas that have machines of their own share nothing. Where a request goes is `affinity.choose`'s rule, by
queue lengths that are known at once.
"""

import heapq
import math
import random
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from statistics import mean

from adaptive_fusion.serving.affinity import SLACK, ranked

KNOWN = 16


@dataclass(frozen=True)
class Load:
    """What is to be served.

    Attributes:
        miss_s: Seconds in a replica of requests whose image is encoded, as measured.
        hit_s: Of requests whose image is cached; empty where nothing is.
        around_s: Processor seconds of a request outside its replica.
        images: How many there are; each is asked for by Zipf's law with exponent `zipf`, 0 for evenly.
        zipf: See there.
        held: Images that a replica's cache holds; 0 for no cache.
        cores: Of the one machine that all share; infinite where each replica has its own.
        slowed: Processor seconds of what runs beside others on that machine, in times of those alone.
        delay_s: Seconds of a request that no core and no replica spends on it.
    """

    miss_s: Sequence[float]
    hit_s: Sequence[float] = ()
    around_s: float = 0.0
    images: int = 1000
    zipf: float = 1.0
    held: int = 0
    cores: float = math.inf
    slowed: float = 1.0
    delay_s: float = 0.0


@dataclass
class Fleet:
    """What came of requests, in seconds, in the order of their ends."""

    took_s: list[float] = field(default_factory=list)
    ends_s: list[float] = field(default_factory=list)
    hits: list[bool] = field(default_factory=list)

    @property
    def throughput(self) -> float:
        """Answers a second between the first tenth and the last tenth of them."""
        ends = self.ends_s[len(self.ends_s) // 10 : max(2, len(self.ends_s) * 9 // 10)]
        return (len(ends) - 1) / (ends[-1] - ends[0])

    def within(self, limit_s: float) -> float:
        """Share of requests that took at most so long."""
        return mean(took <= limit_s for took in self.took_s)

    def quantile(self, share: float) -> float:
        """Seconds that this share of requests took at most."""
        ordered = sorted(self.took_s)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    @property
    def hit_rate(self) -> float:
        """Share of the later half of requests whose image was cached where they ran; the earlier fill the caches."""
        return mean(self.hits[len(self.hits) // 2 :])


@lru_cache(maxsize=100_000)
def _first(image: int, replicas: int) -> tuple[int, ...]:
    """The replicas to which an image belongs first, which are almost always enough."""
    return tuple(int(name) for name in ranked(str(image), [str(number) for number in range(replicas)])[:KNOWN])


class _Simulation:
    """Events in order; time goes on by them. In virtual time everything that is under way goes at speed 1."""

    def __init__(self, load: Load, replicas: int, seed: int) -> None:
        self.load, self.rng, self.out = load, random.Random(seed), Fleet()
        self.names = [str(number) for number in range(replicas)]
        self.queues: list[deque[tuple[float, int]]] = [deque() for _ in self.names]
        self.lengths = [0] * replicas
        self.sizes: dict[int, int] = {0: replicas}
        self.caches: list[OrderedDict[int, None]] = [OrderedDict() for _ in self.names]
        weights = [1.0 / rank**load.zipf for rank in range(1, load.images + 1)]
        self.cumulative: list[float] = []
        for weight in weights:
            self.cumulative.append(weight + (self.cumulative[-1] if self.cumulative else 0.0))
        self.now, self.virtual, self.number = 0.0, 0.0, 0
        self.work: list[tuple[float, int, str, float, int, int]] = []
        self.waking: list[tuple[float, float]] = []

    def arrive(self) -> None:
        """A request comes."""
        image = self.rng.choices(range(self.load.images), cum_weights=self.cumulative)[0]
        self._begin("before", self.load.around_s / 2, self.now, image, -1)

    def next_end(self) -> float:
        """When the next thing under way ends, in real time."""
        waking = self.waking[0][0] if self.waking else math.inf
        return min(waking, self._work_ends())

    def _work_ends(self) -> float:
        return self.now + (self.work[0][0] - self.virtual) / self._speed() if self.work else math.inf

    def go_to(self, moment: float) -> None:
        """Let time pass until then; nothing ends before."""
        self.virtual += (moment - self.now) * self._speed()
        self.now = moment

    def end(self) -> bool:
        """The next thing ends; whether a request is answered with it."""
        if self.waking and self.waking[0][0] <= self._work_ends():
            moment, came = heapq.heappop(self.waking)
            self.go_to(moment)
            return self._answered(came)
        self.go_to(self._work_ends())
        _, _, stage, came, image, replica = heapq.heappop(self.work)
        if stage == "before":
            place = self._place(image)
            self._count(place, +1)
            self.queues[place].append((came, image))
            if len(self.queues[place]) == 1:
                self._serve(place)
        elif stage == "serve":
            self.queues[replica].popleft()
            self._count(replica, -1)
            if self.queues[replica]:
                self._serve(replica)
            self._begin("after", self.load.around_s / 2, came, image, replica)
        elif self.load.delay_s:
            heapq.heappush(self.waking, (self.now + self.load.delay_s, came))
        else:
            return self._answered(came)
        return False

    def _answered(self, came: float) -> bool:
        self.out.took_s.append(self.now - came)
        self.out.ends_s.append(self.now)
        return True

    def _speed(self) -> float:
        if not self.work or math.isinf(self.load.cores):
            return 1.0
        return min(1.0, self.load.cores / len(self.work)) / (self.load.slowed if len(self.work) > 1 else 1.0)

    def _begin(self, stage: str, seconds: float, came: float, image: int, replica: int) -> None:
        self.number += 1
        heapq.heappush(self.work, (self.virtual + seconds, self.number, stage, came, image, replica))

    def _serve(self, replica: int) -> None:
        came, image = self.queues[replica][0]
        cache = self.caches[replica]
        hit = image in cache
        if self.load.held:
            cache[image] = None
            cache.move_to_end(image)
            if len(cache) > self.load.held:
                cache.popitem(last=False)
        self.out.hits.append(hit)
        self._begin("serve", self.rng.choice(self.load.hit_s if hit else self.load.miss_s), came, image, replica)

    def _count(self, replica: int, more: int) -> None:
        before = self.lengths[replica]
        self.lengths[replica] = before + more
        self.sizes[before] -= 1
        if not self.sizes[before]:
            del self.sizes[before]
        self.sizes[before + more] = self.sizes.get(before + more, 0) + 1

    def _place(self, image: int) -> int:
        """As `affinity.choose` has it."""
        most = min(self.sizes) + SLACK
        for replica in _first(image, len(self.names)):
            if self.lengths[replica] <= most:
                return replica
        return next(int(name) for name in ranked(str(image), self.names) if self.lengths[int(name)] <= most)


def at_rate(load: Load, replicas: int, rate: float, requests: int, seed: int = 0, steady: bool = False) -> Fleet:
    """`requests` that come `rate` a second: at random (Poisson), or `steady`."""
    simulation = _Simulation(load, replicas, seed)
    arrivals, left = 0.0, requests
    while left or simulation.work or simulation.waking:
        if left and arrivals <= simulation.next_end():
            simulation.go_to(arrivals)
            simulation.arrive()
            left -= 1
            arrivals += 1.0 / rate if steady else simulation.rng.expovariate(rate)
        else:
            simulation.end()
    return simulation.out


def by_clients(load: Load, replicas: int, clients: int, requests: int, seed: int = 0) -> Fleet:
    """`clients` that each send the next request when the last was answered, until `requests` were."""
    simulation = _Simulation(load, replicas, seed)
    for _ in range(clients):
        simulation.arrive()
    while len(simulation.out.took_s) < requests:
        if simulation.end():
            simulation.arrive()
    return simulation.out
