"""Waits beside transactions that see an older state: PostgreSQL's REPEATABLE READ."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from django.db import OperationalError, connection, transaction

import django_durable as durable
from django_durable.compat import sqlstate
from django_durable.engine.sweep import wake_overlooked
from django_durable.models import WorkflowRun
from django_durable.testing import run_until_idle
from tests.app.models import Ledger
from tests.threads import elsewhere

pytestmark = pytest.mark.django_db(transaction=True)

# What happens once, elsewhere, while the step's transaction is open.
meanwhile: list[Callable[[], Any]] = []


@durable.workflow(name="tests.older_state.follow")
def follow(run: str) -> Any:
    return durable.get_event(run, "k")


@durable.workflow(name="tests.older_state.listen")
def listen() -> Any:
    return durable.receive()


@durable.workflow(name="tests.older_state.join")
def join(run: durable.RunHandle) -> str:
    try:
        return run.result()
    except durable.RunCancelled:
        return "cancelled"


@contextmanager
def repeatable_read() -> Iterator[None]:
    """What a careful view opens."""
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        yield


def see_an_older_state() -> None:
    """From its first query on the transaction sees that state and no later one; then the others go on."""
    Ledger.objects.count()
    if meanwhile:
        elsewhere(meanwhile.pop())


@durable.step(name="publish late", isolation="repeatable read")
def publish_late() -> None:
    see_an_older_state()
    durable.set_event("k", "published")


@durable.step(name="send late", isolation="repeatable read")
def send_late(run: durable.RunHandle) -> None:
    see_an_older_state()
    durable.send(run, "sent")


@durable.workflow(name="tests.older_state.publish")
def publish(before: int) -> None:
    me = durable.current().run_id
    durable.run_step("some wait", lambda: [elsewhere(lambda: follow.start(me).id) for _ in range(before)])
    durable.run_step("for a while", lambda: elsewhere(run_until_idle))
    publish_late()


@durable.workflow(name="tests.older_state.tell")
def tell(run: durable.RunHandle) -> None:
    send_late(run)


@pytest.mark.parametrize("before", [0, 1, 2])
def test_an_event_of_a_step_with_an_older_state_wakes_who_began_to_wait_meanwhile(before: int) -> None:
    def one_more() -> None:
        follow.start(WorkflowRun.objects.get(workflow="tests.older_state.publish").pk)
        run_until_idle()

    meanwhile[:] = [one_more]
    publish(before)
    assert wake_overlooked("default") == 0
    run_until_idle()
    followers = WorkflowRun.objects.filter(workflow="tests.older_state.follow")
    assert [(run.status, run.output) for run in followers] == [("SUCCEEDED", '"published"')] * (before + 1)


def test_a_message_of_a_step_with_an_older_state_wakes_who_began_to_wait_meanwhile() -> None:
    run = listen.start()
    meanwhile[:] = [run_until_idle]
    tell(run)
    assert wake_overlooked("default") == 0
    run_until_idle()
    assert run.result(0) == "sent"


@pytest.mark.parametrize("before", [0, 1])
def test_a_view_with_an_older_state_that_cancels_a_run_is_told_to_try_again(before: int) -> None:
    """It would not see who waits: the database says so, and nobody waits for ever."""
    run = listen.start()
    joining = [join.start(run) for _ in range(before)]
    run_until_idle()

    def one_more() -> None:
        joining.append(join.start(run))
        run_until_idle()

    @repeatable_read()
    def view() -> None:
        see_an_older_state()
        run.cancel()

    meanwhile[:] = [one_more]
    with pytest.raises(OperationalError) as refused:
        view()
    assert sqlstate(refused.value) == "40001"
    assert run.cancel()
    assert wake_overlooked("default") == 0
    run_until_idle()
    assert [each.result(0) for each in joining] == ["cancelled"] * (before + 1)
