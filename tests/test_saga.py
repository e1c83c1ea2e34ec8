"""Sagas: what was done is undone when an error leaves the block, and a retry begins the block anew."""

import traceback

import pytest

import django_durable as durable
from django_durable.models import WorkflowRun
from django_durable.testing import advance, crash_after, crash_before, run_until_idle
from tests.app.models import Account, Ledger
from tests.app.workflows import times

pytestmark = pytest.mark.django_db

# What the outside world will do, by name: fail so many times more.
failing: dict[str, int] = {}
done: list[str] = []


@pytest.fixture(autouse=True)
def a_new_world():
    failing.clear()
    done.clear()


def happens(what):
    if failing.get(what, 0) > 0:
        failing[what] -= 1
        raise ConnectionError(f"{what} is down")
    done.append(what)


@durable.step(name="reserve")
def reserve(seat):
    Ledger.objects.create(key=f"{seat} reserved")
    done.append("reserve")


@durable.step(name="release")
def release(seat):
    Ledger.objects.create(key=f"{seat} released")
    happens("release")


@durable.step(name="charge", atomic=False)
def charge(seat):
    happens("charge")


@durable.step(name="refund", atomic=False, max_attempts=2, retry_delay=60)
def refund(seat):
    happens("refund")


@durable.step(name="ship", atomic=False)
def ship(seat):
    happens("ship")


def cancel_label(seat, *, printer):
    happens(f"label of {seat} on {printer} cancelled")


def buy(seat):
    with durable.saga() as undo:
        reserve(seat)
        undo.add(release, seat)
        charge(seat)
        undo.add(refund, seat)
        ship(seat)
    return "bought"


@durable.workflow(name="tests.saga.once")
def once(seat):
    return buy(seat)


@durable.workflow(name="tests.saga.again", max_attempts=4, retry_delay=5)
def again(seat):
    return buy(seat)


def drain(times=6):
    for _ in range(times):
        run_until_idle()
        advance("10 minutes")
    run_until_idle()


def steps(run):
    return [(step.name, step.status) for step in run.model.steps.all()]


def net(seat):
    """How often the seat is reserved and not released."""
    return times(f"{seat} reserved") - times(f"{seat} released")


# -- Undoing --------------------------------------------------------------------------------------------------------


def test_what_was_done_is_undone_in_reverse_order():
    failing["ship"] = 1
    run = once.start("A1")
    run_until_idle()
    with pytest.raises(ConnectionError, match="ship is down"):
        run.result(0)
    assert done == ["reserve", "charge", "refund", "release"]
    assert steps(run) == [
        ("reserve", "SUCCEEDED"),
        ("charge", "SUCCEEDED"),
        ("ship", "FAILED"),
        ("refund", "SUCCEEDED"),
        ("release", "SUCCEEDED"),
    ]


def test_only_what_was_done_is_undone():
    failing["charge"] = 1
    with pytest.raises(ConnectionError, match="charge is down"):
        once("A1")
    assert done == ["reserve", "release"]


def test_a_block_that_ends_well_is_not_undone():
    assert once("A1") == "bought"
    assert done == ["reserve", "charge", "ship"]


def test_a_plain_function_and_a_workflow_undo_too():
    @durable.workflow(name="tests.saga.child")
    def give_back(seat):
        release(seat)

    @durable.workflow(name="tests.saga.kinds")
    def kinds(seat):
        with durable.saga() as undo:
            undo.add(give_back, seat)
            undo.add(cancel_label, seat, printer="B")
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        kinds("A1")
    assert done == ["label of A1 on B cancelled", "release"]
    run = WorkflowRun.objects.get(workflow="tests.saga.kinds")
    assert [(step.name, step.kind) for step in run.steps.all()] == [
        ("cancel_label", "step"),
        ("tests.saga.child", "child"),
    ]


def test_a_failing_compensation_keeps_none_of_the_others_and_is_told():
    failing.update(ship=1, refund=9)
    run = once.start("A1")
    drain(2)
    assert run.status == "FAILED"
    with pytest.raises(ConnectionError, match="ship is down") as raised:
        run.result(0)
    assert raised.value.__notes__ == ["Its compensation refund failed: ConnectionError: refund is down"]
    assert "Its compensation refund failed" in "".join(traceback.format_exception(raised.value))
    assert "Its compensation refund failed" in run.model.error
    assert steps(run)[2:] == [("ship", "FAILED"), ("refund", "FAILED"), ("release", "SUCCEEDED")]


def test_a_compensation_is_retried_and_waits_as_any_step():
    failing.update(ship=1, refund=1)
    run = once.start("A1")
    run_until_idle()
    assert run.model.waiting_for == "retry:refund"
    advance("2 minutes")
    run_until_idle()
    assert run.status == "FAILED"
    assert done == ["reserve", "charge", "refund", "release"]


def test_a_saga_in_a_saga_is_undone_first():
    @durable.workflow(name="tests.saga.nested")
    def nested():
        with durable.saga() as outer:
            outer.add(cancel_label, "outer", printer="1")
            with durable.saga() as inner:
                inner.add(cancel_label, "inner", printer="1")
                charge("A1")

    failing["charge"] = 1
    with pytest.raises(ConnectionError):
        nested()
    assert done == ["label of inner on 1 cancelled", "label of outer on 1 cancelled"]


def test_it_belongs_to_a_workflow_and_takes_functions():
    with pytest.raises(durable.NotInWorkflow), durable.saga():
        pass
    with pytest.raises(RuntimeError, match="outside its block"):
        durable.saga().add(print)

    @durable.workflow(name="tests.saga.wrong")
    def wrong(kind):
        with durable.saga() as undo:
            undo.add({"text": "release", "nameless": type("Nameless", (), {"__call__": print})()}[kind])

    for kind in ("text", "nameless"):
        with pytest.raises(TypeError, match="takes a function"):
            wrong(kind)


# -- What does not undo ---------------------------------------------------------------------------------------------


@durable.workflow(name="tests.saga.waiting")
def waiting(seat):
    with durable.saga() as undo:
        reserve(seat)
        undo.add(release, seat)
        durable.receive("go")
        charge(seat)
    return "bought"


def test_waiting_is_no_error():
    run = waiting.start("A1")
    run_until_idle()
    assert run.status == "WAITING"
    run.send(1, "go")
    run_until_idle()
    assert run.result(0) == "bought"
    assert done == ["reserve", "charge"]


def test_a_cancelled_run_is_not_undone_and_can_go_on():
    run = waiting.start("A1")
    run_until_idle()
    run.cancel()
    run_until_idle()
    assert done == ["reserve"]
    run.resume()
    run.send(1, "go")
    run_until_idle()
    assert run.result(0) == "bought"


def test_a_saga_that_goes_on_as_a_new_run_is_not_undone():
    @durable.workflow(name="tests.saga.continues")
    def continues(number):
        with durable.saga() as undo:
            reserve("A1")
            undo.add(release, "A1")
            if number < 2:
                durable.continue_as_new(number + 1)

    assert continues(0) is None
    assert done == ["reserve"] * 3


# -- Beginning anew -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["start", "call"])
def test_a_retry_begins_anew_what_was_undone(how):
    failing["charge"] = 2
    if how == "call":
        assert again("A1") == "bought"
    else:
        run = again.start("A1")
        drain()
        assert run.result(0) == "bought"
    assert done == ["reserve", "release", "reserve", "release", "reserve", "charge", "ship"]
    assert net("A1") == 1
    (run,) = WorkflowRun.objects.all()
    assert [step.name for step in run.steps.all()] == ["reserve", "charge", "ship"]


def test_resume_begins_anew_what_was_undone():
    failing["ship"] = 1
    run = once.start("A1")
    run_until_idle()
    assert run.status == "FAILED"
    assert net("A1") == 0
    assert run.resume()
    run_until_idle()
    assert run.result(0) == "bought"
    assert done == ["reserve", "charge", "refund", "release", "reserve", "charge", "ship"]
    assert net("A1") == 1


def test_what_came_before_the_block_is_kept():
    @durable.workflow(name="tests.saga.before", max_attempts=2)
    def before():
        durable.run_step("quote", happens, "quote")
        return buy("A1")

    failing["charge"] = 1
    assert before() == "bought"
    assert done == ["quote", "reserve", "release", "reserve", "charge", "ship"]


def test_what_was_received_in_the_block_is_received_again():
    run = waiting.start("A1")
    run.send("a message", "go")
    failing["charge"] = 1
    run_until_idle()
    assert run.status == "FAILED"
    assert run.resume()
    run_until_idle()
    assert run.result(0) == "bought"
    assert done == ["reserve", "release", "reserve", "charge"]


def test_a_block_in_which_nothing_was_to_be_undone_keeps_its_steps():
    @durable.workflow(name="tests.saga.nothing", max_attempts=2)
    def nothing():
        with durable.saga():
            reserve("A1")
            charge("A1")

    failing["charge"] = 1
    nothing()
    assert done == ["reserve", "charge"]


@durable.workflow(name="tests.saga.wrapped", max_attempts=3)
def wrapped(how):
    problem = None
    try:
        buy("A1")
    except ConnectionError as error:
        if how == "chained":
            raise ValueError("no ticket") from error
        if how == "unchained":
            raise ValueError("no ticket") from None
        problem = error
    if problem is not None:
        raise ValueError("no ticket")


@pytest.mark.parametrize("how", ["chained", "unchained", "later"])
def test_the_error_may_leave_the_workflow_as_another(how):
    failing["charge"] = 2
    wrapped(how)
    assert done == ["reserve", "release"] * 2 + ["reserve", "charge", "ship"]


def test_an_error_of_the_blocks_own_code_begins_it_anew_too():
    @durable.workflow(name="tests.saga.own", max_attempts=2)
    def own():
        with durable.saga() as undo:
            reserve("A1")
            undo.add(release, "A1")
            # Somebody mends the code between the two executions.
            if durable.current().attempt == 1:
                raise ValueError("a bug")

    own()
    assert done == ["reserve", "release", "reserve"]
    assert net("A1") == 1


def test_one_whose_error_was_caught_stays_undone():
    @durable.workflow(name="tests.saga.caught", max_attempts=2)
    def caught():
        try:
            buy("A1")
        except ConnectionError:
            durable.run_step("apologise", happens, "apologise")

    failing.update(charge=1, apologise=1)
    caught()
    # The retry repeats what failed behind it, and nothing of the block.
    assert done == ["reserve", "release", "apologise"]
    assert net("A1") == 0


def test_an_outer_block_begins_anew_with_the_inner_one():
    @durable.workflow(name="tests.saga.outer", max_attempts=2)
    def outer():
        with durable.saga() as undo:
            undo.add(cancel_label, "outer", printer="1")
            buy("A1")

    failing["ship"] = 1
    outer()
    undone = ["refund", "release", "label of outer on 1 cancelled"]
    assert done == ["reserve", "charge", *undone, "reserve", "charge", "ship"]


def test_nothing_begins_anew_before_everything_is_undone():
    """The charge could not be given back: to charge again would be the second time."""
    failing.update(ship=1, refund=2)
    run = once.start("A1")
    drain(2)
    assert run.status == "FAILED"
    assert done == ["reserve", "charge", "release"]

    assert run.resume()
    run_until_idle()
    assert run.status == "FAILED"
    assert done == ["reserve", "charge", "release", "refund"]
    with pytest.raises(ConnectionError, match="ship is down") as raised:
        run.result(0)
    assert not hasattr(raised.value, "__notes__")

    assert run.resume()
    run_until_idle()
    assert run.result(0) == "bought"
    assert done == ["reserve", "charge", "release", "refund", "reserve", "charge", "ship"]


def test_several_failed_compensations_are_repeated_one_after_the_other():
    failing.update(ship=1, refund=2, release=1)
    run = again.start("A1")
    drain(8)
    assert run.result(0) == "bought"
    assert done == ["reserve", "charge", "refund", "release", "reserve", "charge", "ship"]
    assert net("A1") == 1


# -- Async ----------------------------------------------------------------------------------------------------------


@durable.workflow(name="tests.saga.async", max_attempts=4, retry_delay=5)
async def async_buy(seat):
    async with durable.saga() as undo:
        await reserve.acall(seat)
        undo.add(release, seat)
        await charge.acall(seat)
        undo.add(cancel_label, seat, printer="B")
        await ship.acall(seat)
    return "bought"


def test_an_async_workflow_is_undone_and_begins_anew_too():
    failing["ship"] = 1
    run = async_buy.start("A1")
    drain(2)
    assert run.result(0) == "bought"
    undone = ["label of A1 on B cancelled", "release"]
    assert done == ["reserve", "charge", *undone, "reserve", "charge", "ship"]
    assert net("A1") == 1


def test_an_async_compensation_that_failed_is_repeated_first():
    failing.update(ship=1, release=1)
    run = async_buy.start("A1")
    drain(4)
    assert run.result(0) == "bought"
    label = "label of A1 on B cancelled"
    assert done == ["reserve", "charge", label, "release", "reserve", "charge", "ship"]
    assert net("A1") == 1


def test_an_async_workflow_says_async_with():
    @durable.workflow(name="tests.saga.plain_with")
    async def plain_with():
        with durable.saga():
            pass

    run = plain_with.start()
    run_until_idle()
    with pytest.raises(TypeError, match="async with"):
        run.result(0)


# -- Crashes --------------------------------------------------------------------------------------------------------

COURSE = ["reserve", "charge", "ship", "refund", "release"]


@pytest.mark.parametrize("when", [crash_before, crash_after])
@pytest.mark.parametrize("step", COURSE)
def test_a_crash_anywhere_ends_in_one_net_effect(step, when):
    failing["ship"] = 1
    run = again.start("A1")
    with when(step):
        run_until_idle()
    drain()
    assert run.result(0) == "bought"
    assert run.model.recoveries == 1
    assert done == ["reserve", "charge", "refund", "release", "reserve", "charge", "ship"]
    assert net("A1") == 1


@pytest.mark.django_db(databases=["default", "other"])
def test_steps_whose_data_live_in_another_database_are_forgotten_there_too():
    @durable.step(name="deposit", using="other")
    def deposit(amount):
        Account.objects.using("other").create(name="a", balance=amount)

    @durable.workflow(name="tests.saga.other", max_attempts=2)
    def elsewhere():
        with durable.saga() as undo:
            deposit(5)
            undo.add(deposit, -5)
            charge("A1")

    failing["charge"] = 1
    elsewhere()
    assert sorted(Account.objects.using("other").values_list("balance", flat=True)) == [-5, 5, 5]
