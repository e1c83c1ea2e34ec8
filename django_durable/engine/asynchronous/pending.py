"""The calls of an async body that wait for their outcomes: where each stands, and when its outcome came about."""

from __future__ import annotations

import asyncio
from contextvars import copy_context
from datetime import UTC, datetime, timedelta
from typing import Any

from django_durable.engine.asynchronous.attempts import Attempts
from django_durable.engine.asynchronous.threads import Result, result_of
from django_durable.engine.calls import SHORTEST_PAUSE, Blocked, Slot
from django_durable.engine.context import RunContext
from django_durable.exceptions import Cancelled, ContinueAsNew, Crash, Halt, LeaseLost, Parked
from django_durable.models import StepCheckpoint
from django_durable.states import OPEN_STEPS, StepKind

# How long a call that is looked at again beside others that are under way is left alone at most, in seconds.
LONGEST_LOOK = 1.0

# What ends an execution, and no step's own error.
UNWINDING = (Cancelled, ContinueAsNew, Crash, Halt, LeaseLost, Parked)


class State:
    """Of a call: where it stands."""

    # Not begun: it may have no outcome yet, or one that is recorded.
    NEW = "new"
    # Something is at work for it.
    UNDER_WAY = "under way"
    # It waits for a time, or for others.
    BLOCKED = "blocked"
    # Its outcome waits for its turn to be shown.
    READY = "ready"


class PendingCalls:
    """The calls of one async body that wait for their outcomes, and the order in which those come about."""

    loop: asyncio.AbstractEventLoop

    def __init__(self, context: RunContext) -> None:
        self.context = context
        self.by_position: dict[int, PendingCall] = {}
        # At work for calls that the body has cancelled.
        self.abandoned: set[asyncio.Task[Any]] = set()
        self.changed = asyncio.Event()
        # Counts calls, and outcomes that were shown: what others may follow from at once.
        self.activity = 0
        outcomes = [step for step in context.recorded.values() if step.status not in OPEN_STEPS]
        # What of the history was not shown to the body yet.
        self.unseen = {step.position for step in outcomes}
        # A sleep's outcome has the time of its end.
        times = [step.finished_at for step in outcomes if step.kind != StepKind.SLEEP]
        self.last = max(times, default=datetime.min.replace(tzinfo=UTC))

    def stamp(self, moment: datetime) -> datetime:
        """Return the moment, or one behind all outcomes so far: clocks differ, and one may be set back."""
        self.last = max(moment, self.last + timedelta(microseconds=1))
        return self.last

    def now(self) -> datetime:
        return self.context.lease.clock.now()

    def in_state(self, state: str) -> list[PendingCall]:
        """Those that stand there, in the order in which they were made."""
        found = [self.by_position[position] for position in sorted(self.by_position)]
        return [call for call in found if call.state == state]

    def note_activity(self) -> None:
        self.activity += 1
        self.changed.set()


class PendingCall:
    """One call of an async body, from when it is awaited to when it is shown its outcome."""

    def __init__(self, calls: PendingCalls, position: int, name: str, attempts: Attempts) -> None:
        self.calls = calls
        self.position = position
        self.name = name
        self.attempts = attempts
        self.state = State.NEW
        # What is done for it is done in the context of who awaits it.
        self.scope = copy_context()
        self.future: asyncio.Future[Result] = calls.loop.create_future()
        self.task: asyncio.Task[None] | None = None
        self.result = Result()
        self.outcome: StepCheckpoint | None = None
        self.blocked: Blocked | None = None
        self.pause = SHORTEST_PAUSE
        self.look_at: datetime | None = None

    @property
    def recorded(self) -> StepCheckpoint | None:
        """Its recorded outcome."""
        found = self.calls.context.recorded.get(self.position)
        return found if found is not None and found.status not in OPEN_STEPS else None

    @property
    def finished(self) -> tuple[datetime, int]:
        """When its outcome came about: outcomes are shown in this order."""
        outcome = self.outcome or self.recorded
        return (outcome.finished_at if outcome is not None else self.calls.last, self.position)

    def go(self) -> None:
        """Begin, or look again."""
        self.state = State.UNDER_WAY
        self.task = self.calls.loop.create_task(self._go(), context=self.scope)

    async def _go(self) -> None:
        calls, slot = self.calls, Slot(self.calls.context, self.position, self.calls.stamp)
        try:
            result = await result_of(self.attempts.attempt(slot))
        finally:
            calls.changed.set()
        self.outcome = slot.answered
        if slot.call is not None and slot.call.recorded is not None:
            # The next look, in this execution, goes on from what is known now.
            calls.context.recorded[self.position] = slot.call.recorded
        if isinstance(result.error, Blocked):
            self._block(result.error)
            return
        if isinstance(result.error, UNWINDING):
            calls.context.end(result.error)
        self.result = result
        self.state = State.READY

    def _block(self, blocked: Blocked) -> None:
        self.state, self.blocked = State.BLOCKED, blocked
        if blocked.wait is None:
            self.look_at = blocked.until
            return
        self.look_at = self.calls.now() + timedelta(seconds=self.pause)
        self.pause = min(LONGEST_LOOK, self.pause * 2)
        if blocked.until is not None:
            self.look_at = min(self.look_at, blocked.until)

    def show(self, result: Result) -> None:
        """Let the body go on with this."""
        self.calls.by_position.pop(self.position, None)
        self.calls.note_activity()
        if not self.future.done():
            self.future.set_result(result)
