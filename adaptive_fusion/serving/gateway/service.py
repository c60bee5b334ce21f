"""What stands around the requests of a gateway: the engine, what decides, what was measured, who is in, how it ends.

Knows the parts and wires them. Must not know how a request is read or answered.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from adaptive_fusion.control.upstream import Upstream as Deciding
from adaptive_fusion.decision_log import DecisionLog
from adaptive_fusion.errors import AdaptiveFusionError, ConfigError
from adaptive_fusion.media.hashes import length_prefixed
from adaptive_fusion.media.inline import data_url_bytes
from adaptive_fusion.policy.files import AUTO
from adaptive_fusion.policy.policy import Policy
from adaptive_fusion.serving.access_log import AccessLog
from adaptive_fusion.serving.fetcher import Address as MediaAddress
from adaptive_fusion.serving.fetcher import Fetcher, allowed_origins, read_address
from adaptive_fusion.serving.gateway import clips, engines, processors
from adaptive_fusion.serving.gateway.entry import Entry
from adaptive_fusion.serving.gateway.plan import Medium
from adaptive_fusion.serving.gateway.proxy import Address, Upstream
from adaptive_fusion.serving.gateway.reading import Call, Shown
from adaptive_fusion.serving.gateway.settings import GatewaySettings
from adaptive_fusion.serving.gateway.side import Side
from adaptive_fusion.serving.gateway.sizing import Given, Sizing
from adaptive_fusion.serving.gateway.stills import NotPlanned
from adaptive_fusion.serving.http import BODIES, Bodies
from adaptive_fusion.serving.media_limits import MediaLimits
from adaptive_fusion.serving.metrics import Metrics
from adaptive_fusion.serving.records import Records
from adaptive_fusion.serving.refusals import Refusal
from adaptive_fusion.serving.service import log
from adaptive_fusion.serving.state import SAVE_S, StateFile
from adaptive_fusion.serving.trials import Trials

T = TypeVar("T")
MOST_FETCHES = 16
CODES = ("upstream_unreachable", "upstream_timeout", "upstream_failed", "upstream_error")


class Gateway:
    """One engine upstream and everything that stands around the requests to it.

    Args:
        settings: How.
        policy: As for `AdaptiveRunner`.
        log: The decision log; None keeps none.
        clock: Seconds, monotonic.

    Raises:
        ConfigError: For an address, an engine or a processor that is none, and for an audit without a log.
    """

    def __init__(
        self,
        settings: GatewaySettings,
        policy: Policy | str | Path = AUTO,
        log: DecisionLog | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if settings.mode == "audit" and log is None:
            raise ConfigError("mode is 'audit' and there is no log; expected a log to write the audit to")
        self.settings, self.log, self.clock = settings, log, clock
        self.address, self.engine = Address.read(settings.upstream), engines.find(settings.engine)
        grid = processors.find(settings.processor)

        def make(by: Policy | str | Path) -> Deciding:
            return Deciding(grid, settings.model, policy=by, budget=settings.budget, clock=clock)

        self.side = Side(make, policy, audit=settings.mode == "audit", gives_logprobs=self.engine.logprobs)
        self.deciding, self.plans = self.side.deciding, self.side.plans
        self.trials: Trials | None = None
        self.limits = MediaLimits(allowed_domains=settings.allowed_media_domains)
        self.sizing = Sizing(grid, self.limits.max_megapixels)
        self.bodies = Bodies(BODIES * settings.max_body_mib << 20)
        self.metrics = Metrics(
            [rung.name for ladder in self.deciding.policy.lanes.values() for rung in ladder], codes=CODES
        )
        self.access_log, self.records = AccessLog(), Records(settings.keep_decisions)
        self.state = StateFile(settings.state, self.deciding)
        self.tenant = length_prefixed("tenant", settings.api_key) if settings.api_key is not None else ""
        self.upstream = Upstream(self.address, settings.upstream_key, settings.timeout_s)
        self._origins = allowed_origins(settings.allowed_media_domains)
        self._fetcher = Fetcher(self._origins, timeout_s=self.limits.fetch_timeout_s) if self._origins else None
        self._fetches = asyncio.Semaphore(MOST_FETCHES)
        self._pool = ThreadPoolExecutor(settings.preparers, thread_name_prefix="prepare")
        self.aside = set[asyncio.Task[Any]]()  # what runs beside requests and ends with the gateway
        self._active, self._counted, self._idle, self.draining = 0, 0, asyncio.Event(), False
        self._idle.set()

    @property
    def runner(self) -> "Gateway":
        """What the endpoints that servers share ask for the log."""
        return self

    async def in_thread(self, work: Callable[..., T], *arguments: Any) -> T:
        """`work` outside of the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work, *arguments)

    # Who is in

    @contextlib.contextmanager
    def admitted(self, *, counted: bool = True) -> Iterator[Entry]:
        """Inside this context a request is in; it waits for the gateway until its entry says that the engine has it.
        Only those that are planned are `counted` in the gauges.

        Raises:
            Refusal: 503 once the gateway ends.
        """
        if self.draining:
            raise Refusal("the gateway is shutting down", 503, code="draining", retry_s=1.0)
        entry = Entry(self.metrics, self.clock)
        self._active += 1
        self._counted += counted
        self._idle.clear()
        self.metrics.queued(self._counted)
        try:
            yield entry
        finally:
            self._active -= 1
            self._counted -= counted
            entry.left()
            self.metrics.queued(self._counted)
            if not self._active:
                self._idle.set()

    async def drain(self) -> None:
        """Let nobody else in, and wait for those who are, at most the settings' time."""
        self.draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.settings.drain_s):
                await self._idle.wait()

    async def keep_saving(self) -> None:
        """Save what was learned now and then, for ever."""
        while True:
            await asyncio.sleep(SAVE_S)
            await self.save()

    async def save(self) -> None:
        """Save what was learned, if it can be."""
        if (trouble := await asyncio.to_thread(self.state.save)) is not None:
            log.warning(trouble)
        if self.trials is not None:
            await asyncio.to_thread(self.trials.save)

    async def close(self) -> None:
        """Save, hang up, let the threads go."""
        self.draining = True
        for task in (ending := tuple(self.aside)):
            task.cancel()
        await asyncio.gather(*ending, return_exceptions=True)
        await self.save()
        await self.upstream.aclose()
        self._pool.shutdown(wait=False, cancel_futures=True)

    # Media

    async def measured(self, call: Call, side: Side, *, audit: bool = False) -> list[Medium]:
        """All that a request shows, measured where its bytes are there and the side has a use for that; what cannot be
        says why. Refuses nothing."""
        if side.deciding.always_full and not (audit or side.plans.audit) and call.point is None:
            return [Medium(None, each.detail, "the policy takes nothing away") for each in call.shown]
        return list(await asyncio.gather(*(self._medium(call, index) for index in range(len(call.shown)))))

    async def _medium(self, call: Call, index: int) -> Medium:
        shown = call.shown[index]
        if index >= self.limits.max_media:
            return Medium(None, shown.detail, f"more than {self.limits.max_media} media")
        if shown.sized:
            return Medium(None, shown.detail, "the request says how large it is to be")
        try:
            data = None if shown.is_data else await self._fetched(shown)
            return await self.in_thread(self._measure, shown, data)
        except AdaptiveFusionError as error:
            return Medium(None, shown.detail, str(error) if isinstance(error, NotPlanned) else "it cannot be read")

    async def _fetched(self, shown: Shown) -> bytes:
        """The bytes at an address whose host is allowed.

        Raises:
            NotPlanned: For any other.
            MediaRefused: If they cannot be had.
        """
        address: MediaAddress | None = None
        with contextlib.suppress(AdaptiveFusionError):
            address = read_address(shown.text, self._origins)
        if address is None or self._fetcher is None:
            raise NotPlanned("sent by address")
        async with self._fetches:
            return await self._fetcher.fetch(address, self.limits.max_medium_bytes)

    def _measure(self, shown: Shown, data: bytes | None) -> Medium:
        data = data_url_bytes(shown.text, self.limits.max_medium_bytes) if data is None else data
        if shown.kind == "video" and (why := clips.unavailable()) is not None:
            return Medium(None, shown.detail, why)
        return Medium(self.sizing.measure(data, shown.kind), shown.detail, data=data)

    def smaller(self, medium: Medium, given: Given) -> bytes | None:
        """The bytes that stand for a medium at what it is given; None where it stays as it is."""
        if medium.measured is None or medium.data is None:
            return None
        frames = self.plans.frames(medium.measured, given)
        return self.sizing.smaller(medium.measured, medium.data, given, frames)


def media_names(media: Sequence[Medium]) -> list[str]:
    """For the hashes of a conversation: of each medium what tells it from others."""
    return [each.measured.name if each.measured is not None else each.why for each in media]
