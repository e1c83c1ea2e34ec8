"""A run's execution: the function from the top, its recorded steps answered from memory, and how it ended."""

from __future__ import annotations

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
from django_durable.engine import checkpoints, claims, payloads
from django_durable.engine.claims import Claim
from django_durable.engine.context import RunContext, enter, leave
from django_durable.engine.leases import Lease, hand_back
from django_durable.engine.retries import RetryPolicy, jittered
from django_durable.exceptions import (
    Cancelled,
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
from django_durable.models import StepCheckpoint, WorkflowRun
from django_durable.serialization import describe_exception, dump_exception, load_exception
from django_durable.states import RunStatus, StepStatus


class End(NamedTuple):
    """How an execution ended its run: with a value, or with an error."""

    value: Any = None
    error: BaseException | None = None


def execute(claim: Claim, lease: Lease) -> End | None:
    """Replay a claimed run and store how it ended; None: it has not ended, or not here."""
    run, definition, recorded = claim
    context = RunContext(run, definition, lease, recorded, lease.alias)
    lease.active[run.pk] = context
    entered = enter(context)
    try:
        if context.attempt == 1:
            _announce_start(context)
        # Its deadline may have passed while it waited.
        context.guard()
        args, kwargs = load_input(run)
        with _strict(context):
            try:
                value = definition.func(*args, **kwargs)
            except Exception as error:
                # What its cleaning up raises on the way out does not take the place of why it ends.
                if context.ended is not None:
                    raise context.ended from error
                if context.cancelling is not None:
                    raise Cancelled(context.cancelling) from error
                raise
            # What the body has swallowed ends it all the same.
            if context.ended is not None:
                raise context.ended
            if context.cancelling is not None:
                raise Cancelled(context.cancelling)
            context.check_end()
        return _succeed(context, value)
    except Parked:
        return None
    except LeaseLost as reason:
        # If the table still says it is ours, nobody else would ever take it.
        _give_back(context, crashed=reason.crashed)
        return None
    except Cancelled:
        if context.cancelling is not None:
            _settle(context, RunStatus.CANCELLED, cancel_reason=context.cancelling)
        return None
    except Halt as halt:
        return _halt(context, halt.error)
    except Crash:
        raise
    except Exception as error:
        return _fail(context, error)
    except BaseException as error:
        # In a worker's thread SystemExit and its like are the workflow's own. Elsewhere they end the process.
        if lease.kind == "worker" and not isinstance(error, KeyboardInterrupt):
            return _fail(context, error)
        _give_back(context)
        raise
    finally:
        leave(entered)
        # After a takeover the same process may have claimed the run again, in another thread.
        if lease.active.get(run.pk) is context:
            del lease.active[run.pk]


def dump_input(args: tuple[Any, ...], kwargs: dict[str, Any], workflow: str) -> str:
    return payloads.dump({"args": list(args), "kwargs": kwargs}, f"The arguments of workflow {workflow!r}")


def load_input(run: WorkflowRun) -> tuple[list[Any], dict[str, Any]]:
    try:
        stored = payloads.load(run.input, f"The arguments of run {run.pk}")
    except SerializationError as error:
        raise Halt(error) from error
    return stored["args"], stored["kwargs"]


# -- How it ends ------------------------------------------------------------------------------------------------


def _succeed(context: RunContext, value: Any) -> End | None:
    try:
        output = payloads.dump(value, f"The result of run {context.run_id}")
    except SerializationError as error:
        return _fail(context, error)
    if not _settle(context, RunStatus.SUCCEEDED, output=output, error=""):
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
        wake_at = DatabaseNow(timedelta(seconds=jittered(delay)))
        _settle(
            context,
            RunStatus.WAITING,
            also=lambda: rewind(context.alias, context.run_id, origin),
            wake_at=wake_at,
            waiting_for="retry",
            worker="",
            **stored,
        )
        return None
    exception = dump_exception(final)
    if not _settle(context, RunStatus.FAILED, exception=exception, **stored):
        return None
    return End(error=failure_of(context.run_id, exception).with_traceback(error.__traceback__))


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


def _settle(context: RunContext, to: RunStatus, also: Callable[[], None] | None = None, **changes: Any) -> bool:
    """Store the run's new status if it still is ours; False: it was cancelled, or another owns it."""
    if to is not RunStatus.WAITING:
        changes["finished_at"] = DatabaseNow()
    asked = 0

    def write() -> bool:
        nonlocal asked
        asked += 1
        runs = WorkflowRun.objects.using(context.alias)
        if also is None:
            moved = runs.move_held(context.run_id, context.attempt, to, **changes)
        else:
            with compat.write_transaction(context.alias):
                moved = runs.move_held(context.run_id, context.attempt, to, **changes)
                if moved:
                    also()
        # Asked again after a lost answer: the first one may have arrived.
        return bool(moved) or (
            asked > 1 and runs.filter(pk=context.run_id, attempt=context.attempt, status=to).exists()
        )

    if not checkpoints.persist(context, write):
        return False
    if to is not RunStatus.WAITING:
        claims.announce_end(context.run, context.alias, to, context.lease.id)
    return True


def _give_back(context: RunContext, *, crashed: bool = False) -> None:
    """Make the run due again, if it still is ours."""
    held = WorkflowRun.objects.using(context.alias).held(context.run_id, context.attempt)
    with suppress(LeaseLost):
        checkpoints.persist(context, lambda: hand_back(held, crashed=crashed))


def rewind(alias: str, run_id: str, origin: tuple[int, int] | None) -> None:
    """Let a retry execute the failed step anew, and forget the steps that followed from its error.

    Steps whose positions were given before the workflow saw the error (parallel ones) keep their outcomes; those
    given later belong to a course that the retry may not take. Call it in the transaction that makes the run due.
    """
    if origin is None:
        return
    position, horizon = origin
    steps = StepCheckpoint.objects.using(alias).filter(run=run_id)
    later = steps.filter(position__gt=horizon)
    for other in set(later.exclude(database="").values_list("database", flat=True)):
        StepCheckpoint.objects.using(other).filter(run=run_id, position__gt=horizon).delete()
    later.delete()
    steps.filter(position=position, status=StepStatus.FAILED).update(
        status=StepStatus.RETRYING, attempts=0, exception=""
    )


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
        if not context.busy:
            raise QueryOutsideStep(context.run_id, sql)
        return run_query(sql, params, many, more)

    with ExitStack() as stack:
        for connection in connections.all():
            stack.enter_context(connection.execute_wrapper(check))
        yield
