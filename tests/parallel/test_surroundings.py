"""What is around a parallel step; where there is no workflow, or an async one; and the page's examples."""

import threading

import pytest
from django.db import connections

import django_durable as durable
from django_durable.engine import context as engine_context
from django_durable.engine import registry
from django_durable.models import WorkflowRun
from django_durable.testing import run_until_idle
from tests.app.models import Account
from tests.docs.pages import blocks
from tests.parallel.common import (
    PATIENCE,
    Declined,
    calls,
    for_real,
    history,
    in_a_test,
    in_turn,
    pay,
    square,
    squares,
    threads_of_steps,
    told_of_records,
    turns,
)
from tests.threads import elsewhere

# -- What is around a step --------------------------------------------------------------------------------------------


@durable.step(name="where", atomic=False)
def where(number):
    here = durable.current()
    barrier_of_two.wait(PATIENCE)
    # Both are in their steps now: each still sees its own.
    assert durable.current() == here
    here.logger.info("here")
    return [here.step, here.attempt, here.idempotency_key]


@durable.workflow(name="tests.parallel.wheres")
def wheres():
    found = where.map(range(2))
    return [*found, durable.current().step]


@for_real
def test_each_thread_is_in_a_step_of_its_own(settings):
    global barrier_of_two
    barrier_of_two = threading.Barrier(2)
    assert wheres.using(run_id="w")() == [["where", 1, "w:1"], ["where", 1, "w:2"], None]


@pytest.mark.parametrize(
    "in_threads", [pytest.param(True, marks=for_real), pytest.param(False, marks=in_a_test)], ids=["threads", "alone"]
)
def test_strict_lets_parallel_steps_query_and_the_body_not(settings, in_threads):
    settings.DURABLE = {"STRICT": True}
    account = Account.objects.create(name="Ada")

    @durable.step(name="find")
    def find(pk):
        return Account.objects.get(pk=pk)

    @durable.workflow(name="tests.parallel.strict")
    def strict(query):
        found = find.map([account.pk] * 3)
        future = find.submit(account.pk)
        if query:
            Account.objects.count()
        return [*found, future.result()]

    assert strict(False) == [account] * 4
    with pytest.raises(durable.QueryOutsideStep):
        strict(True)


@for_real
def test_whoever_is_told_of_steps_is_told_of_parallel_ones():
    told, recorded = [], []
    engine_context.before_step.append(lambda context, name: told.append(name))
    try:
        with told_of_records(lambda facts: recorded.append((facts["position"], facts["status"]))):
            squares(4)
    finally:
        engine_context.before_step.pop()
    assert told == ["square"] * 7 + ["last"]
    assert sorted(recorded) == [(position, "SUCCEEDED") for position in range(1, 9)]


@for_real
def test_a_child_may_have_parallel_steps_beside_its_parents():
    @durable.workflow(name="tests.parallel.child")
    def child():
        found = square.map(range(4))
        turns.gates[1].set()
        return found

    @durable.workflow(name="tests.parallel.parent")
    def parent():
        # It cannot end before the child's steps have.
        future = in_turn.submit("a")
        return [child(), future.result()]

    turns.start((1,))
    turns.gates[1].clear()
    assert parent() == [[0, 1, 4, 9], "A"]
    assert threads_of_steps() == []


# -- Where there is no workflow ---------------------------------------------------------------------------------------


def use_plainly():
    good, bad = pay.submit("a"), pay.submit("bad")
    assert good.result() == good.result(timeout=0) == "paid by a"
    with pytest.raises(Declined):
        bad.result()
    return square.map([1, 2])


@in_a_test
def test_outside_a_workflow_they_are_plain_calls():
    assert use_plainly() == [1, 4]
    assert calls == ["a", "bad", 1, 2]
    with pytest.raises(Declined):
        pay.map(["b", "bad 2", "never"])
    assert not WorkflowRun.objects.exists()


@for_real
def test_inside_another_step_they_are_part_of_it():
    @durable.step(name="outer")
    def outer():
        return use_plainly()

    @durable.workflow(name="tests.parallel.outer")
    def run_outer():
        return outer()

    assert run_outer() == [1, 4]
    assert history() == [(1, "outer", "SUCCEEDED")]


@for_real
def test_a_result_is_for_the_body_that_submitted_the_step():
    @durable.step(name="asks", atomic=False)
    def asks():
        return kept[0].result()

    @durable.workflow(name="tests.parallel.hands_over")
    def hands_over():
        kept.append(square.submit(2))
        asks()

    @durable.workflow(name="tests.parallel.takes_over")
    def takes_over():
        kept[0].result()

    kept = []
    with pytest.raises(durable.NotInWorkflow, match="inside a step"):
        hands_over()
    with pytest.raises(durable.NotInWorkflow, match="in another run"):
        takes_over()
    with pytest.raises(durable.NotInWorkflow, match="outside a workflow"):
        elsewhere(kept[0].result)
    assert connections["default"].connection is not None


# -- Async code -------------------------------------------------------------------------------------------------------


@in_a_test
def test_in_an_async_workflow_the_error_says_what_to_write_instead():
    @durable.workflow(name="tests.parallel.in_async")
    async def in_async():
        return square.map([1, 2])

    run = in_async.start()
    run_until_idle()
    with pytest.raises(TypeError, match=r"asyncio\.gather"):
        run.result(timeout=0)
    assert calls == []


@in_a_test
@pytest.mark.parametrize("use", [lambda step: step.submit(1), lambda step: step.map([1])], ids=["submit", "map"])
def test_an_async_step_is_for_gather_and_not_for_threads(use):
    @durable.step(name="async_step", atomic=False)
    async def async_step(number): ...

    @durable.workflow(name="tests.parallel.async_step")
    def uses_it():
        use(async_step)

    for attempt in (uses_it, lambda: use(async_step)):
        with pytest.raises(TypeError, match=r"'async_step' is an async function.*asyncio\.gather"):
            attempt()


# -- The documentation ------------------------------------------------------------------------------------------------


@for_real
def test_the_examples_of_the_page_do_what_it_says(monkeypatch):
    monkeypatch.setattr(registry, "_workflows", dict(registry._workflows))
    page, namespace = "docs/how-to/parallel-steps.md", {"__name__": "an_example"}
    for block in blocks(page):
        exec(compile(block.text, f"{page}, {block.section}", "exec"), namespace)
    assert set(WorkflowRun.objects.values_list("status", flat=True)) == {"SUCCEEDED"}
    assert WorkflowRun.objects.count() == 3
