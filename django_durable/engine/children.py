"""Runs that a workflow starts, calls and waits for.

A child's id comes from its parent's, and both are stored in one commit. The end of a run and the wake-up of who waits
for it are one commit too (`engine.endings`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from hashlib import sha256
from itertools import count
from typing import Any, NamedTuple

from django_durable.engine import claims, endings, payloads, registry, starting, steering
from django_durable.engine.bell import ring_after_commit
from django_durable.engine.calls import Awaited, Call
from django_durable.engine.checkpoints import Outcome
from django_durable.engine.claims import Claim
from django_durable.engine.context import RunContext, inside
from django_durable.engine.replay import execute
from django_durable.engine.starting import StartOptions, database_of
from django_durable.exceptions import RunCancelled, RunDead, RunNotFound
from django_durable.models import WorkflowRun
from django_durable.serialization import describe_exception, dump_exception
from django_durable.states import FINISHED, RunStatus, StepKind, StepStatus

ID_LIMIT = 200
# How many runs one statement asks for.
BATCH = 500

# Called at the start alone: what a replay meets was looked at then.
Arguments = Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]


def start(context: RunContext, definition: registry.Definition, given: StartOptions, arguments: Arguments) -> str:
    """Start a child for a worker, exactly once; return its id."""
    call = Call(context, f"start {definition.name}", StepKind.CHILD)
    if not call.done:
        with inside(context, busy=True):
            stored = arguments()
        call.commit(lambda: _named(call, _store(call, definition, given, stored)))
        ring_after_commit(_database(context, given))
    child: str = call.answer()
    return child


def fork(context: RunContext, run_id: str, from_step: int) -> str:
    """Fork a run, exactly once; return the new one's id."""
    call = Call(context, f"fork {run_id}", StepKind.CHILD)
    if not call.done:
        call.commit(
            lambda: Outcome(
                StepStatus.SUCCEEDED, output=payloads.dump(steering.fork(context.alias, run_id, from_step), call.place)
            )
        )
    made: str = call.answer()
    return made


def call(context: RunContext, definition: registry.Definition, given: StartOptions, arguments: Arguments) -> Any:
    """Run a child here, if nobody else executes it, and return its result or raise its error; or park with it."""
    alias = _database(context, given)
    call = Call(context, definition.name, StepKind.CHILD)
    if call.done:
        return call.answer()
    # A lease is good for the runs of one database.
    lease, here = context.lease, alias == context.alias
    if call.recorded is None or not call.recorded.output:
        ours: list[WorkflowRun] = []
        with inside(context, busy=True):
            stored = arguments()

        def act() -> Outcome:
            ours.clear()
            run = _store(call, definition, given, stored, hold=here, ours=ours)
            return _named(call, run)._replace(status=StepStatus.WAITING)

        opened = call.open(act)
        # Behind a lost answer it is the first one that stands; what nobody executes is handed back by the lease.
        ours = [run for run in ours if run.status == RunStatus.RUNNING and opened.output == _named(call, run).output]
        if ours and opened.status == StepStatus.WAITING:
            # What the child's execution asks for itself is no query of this body.
            with inside(context, busy=True):
                end = execute(Claim(ours[0], definition, {}), lease)
            if end is not None and end.error is None:
                # It has ended before our eyes, and a run that has succeeded never changes.
                output = payloads.dump(end.value, call.place)
                call.commit(lambda: Outcome(StepStatus.SUCCEEDED, output=output))
    else:
        opened = call.recorded
        child = payloads.load(opened.output, call.place)
        with inside(context, busy=True):
            for claim in claims.claim(lease, 1, run_id=steering.latest(alias, child)) if here else ():
                execute(claim, lease)
    if call.done:
        return call.answer()
    return _result(call, alias, payloads.load(opened.output, call.place), None)


def result(context: RunContext, alias: str, run_id: str, timeout: float | None) -> Any:
    """Wait for a run's end; return its value or raise its error, or TimeoutError."""
    call = Call(context, f"result {run_id}"[:255], StepKind.WAIT)
    return call.answer() if call.done else _result(call, alias, run_id, timeout)


def wait(
    context: RunContext, handles: Sequence[tuple[str, str]], first: bool, timeout: float | None
) -> list[tuple[str, str]]:
    """Wait until all of these (database, id) runs have ended, or the first; return those that have."""
    call = Call(context, "wait", StepKind.WAIT)
    if call.done:
        return [tuple(pair) for pair in call.answer()]

    def left() -> dict[tuple[str, str], _Standing]:
        return {pair: run for pair, run in _standing(handles).items() if not run.over}

    def outcome() -> Outcome:
        waiting = left()
        over = [list(pair) for pair in handles if pair not in waiting]
        return Outcome(StepStatus.SUCCEEDED, output=payloads.dump(over, call.place))

    def look() -> Outcome | None:
        some = left()
        return outcome() if not some or (first and len(some) < len(handles)) else None

    def whom() -> Awaited:
        some = list(left().items())
        # The youngest is the last to end, most likely: the run is not woken for each of ten thousand.
        at_home = [run for (alias, _), run in (some if first else some[-1:]) if alias == context.alias]
        if len(at_home) == 1 and (len(some) == 1 or not first):
            return Awaited(endings.run_key(at_home[0].last), (at_home[0].last,))
        # Of several, a run's own children tell it; others, and those in another database, do not know whom to tell.
        own = tuple(run.last for run in at_home if run.parent == context.run_id)
        return Awaited(endings.ANY_CHILD, own, look_again=not first or len(own) < len(some))

    over = call.wait(look, whom, timeout=timeout, otherwise=outcome)
    return [tuple(pair) for pair in over]


def ended(handles: Sequence[tuple[str, str]]) -> set[tuple[str, str]]:
    """Those of the (database, id) runs that have ended; raise RunNotFound."""
    return {pair for pair, run in _standing(handles).items() if run.over}


class _Standing(NamedTuple):
    """The run that goes on for another, or that run itself; whose child it is, and whether it has ended."""

    last: str
    parent: str | None
    over: bool


def _standing(handles: Sequence[tuple[str, str]]) -> dict[tuple[str, str], _Standing]:
    """How each of the (database, id) runs stands, in their order; raise RunNotFound."""
    found: dict[tuple[str, str], _Standing] = {}
    for alias in {alias for alias, _ in handles}:
        runs = WorkflowRun.objects.using(alias)
        ids = [pk for at, pk in handles if at == alias]
        for start in range(0, len(ids), BATCH):
            some = runs.filter(pk__in=ids[start : start + BATCH]).order_by()
            for pk, status, parent, following in some.values_list("pk", "status", "parent_id", "continued_as"):
                last, over = pk, status in FINISHED
                if following:
                    last = steering.latest(alias, following)
                    over = runs.finished().filter(pk=last).exists()
                found[alias, pk] = _Standing(last, parent, over)
    for alias, run_id in handles:
        if (alias, run_id) not in found:
            raise RunNotFound(run_id, alias)
    return {pair: found[pair] for pair in handles}


def _result(call: Call, alias: str, run_id: str, timeout: float | None) -> Any:
    at_home = alias == call.context.alias
    note = payloads.dump(run_id, call.place)

    def whom() -> Awaited:
        last = steering.latest(alias, run_id)
        return Awaited(endings.run_key(last), (last,) if at_home else (), look_again=not at_home)

    def late() -> Outcome:
        error = TimeoutError(f"Run {run_id} has not ended after {timeout:g} s.")
        return Outcome(StepStatus.FAILED, error=describe_exception(error), exception=dump_exception(error))

    return call.wait(partial(_outcome, alias, run_id, note), whom, timeout=timeout, otherwise=late, note=note)


def _outcome(alias: str, run_id: str, note: str) -> Outcome | None:
    """What the run has come to, as the outcome of the call that waits for it; None: it has not ended."""
    run = WorkflowRun.objects.using(alias).filter(pk=steering.latest(alias, run_id)).first()
    if run is None:
        raise RunNotFound(run_id, alias)
    match run.status:
        case RunStatus.SUCCEEDED:
            return Outcome(StepStatus.SUCCEEDED, output=run.output)
        case RunStatus.FAILED:
            return Outcome(StepStatus.FAILED, output=note, error=run.error, exception=run.exception)
        case RunStatus.CANCELLED:
            error: Exception = RunCancelled(run_id, run.cancel_reason)
        case RunStatus.DEAD:
            error = RunDead(run_id, run.error)
        case _:
            return None
    return Outcome(StepStatus.FAILED, output=note, error=describe_exception(error), exception=dump_exception(error))


def _database(context: RunContext, given: StartOptions) -> str:
    return database_of(given.database) if given.database else context.alias


def _store(
    call: Call,
    definition: registry.Definition,
    given: StartOptions,
    arguments: tuple[tuple[Any, ...], dict[str, Any]],
    *,
    hold: bool = False,
    ours: list[WorkflowRun] | None = None,
) -> WorkflowRun:
    """Store the child, in the transaction of the call. With `hold`, as one that is executed here at once.

    A row that is new is put into `ours`: one that was there before may be somebody else's to execute.
    """
    context, alias = call.context, _database(call.context, given)
    run = starting.new_run(definition, given, *arguments)
    run.deadline = context.run.deadline
    if alias == context.alias:
        run.parent_id = context.run_id
    if hold and run.status == RunStatus.PENDING:
        starting.hold(run, context.lease)
    # Beside an id of the user's choice, and in another database, where a crash may come in between: the first stands.
    adopt = given.run_id is not None or alias != context.alias
    for number in count(1):
        # After a retry of the parent, a child of the course that was forgotten may have the id.
        suffix = f"{call.position}" if number == 1 else f"{call.position}-{number}"
        run.id = given.run_id or _child_id(context.run_id, suffix)
        if starting.insert(alias, run, idempotent=True):
            if ours is not None:
                ours.append(run)
            return run
        if adopt:
            starting.check_same_workflow(alias, run.pk, definition)
            return run
    raise AssertionError("unreachable: count() has no end")


def _named(call: Call, run: WorkflowRun) -> Outcome:
    return Outcome(StepStatus.SUCCEEDED, output=payloads.dump(run.pk, call.place))


def _child_id(parent: str, suffix: str) -> str:
    made = f"{parent}.{suffix}"
    return made if len(made) <= ID_LIMIT else f"{sha256(parent.encode()).hexdigest()}.{suffix}"
