"""The turns of an async body's calls: when each begins, is looked at again, and is shown its outcome."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from functools import partial

from django_durable.conf import options
from django_durable.engine.asynchronous.parking import park
from django_durable.engine.asynchronous.pending import PendingCall, PendingCalls, State
from django_durable.engine.asynchronous.threads import Result, in_thread
from django_durable.states import StepStatus

# After so many turns of the loop without a new call, the body has gone as far as it can: each level of gather() or
# TaskGroup takes two or three to pass an outcome on.
QUIET_TURNS = 20


class Turns:
    """What happens next to the calls of a body, one turn after the other."""

    def __init__(self, pending: PendingCalls, main: asyncio.Task[Result]) -> None:
        self.pending = pending
        self.context = pending.context
        # The workflow's function.
        self.main = main

    @property
    def ended(self) -> bool:
        return self.context.ended is not None or self.main.done()

    async def take(self) -> None:
        """Let the calls begin, wait and be shown their outcomes, until the function has ended."""
        quiet = -1
        while not self.ended:
            self.pending.changed.clear()
            if quiet != self.pending.activity:
                quiet = await self._settle_down()
            elif not await self._advance():
                await self._change(self._pause())

    async def _settle_down(self) -> int:
        """Let the body go as far as it can; return the activity since which nothing has happened."""
        seen, turns = self.pending.activity, 0
        while turns < QUIET_TURNS and not self.ended:
            await asyncio.sleep(0)
            turns += 1
            if self.pending.activity != seen:
                seen, turns = self.pending.activity, 0
        return seen

    async def _advance(self) -> bool:
        """Do what is next, where the body waits for us; False: wait for a change."""
        new = self.pending.in_state(State.NEW)
        coming = self.pending.in_state(State.READY) + [call for call in new if call.recorded is not None]
        if coming:
            return self._show_first(coming)
        if new:
            # Behind the whole history: what the body has cancelled by then does not begin again.
            for call in new:
                call.go()
            return True
        blocked, now = self.pending.in_state(State.BLOCKED), self.pending.now()
        due = [call for call in blocked if call.look_at is not None and call.look_at <= now]
        for call in due:
            call.go()
        if due or not blocked or self.pending.abandoned or self.pending.in_state(State.UNDER_WAY):
            return bool(due)
        return await self._wait_for_all(blocked)

    def _show_first(self, coming: list[PendingCall]) -> bool:
        """Let the body see the earliest of these outcomes; False: an earlier one is being read."""
        first = min(coming, key=lambda call: call.finished)
        now = self.pending.now()
        for call in self.pending.in_state(State.BLOCKED):
            # A sleep that had ended by then.
            if call.recorded is not None and call.finished < first.finished and call.finished[0] <= now:
                call.go()
        earlier = (
            call.recorded is not None and call.finished < first.finished
            for call in self.pending.in_state(State.UNDER_WAY)
        )
        if any(earlier):
            return False
        if first.state == State.NEW:
            first.go()
            return False
        outcome, error = first.outcome, first.result.error
        if outcome is not None:
            self.context.seen(outcome)
            if error is not None and outcome.status == StepStatus.FAILED:
                self.context.deliver(error, first.position)
        self.pending.unseen.discard(first.position)
        first.show(first.result)
        return True

    async def _wait_for_all(self, blocked: list[PendingCall]) -> bool:
        """All that the body waits for has to wait: park the run, if that takes long."""
        ends = [call.blocked.until for call in blocked if call.blocked is not None and call.blocked.until]
        left = (min(ends) - self.pending.now()).total_seconds() if ends else None
        # A delay of just PARK_AFTER may have been drawn out by its 10 %.
        if left is None or left > options().PARK_AFTER * 1.1:
            try:
                found = await in_thread(partial(park, self.pending, blocked))
            except Exception as error:
                blocked[0].show(Result(error=error))
                return True
            for call in found:
                call.go()
            return True
        lease = self.context.lease
        if not lease.stored:
            # A test's wait moves the clock.
            await in_thread(lambda: lease.wait(max(0.0, left)))
        return not lease.stored

    def _pause(self) -> float | None:
        """Seconds until something is to be looked at; None: that is not known."""
        looks = [call.look_at for call in self.pending.in_state(State.BLOCKED) if call.look_at is not None]
        return max(0.001, (min(looks) - self.pending.now()).total_seconds()) if looks else None

    async def _change(self, seconds: float | None) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.pending.changed.wait()
