"""A workflow that async code awaits: its run is stored, executed on the caller's own loop, and waited for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

from django.db import connections

from django_durable import compat
from django_durable.engine import claims, operations, registry, steering
from django_durable.engine.asynchronous.threads import in_thread
from django_durable.engine.calls import is_async
from django_durable.engine.claims import Claim
from django_durable.engine.heartbeat import inline_lease
from django_durable.engine.leases import Lease, bury, of_this_process, recover
from django_durable.engine.replay import End, aexecute, execute
from django_durable.engine.starting import StartOptions, check_same_workflow, database_of, hold, new_run
from django_durable.exceptions import InsideTransaction
from django_durable.states import RunStatus

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


async def acall(definition: registry.Definition, given: StartOptions, arguments: Callable[[], Arguments]) -> Any:
    """`operations.call` of an async workflow, on the running loop.

    `arguments` is called in the database thread: a form that looks at them may ask the database.
    """
    lease, run_id, claim = await in_thread(partial(_store, definition, given, arguments))
    if claim is not None and (end := await aexecute(claim, lease)) is not None:
        return operations.value_of(end)
    return operations.value_of(await _finish_here(lease, run_id))


def _store(
    definition: registry.Definition, given: StartOptions, arguments: Callable[[], Arguments]
) -> tuple[Lease, str, Claim | None]:
    """Store the run; return the claim of one that is ours to execute here and now."""
    alias = database_of(given.database)
    if compat.in_users_transaction(connections[alias]):
        raise InsideTransaction(definition.name, alias)
    run = new_run(definition, given, *arguments())
    lease = inline_lease(alias)
    if run.status == RunStatus.PENDING:
        hold(run, lease)
    if not operations.insert_surely(lease, run, idempotent=given.run_id is not None):
        check_same_workflow(alias, run.pk, definition)
        return lease, run.pk, None
    return lease, run.pk, Claim(run, definition, {}) if run.status == RunStatus.RUNNING else None


async def _finish_here(lease: Lease, run_id: str) -> End:
    """Wait for a run's end, executing it here whenever it is due and nobody else does: there may be no worker.

    Between two looks the loop and the database thread are free.
    """
    for count, pause in enumerate(operations.pauses()):
        end, run_id, lease, claimed = await in_thread(partial(_look, lease, run_id, count))
        if end is not None:
            return end
        for claim in claimed:
            if is_async(claim.definition.func):
                end = await aexecute(claim, lease)
            else:
                end = await in_thread(partial(execute, claim, lease))
            if end is not None and claim.run.pk == run_id:
                return end
        if lease.stored or _others_at_work(lease):
            await asyncio.sleep(pause)
        elif not claimed:
            await in_thread(partial(_let_time_pass, lease, run_id))
    raise AssertionError("unreachable: pauses() has no end")


def _look(lease: Lease, run_id: str, count: int) -> tuple[End | None, str, Lease, list[Claim]]:
    alias = lease.alias
    if (end := operations.look(alias, run_id)) is not None:
        return end, run_id, lease, []
    run_id = steering.latest(alias, run_id)
    if count % 4 == 0 and not _others_at_work(lease):
        bury(alias)
        recover(alias, spread=lease.stored)
        claims.cancel_overdue(alias)
    claims.wake_due(alias)
    lease = lease if lease.valid() else inline_lease(alias)
    claimed = claims.claim(lease, 1, run_id=run_id)
    if not claimed and (count >= operations.PATIENT_LOOKS or not lease.stored):
        claimed = operations.claim_awaited(lease, run_id)
    return None, run_id, lease, claimed


def _others_at_work(lease: Lease) -> bool:
    """In a test, whose leases have no rows: whether its loop executes other runs. They are not to be taken for dead."""
    return not lease.stored and any(other.active for other in of_this_process() if not other.stored)


def _let_time_pass(lease: Lease, run_id: str) -> None:
    lease.wait(operations.seconds_until_due(lease.alias, run_id))
