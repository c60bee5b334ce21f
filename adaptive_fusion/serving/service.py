"""The parts of a running server, and its life: warm-up, saving what was learned, draining.

Knows the runner, the queue and the settings. Must not know of HTTP.
"""

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from adaptive_fusion.calibrate import calibrate
from adaptive_fusion.errors import ConfigError
from adaptive_fusion.media.hashes import length_prefixed
from adaptive_fusion.policy.policy import Policy
from adaptive_fusion.runner import AdaptiveRunner
from adaptive_fusion.serving.access_log import AccessLog
from adaptive_fusion.serving.gently import gently
from adaptive_fusion.serving.media_limits import MediaLimits
from adaptive_fusion.serving.metrics import Metrics
from adaptive_fusion.serving.records import Records
from adaptive_fusion.serving.refusals import Refusal
from adaptive_fusion.serving.reserve import Reserve
from adaptive_fusion.serving.scheduler import Scheduler, shutting_down
from adaptive_fusion.serving.settings import Settings
from adaptive_fusion.serving.state import Kept, StateFile
from adaptive_fusion.serving.trials import Trials

T = TypeVar("T")
CUT_OFF_S = 5.0
"""Seconds for the last answers once the time to drain is over."""
PREPARERS = 4
"""Threads that decode and measure media."""
log = logging.getLogger("adaptive_fusion.serving")


class Service:
    """One model, one queue, and everything that stands around them.

    Args:
        runner: Answers.
        settings: How.
        trials: Experiments with policies; None makes none.
        records: Keeps decisions and ratings; None keeps them here.
        state: Keeps what is learned; None keeps it in the settings' file.

    Raises:
        ConfigError: If requests are to be audited and there is no log to say what would have been done.
    """

    def __init__(
        self,
        runner: AdaptiveRunner,
        settings: Settings,
        trials: Trials | None = None,
        records: Records | None = None,
        state: Kept | None = None,
    ) -> None:
        if settings.mode == "audit" and runner.log is None:
            raise ConfigError("mode is 'audit' and the runner keeps no log; expected a log to write the audit to")
        self.runner, self.settings, self.trials = runner, settings, trials
        rungs = [rung.name for ladder in runner.policy.lanes.values() for rung in ladder]
        self.metrics = Metrics(rungs)
        self.access_log = AccessLog()
        self.scheduler = Scheduler(settings.queue, runner.clock, self.metrics.queued, settings.batch)
        self.side = Scheduler(settings.queue, runner.clock)  # of requests that do not want the model
        self.reserve = Reserve()
        self.records = records if records is not None else Records(settings.keep_decisions)
        self.state: Kept = state if state is not None else StateFile(settings.state, runner)
        self.media_limits = MediaLimits(allowed_domains=settings.allowed_media_domains)
        self.context = context_of(runner)
        # Requests with another key see nothing of what was kept for this one.
        self.tenant = length_prefixed("tenant", settings.api_key) if settings.api_key is not None else ""
        self.ready = False
        self._pool = ThreadPoolExecutor(PREPARERS, thread_name_prefix="prepare")
        self._policies: dict[str, AdaptiveRunner] = {runner.policy.name: runner}
        self._policies_lock = threading.Lock()

    async def in_thread(self, work: Callable[..., T], *arguments: Any) -> T:
        """`work` outside the event loop and outside the model's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work, *arguments)

    def runner_for(self, policy: str | None) -> AdaptiveRunner:
        """The runner that decides by a shipped policy, or by the server's own. Loads files: not for the event loop.

        Raises:
            Refusal: 400 for another name; a path is none.
        """
        if policy is None:
            return self.runner
        with self._policies_lock:
            if policy not in self._policies:
                names = sorted({*Policy.shipped(), self.runner.policy.name})
                if policy not in names:
                    raise Refusal(
                        f"policy is {policy[:80]!r}; expected one of {', '.join(names)}", param="adaptive_fusion.policy"
                    )
                self._policies[policy] = self.runner.with_policy(policy)
            return self._policies[policy]

    async def warm_up(self) -> list[str]:
        """Make the model ready for its first request; sentences that say what was found."""
        notes = await gently(self._warm_up)
        self.ready = True
        return notes

    def _warm_up(self) -> list[str]:
        self.runner.warm_up(**self.settings.generate)
        if self.settings.calibrate and not self.runner.profile.samples:
            calibrate(self.runner)
        return [f"profile: {self.runner.profile_note}", self.state.restore()]

    async def keep_saving(self) -> None:
        """Save what was learned now and then, for ever."""
        while True:
            await asyncio.sleep(self.state.every_s)
            await self.save()

    async def save(self) -> None:
        """Save what was learned, if it can be."""
        if (trouble := await asyncio.to_thread(self.state.save)) is not None:
            log.warning(trouble)
        if self.trials is not None:
            await asyncio.to_thread(self.trials.save)

    async def drain(self) -> None:
        """Let nobody else in, and wait for those who are, at most the settings' time; then who runs gets what there is,
        and who waits is refused."""
        queues = (self.scheduler, self.side)
        for each in queues:
            each.drain()
        for wait_s in (self.settings.drain_s, CUT_OFF_S):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self.scheduler.until_idle()
                    return
            for each in queues:
                each.cut_off()

    async def close(self) -> None:
        """Save and let the threads go."""
        await self.save()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self.scheduler.thread.shutdown(wait=False, cancel_futures=True)

    def require_ready(self) -> None:
        """Raises a Refusal, 503, until the model is warm and once the server ends."""
        if self.scheduler.draining:
            raise shutting_down()
        if not self.ready:
            raise Refusal("the model is being made ready", 503, code="not_ready", retry_s=1.0)


def context_of(runner: AdaptiveRunner) -> int | None:
    """Tokens that the model's context holds; None if its configuration does not say."""
    config = runner.adapter.model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = getattr(text, "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None
