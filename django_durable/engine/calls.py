"""What a workflow calls, in the order of its calls: each at a position of its own, recorded once.

`engine.stepper` executes the steps; a `Call` is everything else that is recorded: a timer, a message, an event,
another run's end. It acts, or finds what it waits for, in the same commit as its checkpoint; or the run is parked.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime, timedelta
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple

from asgiref.sync import iscoroutinefunction
from django.db import IntegrityError

from django_durable import compat
from django_durable.conf import options
from django_durable.engine import checkpoints, endings, payloads
from django_durable.engine.checkpoints import Outcome
from django_durable.engine.context import RunContext, before_step, current_body, current_run, inside
from django_durable.exceptions import (
    Halt,
    NonDeterminism,
    NotInWorkflow,
    Parked,
    RunIdInUse,
    RunNotFound,
    SerializationError,
    StepFailed,
)
from django_durable.models import StepCheckpoint, WorkflowRun
from django_durable.serialization import describe_exception, dump_exception, load_exception
from django_durable.states import OPEN_STEPS, RunStatus, StepKind, StepStatus

logger = logging.getLogger("django_durable.run")

# How often a run looks again at what nobody will tell it of: one of several runs of others, or in another database.
# Seconds.
LOOK_AGAIN = 5.0
# The pauses of a wait that is too short to be parked for, in seconds.
SHORTEST_PAUSE, LONGEST_PAUSE = 0.005, 0.1


def body(what: str) -> RunContext:
    """The run whose body this is; raise NotInWorkflow outside one, and inside a step."""
    context = current_body()
    if context is None:
        raise NotInWorkflow(f"{what}()", "outside a workflow" if current_run() is None else "inside a step")
    return context


def is_async(func: Callable[..., Any]) -> bool:
    """Whether a call of it has to be awaited."""
    return iscoroutinefunction(func) or iscoroutinefunction(getattr(func, "__call__", None))  # noqa: B004


class Slot:
    """A call of an async body, while a thread is at work for it; its position was given when it was called."""

    __slots__ = ("answered", "call", "context", "position", "stamp")

    def __init__(self, context: RunContext, position: int, stamp: Callable[[datetime], datetime]) -> None:
        self.context = context
        self.position = position
        # Makes the time of an outcome later than that of the one before: a replay shows them in this order.
        self.stamp = stamp
        # What is recorded of it by now, and the outcome that it has come to.
        self.call: Call | None = None
        self.answered: StepCheckpoint | None = None


_slot: ContextVar[Slot | None] = ContextVar("django_durable_slot", default=None)


def slot_of(context: RunContext) -> Slot | None:
    """The call of this run's async body that this thread is at work for."""
    slot = _slot.get()
    return slot if slot is not None and slot.context is context else None


@contextmanager
def at_work_for(slot: Slot) -> Iterator[None]:
    token = _slot.set(slot)
    try:
        yield
    finally:
        _slot.reset(token)


class Blocked(BaseException):
    """A call of an async body has to wait. Others may be under way: `engine.asynchronous` waits for them all at once.

    Without a `wait` it is a timer: a sleep, or the delay before a step's next try.
    """

    def __init__(self, key: str, until: datetime | None, wait: Wait | None = None) -> None:
        self.key = key
        self.until = until
        self.wait = wait
        super().__init__(f"waits for {key}")


def next_call(context: RunContext, name: str, kinds: Collection[str]) -> tuple[int, StepCheckpoint | None]:
    """Give this call its position; return that and what is recorded there: an outcome, or a try or wait to go on with.

    Unwinds the workflow if the run may not go on here, or if another call is recorded there.
    """
    slot = slot_of(context)
    if slot is not None:
        position = slot.position
    elif is_async(context.definition.func):
        raise TypeError(
            f"Workflow {context.definition.name!r} is an async function, which has to await what it calls: write "
            f"{_awaited_form(name, kinds)}."
        )
    else:
        position = context.next_position()
    refuse_if_ended(context, name)
    recorded = context.recorded.get(position)
    if recorded is not None and (recorded.name != name or recorded.kind not in kinds):
        called = name if recorded.name != name else f"{name} ({', '.join(sorted(kinds))})"
        found = recorded.name if recorded.name != name else f"{recorded.name} ({recorded.kind})"
        raise context.end(Halt(NonDeterminism(context.run_id, position, found, called)))
    return position, recorded


def refuse_if_ended(context: RunContext, name: str) -> None:
    """Unwind the workflow if it goes on although its execution has ended."""
    if context.ended is None:
        return
    if isinstance(context.ended, Parked):
        logger.error(
            "Run %s: %r was called in a finally or except block while the run was being parked. It was not "
            "executed: the block runs again each time the run is replayed, and the call counts when the run "
            "really gets there.",
            context.run_id,
            name,
            extra={"run_id": context.run_id, "workflow": context.run.workflow, "step": name},
        )
    raise context.ended


def _awaited_form(name: str, kinds: Collection[str]) -> str:
    """What an async body writes instead of a plain call."""
    verb, _, rest = name.partition(" ")
    if StepKind.STEP in kinds:
        return f"await {name}.acall(...), several of them with asyncio.gather()"
    if StepKind.CHILD in kinds:
        return f"await {rest}.astart(...)" if rest else f"await {name}.acall(...)"
    if StepKind.WAIT in kinds:
        return "await handle.aresult(...)" if rest else "await durable.await_(...)"
    if StepKind.STREAM in kinds:
        return "await stream.awrite(...) or await stream.aclose()"
    if {StepKind.SLEEP, StepKind.RECEIVE, StepKind.SEND, StepKind.EVENT}.isdisjoint(kinds):
        return f"the async form of {verb!r}, whose name begins with an a"
    return f"await durable.a{verb}(...)"


def answer(context: RunContext, recorded: StepCheckpoint, traceback: TracebackType | None = None) -> Any:
    """Return or raise a recorded outcome, the first time as on every replay.

    The first time an error still has its `traceback`, so that the run's own tells where it came from.
    """
    slot = slot_of(context)
    if slot is None:
        context.seen(recorded)
    else:
        # An async body sees it when its turn has come.
        slot.answered = recorded
    if recorded.status == StepStatus.FAILED:
        error = load_exception(recorded.exception, otherwise=partial(StepFailed, step=recorded.name))
        if slot is None:
            context.deliver(error, recorded.position)
        raise error.with_traceback(traceback)
    try:
        return payloads.load(recorded.output, f"Run {context.run_id}, step {recorded.position} ({recorded.name})")
    except SerializationError as error:
        raise context.end(Halt(error)) from error


# What is found of other runs is an answer, too: tomorrow there may be such a run, and a replay has to see today's.
ANSWERS = (RunNotFound, RunIdInUse)


def _failed(error: Exception) -> Outcome:
    return Outcome(StepStatus.FAILED, error=describe_exception(error), exception=dump_exception(error))


class _Refused(Exception):
    """The fence matched no row: rolls the call's transaction back."""


class Awaited(NamedTuple):
    """What a run waits for: the key under which it is woken, and the runs whose end or event would do it."""

    key: str
    runs: tuple[str, ...] = ()
    # Nobody tells: the run looks by itself every few seconds.
    look_again: bool = False


class Wait(NamedTuple):
    """What a call waits for, so that it can be looked at again."""

    call: Call
    look: Callable[[], Outcome | None]
    whom: Callable[[], Awaited]
    otherwise: Callable[[], Outcome] | None
    note: str


class Call:
    """One call of a workflow's body that is no step; taking it gives it its position."""

    def __init__(self, context: RunContext, name: str, kind: StepKind) -> None:
        self.context = context
        # As much as its column holds.
        self.name = name = name[:255]
        self.kind = kind
        self.position, self.recorded = next_call(context, name, [kind])
        self.started_at = context.lease.clock.now()
        if (slot := slot_of(context)) is not None:
            slot.call = self
        self.place = f"Run {context.run_id}, step {self.position} ({name})"

    @property
    def done(self) -> bool:
        """Whether its outcome is recorded."""
        return self.recorded is not None and self.recorded.status not in OPEN_STEPS

    @property
    def begun_at(self) -> datetime:
        """When it was called first, in this execution or in an earlier one."""
        return self.started_at if self.recorded is None else self.recorded.started_at

    def check(self) -> None:
        """Raise what keeps the run from going on here."""
        self.context.guard()
        for told in before_step:
            told(self.context, self.name)
        checkpoints.check_not_in_transaction(self.context, self.name)

    def answer(self) -> Any:
        """Return or raise the recorded outcome."""
        if self.recorded is None:
            raise AssertionError(f"{self.place} has no outcome yet")
        with inside(self.context, busy=True):
            return answer(self.context, self.recorded)

    def commit(self, act: Callable[[], Outcome], *, ends_at: datetime | None = None) -> StepCheckpoint:
        """Act in the run's database and record the outcome, in one commit; return the row that stands.

        `act` may be called again if the connection is lost: nothing of its first call was committed then, or its
        outcome is found and stands. `ends_at`: the outcome's time, if it is not now.
        """

        def write(act: Callable[[], Outcome] = act) -> StepCheckpoint | None:
            try:
                with compat.write_transaction(self.context.alias):
                    row = self.unsaved(act(), ends_at)
                    self._replace_open()
                    if not checkpoints.insert(self.context, row):
                        raise _Refused
                return row
            except _Refused:
                return None

        try:
            stored: StepCheckpoint = self._stored(write)
        except ANSWERS as error:
            stored = self._stored(partial(write, partial(_failed, error)))
        return stored

    def open(self, act: Callable[[], Outcome]) -> StepCheckpoint:
        """Act, and record that this call waits for what follows from it; return the row that stands."""
        return self.commit(act, ends_at=self.started_at)

    def wait(
        self,
        look: Callable[[], Outcome | None],
        whom: Callable[[], Awaited],
        *,
        timeout: float | None = None,
        otherwise: Callable[[], Outcome] | None = None,
        note: str = "",
    ) -> Any:
        """Return or raise the outcome that `look` finds; park the run while it finds none.

        `look` is called in a transaction that holds the run's row, and those of the runs that `whom` names: whoever
        makes true what is waited for has to lock one of these too, so that either it is seen here, or the run is
        seen waiting there. It may write: what it takes, it takes in the same commit as the outcome. After `timeout`
        seconds, kept over restarts, the outcome is that of `otherwise`. `note` is stored while it waits.
        """
        context, deadline = self.context, self._deadline(timeout)
        if slot_of(context) is not None:
            return self._wait_beside_others(Wait(self, look, whom, otherwise, note), deadline)
        pause = SHORTEST_PAUSE
        # What is there already is not kept waiting by steps that run beside the body.
        only_look = context.branches is not None
        while True:
            left = None if deadline is None else (deadline - context.lease.clock.now()).total_seconds()
            # Too short to leave the thread for it.
            stay = only_look or (left is not None and left <= options().PARK_AFTER)
            only_look = False
            if not stay:
                context.join_branches()

            def write(left: float | None = left, stay: bool = stay) -> StepCheckpoint | bool | None:
                with compat.write_transaction(context.alias):
                    looked = self.look_under_locks(look, whom)
                    if looked is None:
                        return None
                    outcome, awaited = looked
                    if outcome is None and left is not None and left <= 0 and otherwise is not None:
                        outcome = otherwise()
                    if outcome is not None:
                        return self.settle(outcome)
                    if not stay:
                        self._park(awaited, deadline, note)
                    return stay

            try:
                stored = self._stored(write)
            except ANSWERS as error:
                stored = self.commit(partial(_failed, error))
            if isinstance(stored, StepCheckpoint):
                return self.answer()
            if stored is False:
                raise context.end(Parked(f"run {context.run_id} waits"))
            context.lease.wait(min(pause, max(0.0, left or 0.0)))
            pause = min(LONGEST_PAUSE, pause * 2)

    def _wait_beside_others(self, wait: Wait, deadline: datetime | None) -> Any:
        """`wait` in an async body: look once. The thread is needed for the other calls that are under way."""
        late = deadline is not None and self.context.lease.clock.now() >= deadline

        def write() -> StepCheckpoint | bool | None:
            with compat.write_transaction(self.context.alias):
                looked = self.look_under_locks(wait.look, wait.whom)
                if looked is None:
                    return None
                outcome, _ = looked
                if outcome is None and late and wait.otherwise is not None:
                    outcome = wait.otherwise()
                return self.settle(outcome) if outcome is not None else False

        try:
            stored = self._stored(write)
        except ANSWERS as error:
            stored = self.commit(partial(_failed, error))
        if stored is False:
            if self.recorded is None or self.recorded.status != StepStatus.WAITING:
                # Not stored before the run is parked; but its deadline stands from now on.
                self.recorded = self.unsaved(Outcome(StepStatus.WAITING, output=wait.note), deadline or self.begun_at)
            raise Blocked(self.name, deadline, wait)
        return self.answer()

    def settle(self, outcome: Outcome) -> StepCheckpoint:
        """Store the outcome, in the caller's transaction, which holds the run's row."""
        row = self.unsaved(outcome)
        self._replace_open()
        checkpoints.insert(self.context, row, fence="none")
        return row

    def look_under_locks(
        self, look: Callable[[], Outcome | None], whom: Callable[[], Awaited]
    ) -> tuple[Outcome | None, Awaited] | None:
        """What is found under the locks of those who are to tell of it, and who they are; None: the run is not ours."""
        context = self.context
        runs = WorkflowRun.objects.using(context.alias)
        while True:
            awaited = whom()
            rows = runs.filter(pk__in=(context.run_id, *awaited.runs))
            if awaited.key == endings.ANY_CHILD:
                # Children that know of it lock their parent before they end, and that row is held here.
                rows = rows.exclude(awaited=True, parent=context.run_id)
            # A parent's id comes before its children's: that is the order in which a cancel takes them, too.
            found = compat.locked(rows).order_by("pk").values_list("pk", "attempt", "status")
            if (context.run_id, context.attempt, RunStatus.RUNNING) not in list(found):
                return None
            outcome = look()
            # One that ended before it was locked tells nobody any more: then there is another to wait for.
            if outcome is not None or whom() == awaited:
                return outcome, awaited

    def _deadline(self, timeout: float | None) -> datetime | None:
        if self.recorded is not None and self.recorded.status == StepStatus.WAITING:
            # It has begun to wait in an earlier execution.
            until = self.recorded.finished_at
            return until if until > self.recorded.started_at else None
        return None if timeout is None else self.started_at + timedelta(seconds=timeout)

    def _park(self, awaited: Awaited, deadline: datetime | None, note: str) -> None:
        """Make the run WAITING, and this call with it, in the caller's transaction, which holds the rows."""
        context = self.context
        wake_at = deadline
        if awaited.look_again:
            soon = context.lease.clock.now() + timedelta(seconds=LOOK_AGAIN)
            wake_at = soon if deadline is None else min(soon, deadline)
        wake_at = context.wake_by(wake_at)
        changes: dict[str, Any] = {"wake_at": wake_at, "waiting_for": awaited.key, "worker": ""}
        runs = WorkflowRun.objects.using(context.alias)
        runs.move_held(context.run_id, context.attempt, RunStatus.WAITING, **changes)
        self.begin_to_wait(awaited, deadline, note)

    def begin_to_wait(self, awaited: Awaited, deadline: datetime | None, note: str) -> None:
        """Store that the call waits, and let those that it waits for know, in a transaction that holds the rows."""
        if awaited.runs:
            targets = WorkflowRun.objects.using(self.context.alias).filter(pk__in=awaited.runs)
            if awaited.key == endings.ANY_CHILD:
                targets = targets.filter(awaited=False)
            # Also where the mark is there: a transaction that sees an older state than this, and so not who waits,
            # is refused the lock of a row that has changed.
            targets.update(awaited=True)
        recorded = self.recorded
        if recorded is None or recorded.status != StepStatus.WAITING or recorded._state.adding:
            self._replace_open()
            row = self.unsaved(Outcome(StepStatus.WAITING, output=note), deadline or self.begun_at)
            checkpoints.insert(self.context, row, fence="none")

    def _stored(self, write: Callable[[], Any]) -> Any:
        """What `write` stored, or another's outcome that stands in its place; through lost connections."""
        context = self.context
        self.check()

        def write_once() -> Any:
            try:
                return write()
            except IntegrityError:
                # The answer to our own COMMIT was lost, or another has executed the run meanwhile.
                stands = checkpoints.found(context, self.position, also_open=True)
                if stands is None:
                    raise
                return stands

        with inside(context, busy=True):
            stored = checkpoints.persist(context, write_once)
        if stored is None:
            raise checkpoints.lost(context)
        if isinstance(stored, StepCheckpoint):
            stored._state.adding = False
            self.recorded = stored
            if stored.status not in OPEN_STEPS:
                checkpoints.announce(context, stored)
        return stored

    def _replace_open(self) -> None:
        if self.recorded is not None:
            checkpoints.drop_try(self.context, self.position)

    def unsaved(self, outcome: Outcome, ends_at: datetime | None = None) -> StepCheckpoint:
        """The row of an outcome."""
        row = checkpoints.checkpoint(
            self.context,
            self.position,
            self.name,
            self.kind,
            outcome,
            attempts=1,
            started_at=self.begun_at,
        )
        if ends_at is not None:
            row.finished_at = ends_at
        elif (slot := slot_of(self.context)) is not None:
            row.finished_at = slot.stamp(row.finished_at)
        return row
