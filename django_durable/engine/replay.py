"""A run's execution: the function from the top, its recorded steps answered from memory, and how it ended."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple

from django.db import connections

from django_durable import compat, signals
from django_durable.clock import DatabaseNow
from django_durable.compat import Trouble
from django_durable.conf import options
from django_durable.engine import checkpoints, claims, endings, payloads, steering
from django_durable.engine.asynchronous.attempts import ExecuteOnLoop, hands_over
from django_durable.engine.asynchronous.body import Body
from django_durable.engine.asynchronous.driver import drive
from django_durable.engine.asynchronous.threads import in_thread
from django_durable.engine.bell import ring_after_commit
from django_durable.engine.calls import is_async
from django_durable.engine.claims import Claim
from django_durable.engine.context import RunContext, current_run, inside, is_busy
from django_durable.engine.leases import Lease, hand_back
from django_durable.engine.retries import RetryPolicy, jittered
from django_durable.exceptions import (
    Cancelled,
    ContinueAsNew,
    Crash,
    DurableError,
    Halt,
    LeaseLost,
    NonDeterminism,
    Parked,
    QueryOutsideStep,
    RunFailed,
    SerializationError,
)
from django_durable.models import WorkflowRun
from django_durable.serialization import describe_exception, dump_exception, load_exception
from django_durable.states import RunStatus


class End(NamedTuple):
    """How an execution ended its run: with a value, or with an error."""

    value: Any = None
    error: BaseException | None = None


def execute(claim: Claim, lease: Lease) -> End | None:
    """Replay a claimed run and store how it ended; None: it has not ended, or not here."""
    if is_async(claim.definition.func) and hands_over():
        raise ExecuteOnLoop(partial(aexecute, claim, lease))
    context = enter(claim, lease)
    value, error = None, None
    try:
        try:
            with inside(context), _strict(context):
                args, kwargs = begin(context)
                value = _call_body(context, args, kwargs)
        except BaseException as raised:
            error = raised
        return conclude(context, value, error)
    finally:
        leave(context)


async def aexecute(claim: Claim, lease: Lease) -> End | None:
    """`execute` of an async workflow on the running loop, with the database work in its thread.

    If who awaits it is cancelled, the run is handed back, and a worker goes on with it.
    """
    context = enter(claim, lease)
    body = Body(context)
    execution = asyncio.get_running_loop().create_task(_execute_here(context, body))
    cancelled = None
    while not execution.done():
        try:
            await asyncio.wait({execution})
        except asyncio.CancelledError as error:
            cancelled = error
            body.leave()
    if cancelled is not None:
        raise cancelled
    return execution.result()


async def _execute_here(context: RunContext, body: Body) -> End | None:
    value, error = None, None
    strict = ExitStack()

    def start() -> tuple[list[Any], dict[str, Any]]:
        with inside(context):
            strict.enter_context(_strict(context))
            return begin(context)

    def finish() -> End | None:
        strict.close()
        return conclude(context, value, error)

    try:
        try:
            args, kwargs = await in_thread(start)
            value = await body.run(args, kwargs)
        except BaseException as raised:
            error = raised
        return await in_thread(finish)
    finally:
        leave(context)


def _call_body(context: RunContext, args: list[Any], kwargs: dict[str, Any]) -> Any:
    function = context.definition.func
    if is_async(function):
        return drive(context, args, kwargs)
    return function(*args, **kwargs)


def enter(claim: Claim, lease: Lease) -> RunContext:
    """Let this process execute the run, until `leave`."""
    context = RunContext(claim.run, claim.definition, lease, claim.recorded, lease.alias)
    lease.active[context.run_id] = context
    return context


def leave(context: RunContext) -> None:
    if context.branches is not None:
        context.branches.close()
    # After a takeover the same process may have claimed the run again, in another thread.
    active = context.lease.active
    if active.get(context.run_id) is context:
        del active[context.run_id]


def begin(context: RunContext) -> tuple[list[Any], dict[str, Any]]:
    """Return the arguments that the body is called with; raise what ends the execution before it."""
    if context.attempt == 1:
        _announce_start(context)
    # Its deadline may have passed while it waited.
    context.guard()
    try:
        with inside(context, busy=True):
            return payloads.load_input(context.run_id, context.run.input)
    except SerializationError as error:
        raise Halt(error) from error


def conclude(context: RunContext, value: Any, error: BaseException | None) -> End | None:
    """Store how the body ended: with a value, or with an error."""
    error = _reason(context, error)
    if error is None:
        return _succeed(context, value)
    if isinstance(error, Parked):
        return None
    if isinstance(error, LeaseLost):
        # If the table still says it is ours, nobody else would ever take it.
        _give_back(context, crashed=error.crashed)
        return None
    if isinstance(error, Cancelled):
        if context.cancelling is not None:
            held = WorkflowRun.objects.using(context.alias).held(context.run_id, context.attempt)
            reason = context.cancelling
            cancel = partial(endings.cancel, context.alias, context.run_id, held, reason)
            endings.tell_cancelled(context.alias, checkpoints.persist(context, cancel))
        return None
    if isinstance(error, ContinueAsNew):
        return _continue(context, error)
    if isinstance(error, Halt):
        return _halt(context, error.error)
    if isinstance(error, Crash):
        raise error
    if isinstance(error, Exception):
        return _fail(context, error)
    # In a worker's thread SystemExit and its like are the workflow's own. Elsewhere they end the process.
    if context.lease.kind == "worker" and not isinstance(error, KeyboardInterrupt):
        return _fail(context, error)
    _give_back(context)
    raise error


def _reason(context: RunContext, error: BaseException | None) -> BaseException | None:
    """Why the execution ends: what the body has swallowed, or covered with its own error, ends it all the same."""
    if error is not None and not isinstance(error, Exception | ContinueAsNew):
        if not isinstance(error, Crash):
            # What runs beside the body is recorded before others may execute the run.
            with suppress(Halt, LeaseLost, Cancelled, Parked):
                context.join_branches()
        return error
    try:
        context.join_branches()
        if context.ended is not None:
            return context.ended
        if context.cancelling is not None:
            return Cancelled(context.cancelling)
        error = context.continuing if error is None else error
        if error is None or isinstance(error, ContinueAsNew):
            context.check_end()
    except (Halt, LeaseLost) as reason:
        return reason
    return error


# -- How it ends ------------------------------------------------------------------------------------------------


def _succeed(context: RunContext, value: Any) -> End | None:
    try:
        output = payloads.dump(value, f"The result of run {context.run_id}")
    except SerializationError as error:
        return _fail(context, error)
    if not _end(context, RunStatus.SUCCEEDED, output=output, error=""):
        return None
    return End(value=payloads.load(output, f"The result of run {context.run_id}"))


def _fail(context: RunContext, error: BaseException) -> End | None:
    """Store the failure: as the end, or as a try that will be repeated after a delay."""
    a_steps = any(shown is error for shown, *_ in context.delivered)
    if context.lease.stored and not a_steps and compat.trouble(error, broken=True) is Trouble.LOST:
        # The body met a database that went away. That is a crash of the connection, not the workflow's failure.
        connections[context.alias].close()
        _give_back(context, crashed=True)
        return None
    final = RetryPolicy.final(error)
    run, retry = context.run, context.definition.retry
    failures = run.failures + 1
    origin = context.failure_origin(error)
    stored: dict[str, Any] = {
        "failures": failures,
        "error": describe_exception(error),
        "failed_step": origin[0] if origin else None,
        "failed_horizon": origin[1] if origin else None,
    }
    delay = retry.wait(error, failures)
    if delay is not None:
        _retry_later(context, jittered(delay), origin, **stored)
        return None
    exception = dump_exception(final)
    if not _end(context, RunStatus.FAILED, exception=exception, **stored):
        return None
    return End(error=failure_of(context.run_id, exception).with_traceback(error.__traceback__))


def _continue(context: RunContext, error: ContinueAsNew) -> End | None:
    """End the run, and store the one that goes on for it, with the messages that nobody has read."""
    run, alias = context.run, context.alias

    def write() -> bool:
        with compat.write_transaction(alias):
            endings.lock_parent(alias, run.pk)
            # Senders hold the row's existence: those before us are seen, those behind us see where the run went.
            if not checkpoints.still_held(context):
                return False
            made = steering.go_on_as_new(alias, run, error.text)
            changes: dict[str, Any] = {"continued_as": made, "finished_at": DatabaseNow(), "error": ""}
            WorkflowRun.objects.using(alias).held(run.pk, run.attempt).move(RunStatus.SUCCEEDED, **changes)
            return True

    if _ours(context, write, RunStatus.SUCCEEDED):
        endings.announce_end(alias, run.pk, run.workflow, RunStatus.SUCCEEDED, context.lease.id, run.attempt)
        ring_after_commit(alias)
    return None


def failure_of(run_id: str, exception: str) -> BaseException:
    """What a FAILED run's result raises: its own exception, or the RunFailed that stands for it."""
    error = load_exception(exception, otherwise=partial(RunFailed, run_id))
    # A run that ended with SystemExit in a worker must not end the process of whoever asks for its result.
    return error if isinstance(error, Exception) else RunFailed(run_id, type(error).__name__, str(error))


def _halt(context: RunContext, error: DurableError) -> End | None:
    """The code no longer fits the history, or a stored value cannot be read: no retry would change that."""
    if not isinstance(error, NonDeterminism):
        return _fail(context, error)
    claims.set_aside(context.lease, context.run, error)
    return None


def _end(context: RunContext, to: RunStatus, **changes: Any) -> bool:
    """Store the run's end if it still is ours; False: it was cancelled, or another owns it."""

    def write() -> bool:
        return endings.end_held(context.alias, context.run_id, context.attempt, to, **changes)

    if not _ours(context, write, to):
        return False
    run = context.run
    endings.announce_end(context.alias, run.pk, run.workflow, to, context.lease.id, context.attempt)
    return True


def _retry_later(context: RunContext, delay: float, origin: tuple[int, int] | None, **changes: Any) -> None:
    """Let the run wait for its next attempt, if it still is ours."""

    def write() -> bool:
        wake_at = DatabaseNow(timedelta(seconds=delay))
        with compat.write_transaction(context.alias):
            held = WorkflowRun.objects.using(context.alias).held(context.run_id, context.attempt)
            if not held.move(RunStatus.WAITING, wake_at=wake_at, waiting_for="retry", worker="", **changes):
                return False
            steering.rewind(context.alias, context.run_id, origin)
        return True

    _ours(context, write, RunStatus.WAITING)


def _ours(context: RunContext, write: Callable[[], bool], to: RunStatus) -> bool:
    """Store how this execution ended, through lost connections; False: the run was not ours any more."""
    asked = 0

    def ask() -> bool:
        nonlocal asked
        asked += 1
        if write():
            return True
        # Asked again after a lost answer: the first one may have arrived.
        same = WorkflowRun.objects.using(context.alias).filter(pk=context.run_id, attempt=context.attempt, status=to)
        return asked > 1 and same.exists()

    return bool(checkpoints.persist(context, ask))


def _give_back(context: RunContext, *, crashed: bool = False) -> None:
    """Make the run due again, if it still is ours."""
    held = WorkflowRun.objects.using(context.alias).held(context.run_id, context.attempt)
    with suppress(LeaseLost):
        checkpoints.persist(context, lambda: hand_back(held, crashed=crashed))


# -- Around it --------------------------------------------------------------------------------------------------


def _announce_start(context: RunContext) -> None:
    signals.run_started.send_robust(
        WorkflowRun,
        run_id=context.run_id,
        workflow=context.run.workflow,
        database=context.alias,
        worker=context.lease.id,
        attempt=context.attempt,
    )


@contextmanager
def _strict(context: RunContext) -> Iterator[None]:
    if not options().strict:
        yield
        return

    def check(run_query: Any, sql: str, params: Any, many: bool, more: Any) -> Any:
        # The thread of an async run may have other work beside it.
        if not is_busy() and (asks := current_run()) is not None:
            raise QueryOutsideStep(asks.run_id, sql)
        return run_query(sql, params, many, more)

    with ExitStack() as stack:
        for connection in connections.all():
            stack.enter_context(connection.execute_wrapper(check))
        yield
