"""Steps and workflows that are tried again: how often, after which delays, and what is seen in the end."""

import builtins
from contextlib import suppress
from datetime import timedelta

import pytest

import django_durable as durable
from django_durable import clock
from django_durable.engine import retries
from django_durable.engine.leases import Lease
from django_durable.engine.retries import jittered, policy
from django_durable.models import StepCheckpoint, WorkflowRun
from django_durable.testing import advance, crash_after, run_until_idle
from tests.app.models import Ledger
from tests.app.workflows import times

pytestmark = pytest.mark.django_db

tries: list[int] = []


@pytest.fixture(autouse=True)
def no_tries_yet():
    tries.clear()


@pytest.fixture
def waits(monkeypatch):
    """The seconds that executors waited in their threads, without the jitter."""
    waited = []

    def wait(self, seconds):
        waited.append(seconds)
        clock.move(timedelta(seconds=seconds))
        return False

    monkeypatch.setattr(Lease, "wait", wait)
    monkeypatch.setattr(retries.random, "uniform", lambda low, high: 1.0)
    return waited


def flaky(failures, error=ConnectionError):
    """Fail so many times, then succeed."""
    tries.append(len(tries) + 1)
    if len(tries) <= failures:
        raise error(f"try {len(tries)}")
    return len(tries)


@durable.workflow(name="tests.retries.once")
def once(kind, *args):
    return STEPS[kind](*args)


@durable.step(name="outside", atomic=False, max_attempts=5, retry_delay=0.1)
def outside(failures):
    Ledger.objects.create(key="outside")
    return flaky(failures)


@durable.step(name="inside", max_attempts=5, retry_delay=0.1)
def inside(failures):
    Ledger.objects.create(key="inside")
    return flaky(failures)


@durable.step(name="choosy", atomic=False, max_attempts=5, retry_delay=0, retry_on=OSError, give_up_on=TimeoutError)
def choosy(error):
    flaky(9, getattr(builtins, error))


@durable.step(name="patient", atomic=False, max_attempts=8, retry_delay=0.3, retry_backoff=2, retry_max_delay=0.9)
def patient(failures):
    return flaky(failures)


@durable.step(name="slow", atomic=False, max_attempts=3, retry_delay=600)
def slow(failures):
    return flaky(failures)


@durable.step(name="slow_inside", max_attempts=3, retry_delay=timedelta(minutes=10))
def slow_inside(failures):
    Ledger.objects.create(key="slow_inside")
    return flaky(failures)


@durable.step(name="told_when", atomic=False, max_attempts=3, retry_delay=0.1, retry_on=())
def told_when(seconds, cause):
    tries.append(1)
    try:
        raise ConnectionError("503")
    except ConnectionError as error:
        if cause:
            raise durable.RetryAfter(seconds) from error
    raise durable.RetryAfter(seconds)


@durable.step(name="giving_up", atomic=False, max_attempts=9, retry_delay=0)
def giving_up(cause):
    tries.append(1)
    if cause:
        raise durable.GiveUp("no use") from ZeroDivisionError("the cause")
    raise durable.GiveUp("no use")


STEPS = {step.name: step for step in [outside, inside, choosy, patient, slow, slow_inside, told_when, giving_up]}


# -- How often ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "effects"), [("outside", 3), ("inside", 1)])
def test_a_step_is_tried_again_until_it_succeeds(waits, kind, effects):
    assert once(kind, 2) == 3
    step = StepCheckpoint.objects.get()
    assert (step.status, step.attempts, step.output) == ("SUCCEEDED", 3, "3")
    # What a failed try of an atomic step wrote was rolled back.
    assert times(kind) == effects
    assert waits == [0.1, 0.2]


@pytest.mark.parametrize("kind", ["outside", "inside"])
def test_the_last_try_is_the_last_and_nothing_is_waited_after_it(waits, kind):
    for _ in range(2):
        with pytest.raises(ConnectionError, match="try 5"):
            once.using(run_id="1")(kind, 9)
    assert len(tries) == 5
    assert waits == [0.1, 0.2, 0.4, 0.8]
    step = StepCheckpoint.objects.get()
    assert (step.status, step.attempts) == ("FAILED", 5)


def test_a_step_is_tried_once_unless_it_says_otherwise():
    step = durable.step(name="plain")(flaky)
    assert step.retry.max_attempts == 1


@pytest.mark.parametrize(
    ("error", "expected"),
    [(ConnectionError, 5), (OSError, 5), (TimeoutError, 1), (ValueError, 1)],
    ids=lambda item: getattr(item, "__name__", item),
)
def test_retry_on_and_give_up_on_say_which_errors_are_tried_again(error, expected):
    with pytest.raises(error, match=f"try {expected}"):
        once("choosy", error.__name__)
    assert len(tries) == expected


# -- Delays ---------------------------------------------------------------------------------------------------------


def test_delays_grow_up_to_their_limit(waits):
    with pytest.raises(ConnectionError):
        once("patient", 99)
    assert waits == [0.3, 0.6, 0.9, 0.9, 0.9, 0.9, 0.9]


def test_each_delay_is_drawn_within_ten_percent():
    drawn = [jittered(100.0) for _ in range(2000)]
    assert 90 <= min(drawn) < 92
    assert 108 < max(drawn) <= 110


def a_policy(**changed):
    defaults = {"max_attempts": 10**6, "retry_delay": 1, "retry_backoff": 2, "retry_max_delay": 3600}
    return policy(**{**defaults, "retry_on": (Exception,), **changed})


@pytest.mark.parametrize(
    ("changes", "attempt", "seconds"),
    [
        ({}, 1, 1),
        ({}, 4, 8),
        ({}, 100, 3600),
        ({}, 100_000, 3600),
        ({"retry_backoff": 1e308}, 3, 3600),
        ({"retry_delay": 0}, 5, 0),
        ({"retry_backoff": 1}, 500, 1),
        ({"retry_backoff": 0}, 1, 1),
        ({"retry_backoff": 0}, 2, 0),
        ({"retry_backoff": 0.5}, 3, 0.25),
        ({"retry_delay": 60, "retry_max_delay": 30}, 1, 30),
        ({"retry_delay": timedelta(minutes=2)}, 1, 120),
        ({"max_attempts": 3}, 3, None),
    ],
    ids=repr,
)
def test_the_delay_is_a_formula_and_never_overflows(changes, attempt, seconds):
    assert a_policy(**changes).wait(ConnectionError(), attempt) == seconds


def test_retry_after_says_when_whatever_the_policy_says(waits):
    with pytest.raises(durable.RetryAfter, match=r"retry after 0\.7 s"):
        once("told_when", 0.7, False)
    assert (len(tries), waits) == (3, [0.7, 0.7])


def test_after_the_last_retry_after_its_cause_is_the_error(waits):
    for _ in range(2):
        with pytest.raises(ConnectionError, match="503"):
            once.using(run_id="1")("told_when", 0.7, True)
    assert len(tries) == 3


@pytest.mark.parametrize("seconds", ["soon", None, -1, float("nan")], ids=repr)
def test_retry_after_takes_a_duration(seconds):
    with pytest.raises((TypeError, ValueError), match="RetryAfter"):
        durable.RetryAfter(seconds)


def test_give_up_ends_the_tries_with_its_cause():
    for _ in range(2):
        with pytest.raises(ZeroDivisionError, match="the cause"):
            once.using(run_id="1")("giving_up", True)
    assert len(tries) == 1
    # A person still reads why it was given up.
    assert "GiveUp" in StepCheckpoint.objects.get().error


def test_give_up_without_a_cause_is_the_error_itself():
    for _ in range(2):
        with pytest.raises(durable.GiveUp, match="no use"):
            once.using(run_id="1")("giving_up", False)
    assert len(tries) == 1


# -- Parking --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["slow", "slow_inside"])
def test_a_long_delay_holds_no_thread_and_keeps_the_count_of_tries(kind):
    run = once.start(kind, 2)
    for attempt, minutes in [(1, 10), (2, 20)]:
        assert run_until_idle() == 1
        stored = run.model
        assert (stored.status, stored.waiting_for, stored.worker) == ("WAITING", f"retry:{kind}", "")
        step = StepCheckpoint.objects.get()
        assert (step.status, step.attempts) == ("RETRYING", attempt)
        assert "ConnectionError" in step.error
        assert len(tries) == attempt
        advance(timedelta(minutes=minutes * 0.89))
        assert run_until_idle() == 0
        advance(timedelta(minutes=minutes * 0.22))
    assert run_until_idle() == 1
    assert run.result(timeout=0) == 3
    step = StepCheckpoint.objects.get()
    assert (step.status, step.attempts, step.error) == ("SUCCEEDED", 3, "")
    assert times("slow_inside") == (1 if kind == "slow_inside" else 0)


def test_tries_before_and_after_parking_add_up_to_the_limit():
    run = once.start("slow", 99)
    for _ in range(5):
        run_until_idle()
        advance("1 hour")
    assert len(tries) == 3
    assert run.status == "FAILED"
    with pytest.raises(ConnectionError, match="try 3"):
        run.result(timeout=0)


@pytest.mark.parametrize(("park_after", "executions"), [(700, 1), (599, 2)])
def test_park_after_says_what_is_long(settings, park_after, executions):
    settings.DURABLE = {"PARK_AFTER": park_after}
    run = once.start("slow", 1)
    done = run_until_idle()
    advance("11 minutes")
    assert done + run_until_idle() == executions
    assert run.result(timeout=0) == 2


def test_a_direct_call_waits_for_a_parked_retry():
    @durable.step(name="two seconds", atomic=False, max_attempts=2, retry_delay=2)
    def two_seconds():
        return flaky(1)

    @durable.workflow(name="tests.retries.two_seconds")
    def workflow():
        return two_seconds()

    assert workflow() == 2
    assert WorkflowRun.objects.get().attempt == 2


def test_a_direct_call_in_a_test_waits_long_at_the_cost_of_a_few_looks(django_assert_max_num_queries):
    """The durable clock is the test's own: it can go to the moment at once, and need not creep there."""

    @durable.step(name="long", atomic=False, max_attempts=2, retry_delay=180)
    def long():
        return flaky(1)

    @durable.workflow(name="tests.retries.long")
    def workflow():
        return long()

    with django_assert_max_num_queries(100):
        assert workflow() == 2


@durable.workflow(name="tests.retries.swallow")
def swallow():
    try:
        return slow(1)
    except Exception:
        return "the workflow thinks that it failed"


def test_parking_is_not_an_error_that_a_workflow_could_catch():
    run = swallow.start()
    run_until_idle()
    assert run.status == "WAITING"
    advance("11 minutes")
    run_until_idle()
    assert run.result(timeout=0) == 2


@durable.workflow(name="tests.retries.swallow_all")
def swallow_all():
    try:
        return slow(1)
    except BaseException:
        return durable.run_step("after parking", Ledger.objects.create, key="after parking").pk


def test_a_workflow_that_swallows_even_parking_starts_no_further_step():
    run = swallow_all.start()
    run_until_idle()
    assert (run.status, times("after parking")) == ("WAITING", 0)
    advance("11 minutes")
    run_until_idle()
    assert (run.result(timeout=0), times("after parking")) == (2, 0)


# -- A workflow's own tries -----------------------------------------------------------------------------------------


@durable.step(name="first", atomic=False)
def first():
    Ledger.objects.create(key="first")


@durable.step(name="second", atomic=False)
def second(failures):
    return flaky(failures)


@durable.workflow(name="tests.retries.again", max_attempts=3, retry_delay=60)
def again(failures):
    first()
    return second(failures)


def drain_retries(rounds=9):
    for _ in range(rounds):
        run_until_idle()
        advance("2 hours")


def test_a_failed_run_tries_again_its_completed_steps_kept_and_the_failed_one_executed_anew():
    run = again.start(2)
    run_until_idle()
    stored = run.model
    assert (stored.status, stored.waiting_for, stored.failures) == ("WAITING", "retry", 1)
    assert "ConnectionError: try 1" in stored.error
    assert (stored.finished_at, stored.worker) == (None, "")
    drain_retries()
    stored = run.model
    assert (stored.status, stored.failures, stored.attempt, stored.error) == ("SUCCEEDED", 2, 3, "")
    assert run.result(timeout=0) == 3
    assert times("first") == 1
    assert [(step.name, step.status, step.attempts) for step in stored.steps.all()] == [
        ("first", "SUCCEEDED", 1),
        ("second", "SUCCEEDED", 1),
    ]


def test_only_after_the_last_attempt_the_run_is_failed():
    run = again.start(99)
    drain_retries()
    assert (run.status, run.model.failures, len(tries)) == ("FAILED", 3, 3)
    with pytest.raises(ConnectionError, match="try 3"):
        run.result(timeout=0)


def test_a_runs_delays_grow_as_a_steps_do():
    run = again.start(99)
    run_until_idle()
    for expected in (60, 120):
        stored = run.model
        assert expected * 0.89 <= (stored.wake_at - clock_now()).total_seconds() <= expected * 1.11
        advance(timedelta(seconds=expected * 1.2))
        run_until_idle()
    assert run.status == "FAILED"


def clock_now():
    return WorkflowRun.objects.values_list(clock.DatabaseNow(), flat=True)[0]


def test_a_direct_call_tries_again_too():
    @durable.workflow(name="tests.retries.direct", max_attempts=3, retry_delay=0.5)
    def direct():
        return second(2)

    assert direct() == 3
    assert WorkflowRun.objects.get().failures == 2


@durable.workflow(name="tests.retries.only_os", max_attempts=5, retry_delay=0, retry_on=OSError)
def only_os(name):
    tries.append(1)
    if name == "give up":
        raise durable.GiveUp("no use") from OSError("why")
    raise {"os": OSError, "value": ValueError}[name]("from the body")


@pytest.mark.parametrize(
    ("name", "error", "expected"), [("os", OSError, 5), ("value", ValueError, 1), ("give up", OSError, 1)]
)
def test_errors_of_the_body_are_tried_again_by_the_same_rules(name, error, expected):
    run = only_os.start(name)
    drain_retries(1)
    assert (run.status, run.model.failures, len(tries)) == ("FAILED", expected, expected)
    with pytest.raises(error):
        run.result(timeout=0)


@durable.step(name="charge_card", atomic=False)
def charge_card():
    tries.append(1)
    if len(tries) == 1:
        raise ConnectionError("the payment service is away")
    return "paid"


@durable.step(name="release")
def release():
    Ledger.objects.create(key="released")


@durable.step(name="ship")
def ship():
    Ledger.objects.create(key="shipped")


@durable.workflow(name="tests.retries.compensating", max_attempts=2, retry_delay=0)
def compensating():
    try:
        paid = charge_card()
    except ConnectionError:
        release()
        raise
    ship()
    return paid


def test_a_retry_after_a_compensation_takes_the_other_course_from_the_failed_step_on():
    """Recorded: charge failed, release. The retry charges, then ships: position 2 is another step now, by right."""
    run = compensating.start()
    run_until_idle()
    assert run.result(timeout=0) == "paid"
    assert [(step.position, step.name) for step in run.model.steps.all()] == [(1, "charge_card"), (2, "ship")]
    assert (times("released"), times("shipped")) == (1, 1)


@durable.workflow(name="tests.retries.caught", max_attempts=2, retry_delay=0)
def caught():
    try:
        charge_card()
    except ConnectionError:
        release()
    return second(len(tries))


def test_a_step_whose_error_was_caught_keeps_its_outcome_in_a_retry():
    run = caught.start()
    run_until_idle()
    assert run.status == "SUCCEEDED"
    assert [(step.name, step.status) for step in run.model.steps.all()] == [
        ("charge_card", "FAILED"),
        ("release", "SUCCEEDED"),
        ("second", "SUCCEEDED"),
    ]
    assert times("released") == 1


class ShopError(Exception):
    pass


@durable.workflow(name="tests.retries.wrapping", max_attempts=2, retry_delay=0)
def wrapping(how):
    try:
        return charge_card()
    except ConnectionError as error:
        problem = error
    with suppress(ConnectionError):
        second(9)
    if how == "chained":
        raise ShopError("wrapped") from problem
    raise ShopError("not chained")


def test_the_failed_step_is_found_in_the_chain_of_the_error_that_left():
    run = wrapping.start("chained")
    run_until_idle()
    # Not `second`, which failed last: the error came from the first step.
    assert run.result(timeout=0) == "paid"


def test_without_a_chain_the_last_failed_step_is_executed_anew():
    run = wrapping.start("not chained")
    run_until_idle()
    assert run.status == "FAILED"
    assert [(step.name, step.status) for step in run.model.steps.all()] == [
        ("charge_card", "FAILED"),
        ("second", "FAILED"),
    ]
    # charge_card once; second twice.
    assert len(tries) == 3


def test_a_crash_in_a_retry_costs_no_attempt():
    run = again.start(1)
    run_until_idle()
    advance("2 hours")
    with crash_after("second"):
        run_until_idle()
    run_until_idle()
    stored = run.model
    assert (stored.status, stored.failures, stored.recoveries, len(tries)) == ("SUCCEEDED", 1, 1, 2)


def test_a_delay_beyond_the_calendar_harms_nobody():
    run = once.start("told_when", 1e13, False)
    run_until_idle()
    assert run.status in ("WAITING", "FAILED")
    assert len(tries) == 1
    assert StepCheckpoint.objects.filter(run=run.id).exists()
