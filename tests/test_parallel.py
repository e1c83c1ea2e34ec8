"""Parallel steps: in order, exact on replay, bounded, and never under way when their run has ended or waits."""

import threading
from collections import Counter
from contextlib import contextmanager
from datetime import timedelta
from itertools import permutations

import pytest
from django.db import connection, connections, transaction
from django.db.models import F
from django.test import TestCase

import django_durable as durable
from django_durable import signals
from django_durable.engine import claims, registry
from django_durable.engine import context as engine_context
from django_durable.engine.context import current_run
from django_durable.engine.leases import Lease
from django_durable.engine.parallel import MAX_PARALLEL
from django_durable.engine.replay import execute
from django_durable.models import StepCheckpoint, WorkflowRun
from django_durable.testing import DurableTestMixin, advance, crash_after, crash_before, run_until_idle
from tests.app.models import Account, Ledger
from tests.app.workflows import times
from tests.docs.pages import blocks
from tests.threads import elsewhere, together

in_a_test = pytest.mark.django_db
# With threads and connections of their own, as in a worker.
for_real = pytest.mark.django_db(transaction=True)

PATIENCE = 20
calls: list = []


@pytest.fixture(autouse=True)
def fresh_calls():
    calls.clear()


def threads_of_steps():
    return [thread for thread in threading.enumerate() if thread.name.endswith("-step")]


def history():
    return list(StepCheckpoint.objects.order_by("position").values_list("position", "name", "status"))


def wait(event):
    assert event.wait(PATIENCE), "it never came"


@contextmanager
def told_of_records(receiver):
    def recorded(**facts):
        receiver(facts)

    signals.step_recorded.connect(recorded, weak=False)
    try:
        yield
    finally:
        signals.step_recorded.disconnect(recorded)


def execute_as_a_worker(run):
    """One execution by a process with a lease of its own: threads, connections, and no test's clock."""
    lease = Lease("default", "worker", ["default"])
    lease.register()
    claims.wake_due("default")
    (claim,) = claims.claim(lease, 1, run_id=run.id)
    # A crash leaves it as a killed process would.
    execute(claim, lease)
    lease.remove()


# -- Results and replay ---------------------------------------------------------------------------------------------


@durable.step(name="square", atomic=False)
def square(number):
    calls.append(number)
    return number * number


@durable.step(name="last", atomic=False)
def last():
    calls.append("last")


@durable.workflow(name="tests.parallel.squares")
def squares(count, limit=8):
    mapped = square.map(range(count), max_parallel=limit)
    futures = [square.submit(number) for number in range(3)]
    # Asked for in another order than they were submitted in.
    submitted = [futures[place].result() for place in (2, 0, 1)]
    last()
    return [mapped, submitted, futures[2].result()]


EXPECTED = [[number * number for number in range(20)], [4, 0, 1], 4]


@for_real
def test_results_come_in_the_order_of_the_items_and_each_step_has_its_position():
    assert squares(20) == EXPECTED
    assert Counter(calls) == Counter([*range(20), 0, 1, 2, "last"])
    outputs = StepCheckpoint.objects.order_by("position").values_list("position", "output")[:20]
    assert [(position, int(output)) for position, output in outputs] == [(n + 1, n * n) for n in range(20)]
    assert threads_of_steps() == []


@in_a_test
def test_in_a_tests_transaction_all_of_it_runs_in_the_tests_own_thread():
    threads = set()
    with told_of_records(lambda facts: threads.add(threading.current_thread())):
        assert squares(20) == EXPECTED
        run = squares.start(20)
        assert run_until_idle() == 1
    assert run.result(timeout=0) == EXPECTED
    assert threads == {threading.current_thread()}


class InATestCase(DurableTestMixin, TestCase):
    def test_parallel_steps_see_the_tests_rows_and_are_undone_with_it(self):
        Account.objects.create(name="Ada")
        assert deposits(["Ada"] * 5) == [1, 2, 3, 4, 5]
        run = deposits.start(["Ada"] * 2)
        run_until_idle()
        assert run.result(timeout=0) == [6, 7]
        assert Account.objects.get().balance == 7


class Turns:
    """Lets parallel steps be recorded in this order of positions, and notes that they were."""

    def __init__(self, order):
        self.order = list(order)
        self.gates = {position: threading.Event() for position in order}
        self.seen = []
        self.all_recorded = threading.Event()
        self.gates[self.order[0]].set()

    def __call__(self, facts):
        if facts["name"] == "in turn":
            self.seen.append(facts["position"])
            following = self.order[len(self.seen) :]
            (self.gates[following[0]] if following else self.all_recorded).set()


@durable.step(name="in turn", atomic=False)
def in_turn(label):
    calls.append(label)
    wait(turns.gates[int(durable.current().idempotency_key.rpartition(":")[2])])
    return label.upper()


@durable.workflow(name="tests.parallel.in_turns")
def in_turns():
    found = in_turn.map("abc")
    time = current_run().time
    last()
    return [found, time]


@for_real
@pytest.mark.parametrize("order", list(permutations((1, 2, 3))))
def test_a_replay_is_exact_whatever_finished_first(order):
    global turns
    turns = Turns(order)
    run = in_turns.start()
    seen = []
    with told_of_records(turns), told_of_records(lambda facts: seen.append(facts["position"])):
        with crash_before("last"):
            execute_as_a_worker(run)
        assert turns.seen == list(order)
        # As if its process were gone.
        run_until_idle()
    found, time = run.result(timeout=0)
    assert found == ["A", "B", "C"]
    assert sorted(calls[:3]) == ["a", "b", "c"]
    assert calls[3:] == ["last"], "a recorded step was executed again"
    assert seen == [*order, 4]
    # The run's own time is that of what it was shown, at first as on the replay.
    assert time == max(StepCheckpoint.objects.filter(name="in turn").values_list("finished_at", flat=True))


@durable.workflow(name="tests.parallel.own_time")
def own_time():
    early, late = in_turn.submit("early"), in_turn.submit("late")
    early.result()
    # The other one's outcome is there as well by now, and the body does not know of it.
    wait(turns.all_recorded)
    calls.append(current_run().time)
    last()
    late.result()
    return current_run().time


@for_real
def test_the_runs_own_time_goes_on_when_the_body_sees_a_result_and_not_when_a_thread_has_it():
    global turns
    turns = Turns((1, 2))
    run = own_time.start()
    with told_of_records(turns):
        with crash_before("last"):
            execute_as_a_worker(run)
        run_until_idle()
    early, late = StepCheckpoint.objects.filter(name="in turn").order_by("position")
    assert early.finished_at < late.finished_at
    at_first, on_replay, _ = calls[2:]
    assert at_first == on_replay == early.finished_at
    assert run.result(timeout=0) == StepCheckpoint.objects.get(name="last").finished_at


@for_real
def test_recorded_steps_are_answered_without_a_thread_and_without_a_query():
    run = squares.start(5)
    with crash_after("last"):
        execute_as_a_worker(run)
    run_until_idle()
    assert run.result(timeout=0)[0] == [0, 1, 4, 9, 16]
    again = squares.start(5)
    execute_as_a_worker(again)
    WorkflowRun.objects.filter(pk=again.id).update(status="PENDING", worker="", finished_at=None)
    started = []
    original = threading.Thread.start
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading.Thread, "start", lambda thread: (started.append(thread.name), original(thread)))
        execute_as_a_worker(again)
    assert again.result(timeout=0) == run.result(timeout=0)
    assert started == []


@in_a_test
def test_code_that_submits_another_step_than_the_recorded_one_is_set_aside():
    @durable.workflow(name="tests.parallel.changed")
    def changed():
        steps = [square, last] if current_run().attempt == 1 else [last, square]
        for step, arguments in zip(steps, ([3], []) if steps[0] is square else ([], [3]), strict=True):
            step.submit(*arguments)
        durable.sleep(60)

    run = changed.start()
    run_until_idle()
    advance("2 minutes")
    run_until_idle()
    assert run.status == "DEAD"
    assert "recorded 'square', the code now calls 'last'" in run.model.error


@in_a_test
def test_what_makes_the_items_may_call_steps_itself():
    @durable.workflow(name="tests.parallel.from_steps")
    def from_steps():
        return square.map(square(number) for number in range(3))

    run = from_steps.start()
    with crash_after("square"):
        run_until_idle()
    run_until_idle()
    assert run.result(timeout=0) == [0, 1, 16]
    assert calls == [0, 1, 2, 0, 1, 4]


# -- Crashes --------------------------------------------------------------------------------------------------------


@durable.step(name="deposit")
def deposit(name):
    Account.objects.filter(name=name).update(balance=F("balance") + 1)
    Ledger.objects.create(key=f"deposit {durable.current().idempotency_key}")
    return Account.objects.get(name=name).balance


@durable.workflow(name="tests.parallel.deposits")
def deposits(names, limit=8):
    return sorted(deposit.map(names, max_parallel=limit))


@for_real
@pytest.mark.parametrize("limit", [1, 3])
def test_a_crash_behind_some_of_them_repeats_only_the_others(limit):
    Account.objects.create(name="Ada")
    run = deposits.start(["Ada"] * 6, limit)
    with crash_after("deposit"):
        execute_as_a_worker(run)
    recorded = StepCheckpoint.objects.count()
    # What was under way beside the one that it died behind may have come through.
    assert 1 <= recorded <= limit
    assert Account.objects.get().balance == recorded
    run_until_idle()
    assert run.result(timeout=0) == [1, 2, 3, 4, 5, 6]
    assert Account.objects.get().balance == 6
    assert Counter(Ledger.objects.values_list("key", flat=True)) == {
        f"deposit {run.id}:{position}": 1 for position in range(1, 7)
    }
    assert run.model.recoveries == 1


@for_real
def test_a_crash_in_a_thread_ends_the_body_although_it_never_asks():
    @durable.workflow(name="tests.parallel.never_asks")
    def never_asks():
        future = square.submit(1)
        wait(crashed)
        calls.append("the body goes on")
        last()
        return future.result()

    crashed = threading.Event()
    run = never_asks.start()
    with told_of_records(lambda facts: crashed.set()), crash_after("square"):
        execute_as_a_worker(run)
    # It had no outcome yet that a process which died there would have left.
    assert history() == [(1, "square", "SUCCEEDED")]
    assert calls == [1, "the body goes on"]
    run_until_idle()
    assert run.result(timeout=0) == 1
    assert calls[2:] == ["the body goes on", "last"]


@for_real
@pytest.mark.django_db(transaction=True, databases=["default", "other"])
def test_parallel_steps_in_another_database_commit_once():
    @durable.step(name="there", using="other")
    def there(number):
        Ledger.objects.using("other").create(key=f"there {number}")
        return number

    @durable.workflow(name="tests.parallel.there")
    def all_there():
        return there.map(range(6), max_parallel=3)

    run = all_there.start()
    with crash_after("there"):
        execute_as_a_worker(run)
    # A process that died between the two commits has left an outcome that its run does not know of.
    StepCheckpoint.objects.using("default").delete()
    before = Ledger.objects.using("other").count()
    assert before >= 1
    execute_as_a_worker_after_recovery(run)
    assert run.result(timeout=0) == list(range(6))
    assert sorted(Ledger.objects.using("other").values_list("key", flat=True)) == [f"there {n}" for n in range(6)]


def execute_as_a_worker_after_recovery(run):
    WorkflowRun.objects.filter(pk=run.id).update(status="PENDING", worker="")
    execute_as_a_worker(run)


# -- Bounds ---------------------------------------------------------------------------------------------------------


class Crowd:
    """Who is inside at a time. Everyone waits for `size` of them."""

    def __init__(self, size):
        self.barrier = threading.Barrier(size)
        self.lock = threading.Lock()
        self.inside = self.most = 0

    def pass_through(self):
        with self.lock:
            self.inside += 1
            self.most = max(self.most, self.inside)
        self.barrier.wait(PATIENCE)
        with self.lock:
            self.inside -= 1


@durable.step(name="meet", atomic=False)
def meet(number):
    if connection.vendor == "postgresql":
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_backend_pid()")
            calls.append(cursor.fetchone()[0])
    else:
        connection.ensure_connection()
        calls.append(connection.connection)
    crowd.pass_through()
    return number


@durable.workflow(name="tests.parallel.crowded")
def crowded(count, limit):
    if limit is not None:
        return meet.map(range(count), max_parallel=limit)
    return [future.result() for future in [meet.submit(number) for number in range(count)]]


def is_open(session):
    if connection.vendor == "postgresql":
        with connection.cursor() as cursor:
            cursor.execute("SELECT count(*) FROM pg_stat_activity WHERE pid = %s", [session])
            return bool(cursor.fetchone()[0])
    try:
        session.execute("SELECT 1")
    except Exception as error:
        # The driver says so before it looks whose thread this is.
        return "closed" not in str(error)
    return True


@for_real
@pytest.mark.parametrize(("count", "limit"), [(9, 3), (16, None), (5, 1)])
def test_so_many_are_under_way_and_never_more_and_their_connections_are_closed(count, limit):
    global crowd
    size = limit or MAX_PARALLEL
    for _ in range(3):
        calls.clear()
        crowd = Crowd(size)
        assert crowded(count, limit) == list(range(count))
        assert crowd.most == size
        sessions = set(calls)
        # A thread keeps its connection from one step to the next.
        assert len(sessions) <= size
        assert threads_of_steps() == []
        until = threading.Event()
        for _ in range(200):
            # The server's process ends a moment after its client has gone.
            if not any(is_open(session) for session in sessions):
                break
            until.wait(0.02)
        assert not any(is_open(session) for session in sessions)


if connection.vendor == "postgresql":  # where a frozen process would keep its rows locked for ever

    @for_real
    def test_a_workers_parallel_transactions_may_not_be_idle_for_ever():
        @durable.step(name="limit")
        def limit(number):
            with connection.cursor() as cursor:
                cursor.execute("SHOW idle_in_transaction_session_timeout")
                return cursor.fetchone()[0]

        @durable.workflow(name="tests.parallel.limits")
        def limits():
            return limit.map(range(2))

        run = limits.start()
        execute_as_a_worker(run)
        assert run.result(timeout=0) == ["5min", "5min"]


@for_real
def test_a_thread_without_work_does_not_stay_for_as_long_as_the_run(monkeypatch):
    monkeypatch.setattr("django_durable.engine.parallel.LINGER", 0.01)

    @durable.workflow(name="tests.parallel.leaves")
    def leaves():
        square.map(range(4))
        for _ in range(500):
            if not threads_of_steps():
                break
            threading.Event().wait(0.02)
        calls.append(len(threads_of_steps()))
        return square.map(range(4))

    assert leaves() == [0, 1, 4, 9]
    assert calls[4] == 0


@for_real
def test_threads_that_others_have_left_idle_are_no_room_for_more():
    @durable.step(name="alone", atomic=False)
    def alone(number):
        with lock:
            inside.append(number)
            if len(inside) > 1:
                together.set()
        # Whoever is let in beside it comes at once: the threads are there.
        together.wait(0.05)
        inside.remove(number)
        return number

    @durable.workflow(name="tests.parallel.after_others")
    def after_others():
        meet.map(range(4), max_parallel=4)
        return alone.map(range(4), max_parallel=1)

    global crowd
    crowd = Crowd(4)
    lock, inside, together = threading.Lock(), [], threading.Event()
    assert after_others() == [0, 1, 2, 3]
    assert not together.is_set()


@for_real
def test_each_parallel_step_is_one_commit_of_its_own():
    commits = []
    database = type(connections["default"])
    original = database._commit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(database, "_commit", lambda self: (commits.append(self.alias), original(self))[1])
        # The process has its lease now.
        deposits([])
        Account.objects.create(name="Ada")
        commits.clear()
        deposits(["Ada"] * 10)
    # The start and the end are single statements, which commit by themselves.
    assert commits == ["default"] * 10


@pytest.mark.parametrize("limit", [0, -1, 2.0, True, "2", None])
def test_a_limit_that_makes_no_sense_is_refused(limit):
    with pytest.raises(ValueError, match="max_parallel takes a whole number from 1"):
        square.map([1], max_parallel=limit)
    assert calls == []


# -- Errors ---------------------------------------------------------------------------------------------------------


class Declined(Exception):
    def __init__(self, text, *, code):
        super().__init__(text)
        self.code = code


@durable.step(name="pay", atomic=False)
def pay(who):
    calls.append(who)
    if who.startswith("bad") and calls.count(who) == 1:
        raise Declined(f"no: {who}", code=51)
    return f"paid by {who}"


@durable.workflow(name="tests.parallel.payments")
def payments(names, catch=False):
    try:
        return pay.map(names)
    except Declined as error:
        if not catch:
            raise
        return [str(error), error.code]


@for_real
def test_the_first_error_in_order_is_raised_behind_all_the_others():
    with pytest.raises(Declined, match="no: bad 1") as raised:
        payments(["a", "bad 1", "b", "bad 2", "c"])
    assert raised.value.code == 51
    assert sorted(calls) == ["a", "b", "bad 1", "bad 2", "c"]
    statuses = ["SUCCEEDED", "FAILED", "SUCCEEDED", "FAILED", "SUCCEEDED"]
    assert history() == [(n + 1, "pay", status) for n, status in enumerate(statuses)]
    run = WorkflowRun.objects.get()
    # Where it came from, through the thread.
    assert "in pay" in run.error
    assert run.failed_step == 2


@for_real
def test_an_error_that_is_caught_is_an_outcome_like_any_other():
    assert payments(["a", "bad"], catch=True) == ["no: bad", 51]


@durable.workflow(name="tests.parallel.paid_again", max_attempts=2, retry_delay=0)
def paid_again(names, how):
    if how == "map":
        return pay.map(names)
    return [future.result() for future in [pay.submit(name) for name in names]]


@for_real
@pytest.mark.parametrize("how", ["map", "submit"])
def test_a_retry_of_the_workflow_repeats_only_the_step_that_failed(how):
    assert paid_again(["a", "bad", "b", "c"], how) == ["paid by a", "paid by bad", "paid by b", "paid by c"]
    assert Counter(calls) == {"a": 1, "bad": 2, "b": 1, "c": 1}
    assert WorkflowRun.objects.get().failures == 1


@for_real
def test_resume_of_a_failed_run_repeats_only_the_step_that_failed():
    run = payments.start(["a", "bad", "b"])
    execute_as_a_worker(run)
    assert run.status == "FAILED"
    assert run.resume()
    execute_as_a_worker(run)
    assert run.result(timeout=0) == ["paid by a", "paid by bad", "paid by b"]
    assert Counter(calls) == {"a": 1, "bad": 2, "b": 1}


@durable.workflow(name="tests.parallel.forgetful")
def forgetful(fails):
    pay.submit("bad")
    pay.submit("b")
    if fails:
        raise ValueError("the body's own")


@for_real
@pytest.mark.parametrize("fails", [False, True], ids=["returns", "raises"])
def test_what_was_submitted_comes_to_its_outcome_although_nobody_asks(fails):
    run = forgetful.start(fails)
    execute_as_a_worker(run)
    assert run.status == ("FAILED" if fails else "SUCCEEDED")
    assert history() == [(1, "pay", "FAILED"), (2, "pay", "SUCCEEDED")]
    if fails:
        assert "the body's own" in run.model.error


@for_real
def test_what_was_submitted_and_had_no_room_yet_is_done_although_the_body_has_raised():
    @durable.workflow(name="tests.parallel.crowded_out")
    def crowded_out():
        for number in range(3 * MAX_PARALLEL):
            square.submit(number)
        raise ValueError

    run = crowded_out.start()
    execute_as_a_worker(run)
    assert sorted(calls) == list(range(3 * MAX_PARALLEL))
    assert StepCheckpoint.objects.filter(status="SUCCEEDED").count() == 3 * MAX_PARALLEL


@for_real
def test_a_step_that_ends_its_thread_ends_the_run():
    @durable.step(name="leave", atomic=False)
    def leave():
        raise SystemExit(3)

    @durable.workflow(name="tests.parallel.left")
    def left():
        leave.submit()

    run = left.start()
    execute_as_a_worker(run)
    assert run.status == "FAILED"
    with pytest.raises(durable.RunFailed, match="SystemExit"):
        run.result(timeout=0)
    assert threads_of_steps() == []


@for_real
def test_inside_a_transaction_of_the_workflow_nothing_is_submitted():
    @durable.workflow(name="tests.parallel.in_a_transaction")
    def in_a_transaction():
        with transaction.atomic():
            square.submit(1)

    with pytest.raises(durable.InsideTransaction, match="Step 'square'"):
        in_a_transaction()
    assert calls == []


@for_real
def test_an_error_of_the_engine_itself_fails_the_run_although_nobody_asks():
    def refuse(context, name):
        if name == "square":
            raise LookupError("a broken hook")

    run = squares.start(3)
    engine_context.before_step.append(refuse)
    try:
        execute_as_a_worker(run)
    finally:
        engine_context.before_step.remove(refuse)
    with pytest.raises(LookupError, match="a broken hook"):
        run.result(timeout=0)
    assert calls == []


# -- Retries --------------------------------------------------------------------------------------------------------

LATE = {"after 1 minute": 60, "after 10 minutes": 600}


def flaky(delay, tries=2):
    @durable.step(name=f"after {delay}", atomic=False, max_attempts=tries, retry_delay=delay, retry_backoff=1)
    def try_again():
        calls.append(delay)
        if calls.count(delay) < tries:
            raise ConnectionError("not now")
        return f"{delay} s"

    return try_again


in_a_minute, in_ten_minutes = flaky(60), flaky(600)


@durable.workflow(name="tests.parallel.patient")
def patient():
    slow, slower, other = in_ten_minutes.submit(), in_a_minute.submit(), square.submit(3)
    return [slow.result(), slower.result(), other.result()]


def check_patience(run, go_on):
    go_on()
    stored = run.model
    # All have come as far as they can, also the one behind the first that has to wait.
    assert history() == [(1, "after 600", "RETRYING"), (2, "after 60", "RETRYING"), (3, "square", "SUCCEEDED")]
    assert (stored.status, stored.waiting_for, stored.worker) == ("WAITING", "retry:after 60", "")
    due = dict(StepCheckpoint.objects.values_list("name", "finished_at"))
    assert stored.wake_at == due["after 60"]
    assert Counter(calls) == {600: 1, 60: 1, 3: 1}
    advance("70 seconds")
    go_on()
    # It woke for the earlier one; the other's time has not come.
    assert Counter(calls) == {600: 1, 60: 2, 3: 1}
    assert (run.status, run.model.wake_at) == ("WAITING", due["after 600"])
    assert StepCheckpoint.objects.get(name="after 600").finished_at == due["after 600"]
    advance("11 minutes")
    go_on()
    assert run.result(timeout=0) == ["600 s", "60 s", 9]
    assert Counter(calls) == {600: 2, 60: 2, 3: 1}
    assert list(StepCheckpoint.objects.order_by("position").values_list("attempts", flat=True)) == [2, 2, 1]


@in_a_test
def test_a_retry_that_is_far_away_parks_the_run_and_is_not_made_before_its_time():
    check_patience(patient.start(), run_until_idle)


@for_real
def test_a_retry_that_is_far_away_parks_the_run_for_real():
    run = patient.start()
    check_patience(run, lambda: execute_as_a_worker(run))


@for_real
def test_a_replay_before_its_time_leaves_a_retry_alone():
    run = patient.start()
    execute_as_a_worker(run)
    # A person holds it, and lets it go on.
    run.pause()
    run.resume()
    execute_as_a_worker(run)
    assert Counter(calls) == {600: 1, 60: 1, 3: 1}
    assert (run.status, run.model.waiting_for) == ("WAITING", "retry:after 60")


@for_real
def test_the_others_go_on_while_one_waits_for_its_retry():
    @durable.workflow(name="tests.parallel.others")
    def others():
        late = in_a_minute.submit()
        slow = in_turn.submit("slow")
        return [late.result(), slow.result()]

    global turns
    turns = Turns((2,))
    turns.gates[2].clear()
    # The body asks for the one that has to wait; the other is under way until that one's try has failed.
    opened = told_of_records(lambda facts: facts["status"] == "RETRYING" and turns.gates[2].set())
    run = others.start()
    with opened:
        execute_as_a_worker(run)
    assert history() == [(1, "after 60", "RETRYING"), (2, "in turn", "SUCCEEDED")]
    assert run.status == "WAITING"


@for_real
def test_a_retry_is_made_at_its_time_also_while_the_body_is_busy(settings):
    settings.DURABLE = {"PARK_AFTER": 0.01}

    @durable.step(name="twice", atomic=False, max_attempts=2, retry_delay=0.2)
    def twice():
        if durable.current().attempt == 1:
            raise ConnectionError
        tried_again.set()
        return "second"

    @durable.step(name="busy", atomic=False)
    def busy():
        wait(tried_again)

    @durable.workflow(name="tests.parallel.busy")
    def busy_body():
        future = twice.submit()
        busy()
        return future.result()

    tried_again = threading.Event()
    assert busy_body() == "second"


@for_real
def test_short_retries_are_made_in_the_thread_while_others_go_on():
    again = flaky(0.01, tries=4)

    @durable.workflow(name="tests.parallel.short")
    def short():
        future = again.submit()
        return [future.result(), square.map(range(3))]

    assert short() == ["0.01 s", [0, 1, 4]]
    assert StepCheckpoint.objects.get(position=1).attempts == 4


@durable.workflow(name="tests.parallel.nobody_asks")
def nobody_asks(error=None):
    in_a_minute.submit()
    if error:
        raise ValueError(error)
    return "the end"


@in_a_test
@pytest.mark.parametrize("error", [None, "the body's own"])
def test_a_run_does_not_end_before_a_retry_that_nobody_asks_for(error):
    run = nobody_asks.start(error)
    run_until_idle()
    assert (run.status, run.model.waiting_for) == ("WAITING", "retry:after 60")
    advance("2 minutes")
    run_until_idle()
    assert run.status == ("FAILED" if error else "SUCCEEDED")
    assert history() == [(1, "after 60", "SUCCEEDED")]


@for_real
def test_an_error_in_a_map_is_raised_behind_the_last_retry_of_the_others():
    @durable.step(name="one of them", atomic=False, max_attempts=2, retry_delay=60, give_up_on=KeyError)
    def one_of_them(what):
        calls.append(what)
        if what == "bad":
            raise KeyError(what)
        if durable.current().attempt == 1:
            raise ConnectionError
        return what

    @durable.workflow(name="tests.parallel.mixed")
    def mixed():
        return one_of_them.map(["bad", "good"])

    run = mixed.start()
    execute_as_a_worker(run)
    assert run.status == "WAITING"
    advance("2 minutes")
    execute_as_a_worker(run)
    with pytest.raises(KeyError, match="bad"):
        run.result(timeout=0)
    assert Counter(calls) == {"bad": 1, "good": 2}


# -- Parking and ending ---------------------------------------------------------------------------------------------


@for_real
@pytest.mark.parametrize("how", ["sleep", "receive"])
def test_a_run_that_parks_waits_for_what_is_under_way_first(how):
    @durable.step(name="under way", atomic=False)
    def under_way(number):
        calls.append(number)
        barrier.wait(PATIENCE)
        Ledger.objects.create(key="under way")
        return number

    @durable.workflow(name=f"tests.parallel.parks.{how}")
    def parks():
        futures = [under_way.submit(number) for number in range(3)]
        # All three are under way, and none can end before the body parks.
        barrier.wait(PATIENCE)
        if how == "sleep":
            durable.sleep(3600)
        else:
            durable.receive("go")
        return [future.result() for future in futures]

    barrier = threading.Barrier(4)
    run = parks.start()
    execute_as_a_worker(run)
    assert (run.status, times("under way")) == ("WAITING", 3)
    assert threads_of_steps() == []
    assert StepCheckpoint.objects.filter(status="SUCCEEDED", name="under way").count() == 3
    # A replay does not come back to the barrier's three.
    barrier = threading.Barrier(1)
    run.send("now", "go")
    advance("2 hours")
    execute_as_a_worker(run)
    assert run.result(timeout=0) == [0, 1, 2]
    assert sorted(calls) == [0, 1, 2]


@durable.step(name="outside", atomic=False)
def outside(number):
    begun.release()
    wait(gate)
    Ledger.objects.create(key="outside")
    return number


@durable.step(name="inside")
def inside_a_transaction(number):
    if connection.vendor != "sqlite":  # whose one writer would keep the cancel waiting
        Ledger.objects.create(key="inside")
    begun.release()
    wait(gate)
    if connection.vendor == "sqlite":
        Ledger.objects.create(key="inside")
    return number


@durable.workflow(name="tests.parallel.cancelled")
def cancelled(step_name):
    step = {"outside": outside, "inside": inside_a_transaction}[step_name]
    return step.map(range(6), max_parallel=2 if step is outside or connection.vendor != "sqlite" else 1)


@for_real
@pytest.mark.parametrize("step_name", ["outside", "inside"])
def test_behind_a_cancel_none_begins_none_commits_and_what_happened_outside_is_recorded(step_name):
    if connection.vendor == "sqlite" and step_name == "inside":
        # There the step holds the file's write lock, and the cancel comes behind it. See the next test.
        return check_cancel_from_a_step()
    global gate, begun
    gate, begun = threading.Event(), threading.Semaphore(0)
    run = cancelled.using(run_id="cancelled").start(step_name)

    def cancel():
        for _ in range(2):
            assert begun.acquire(timeout=PATIENCE)
        assert run.cancel("no more")
        gate.set()

    assert together(lambda: execute_as_a_worker(run), cancel) == [None, None]
    assert run.status == "CANCELLED"
    assert times(step_name) == (2 if step_name == "outside" else 0)
    recorded = [(1, "outside", "SUCCEEDED"), (2, "outside", "SUCCEEDED")]
    assert history() == (recorded if step_name == "outside" else [])
    assert threads_of_steps() == []
    assert not begun.acquire(blocking=False), "another one has begun"
    # What is recorded is not repeated.
    assert run.resume()
    execute_as_a_worker(run)
    assert run.result(timeout=0) == list(range(6))
    assert times(step_name) == 6
    return None


def check_cancel_from_a_step():
    @durable.step(name="cancelling")
    def cancelling(number):
        calls.append(number)
        Ledger.objects.create(key="cancelling")
        durable.get_run(durable.current().run_id).cancel("enough")

    @durable.workflow(name="tests.parallel.cancels_itself")
    def cancels_itself():
        cancelling.map(range(5), max_parallel=1)
        last()

    run = cancels_itself.start()
    execute_as_a_worker(run)
    assert (run.status, run.model.cancel_reason) == ("CANCELLED", "enough")
    assert history() == [(1, "cancelling", "SUCCEEDED")]
    assert (calls, times("cancelling")) == ([0], 1)


@for_real
def test_a_parallel_step_may_cancel_its_own_run():
    check_cancel_from_a_step()


@for_real
def test_a_lost_lease_lets_none_begin_and_gives_the_run_back():
    @durable.step(name="losing", atomic=False)
    def losing(number):
        calls.append(number)
        current_run().lease.lose()
        return number

    @durable.workflow(name="tests.parallel.losing")
    def loses():
        return losing.map(range(4), max_parallel=1)

    run = loses.start()
    execute_as_a_worker(run)
    assert calls == [0]
    assert run.status == "PENDING"
    assert history() == [(1, "losing", "SUCCEEDED")]
    while run.status == "PENDING":
        done = len(calls)
        execute_as_a_worker(run)
        assert calls == list(range(done + 1))
    assert run.result(timeout=0) == [0, 1, 2, 3]


@in_a_test
def test_the_deadline_is_looked_at_before_each_of_them():
    @durable.step(name="long", atomic=False)
    def long(number):
        calls.append(number)
        advance("25 minutes")

    @durable.workflow(name="tests.parallel.timed", timeout=timedelta(hours=1))
    def timed():
        long.map(range(10))

    run = timed.start()
    run_until_idle()
    assert (run.status, run.model.cancel_reason) == ("CANCELLED", "timeout")
    assert calls == [0, 1, 2]
    assert StepCheckpoint.objects.count() == 3


# -- Waiting for so long --------------------------------------------------------------------------------------------


@durable.workflow(name="tests.parallel.impatient")
def impatient():
    future = in_ten_minutes.submit()
    try:
        future.result(timeout=timedelta(minutes=5))
    except TimeoutError as late:
        first = str(late)
    last()
    return [first, future.result(), future.result(timeout=0)]


@in_a_test
def test_a_result_that_is_late_is_late_on_every_replay_and_the_step_goes_on():
    run = impatient.start()
    run_until_idle()
    assert run.status == "WAITING"
    assert run.model.wake_at - run.model.started_at < timedelta(minutes=6)
    advance("3 minutes")
    # Somebody lets it go on before its time: what is left is kept.
    run.pause()
    run.resume()
    run_until_idle()
    assert (run.status, calls) == ("WAITING", [600])
    advance("2 minutes 1 second")
    run_until_idle()
    assert (run.status, calls) == ("WAITING", [600, "last"])
    advance("7 minutes")
    run_until_idle()
    late = "Step 'after 600' has not ended after 300 s."
    assert run.result(timeout=0) == [late, "600 s", "600 s"]
    assert history() == [
        (1, "after 600", "SUCCEEDED"),
        (2, "result after 600", "FAILED"),
        (3, "last", "SUCCEEDED"),
        (4, "result after 600", "SUCCEEDED"),
    ]


@for_real
def test_timeout_0_looks_once_at_a_step_that_is_under_way():
    global turns
    turns = Turns((1,))
    turns.gates[1].clear()

    @durable.workflow(name="tests.parallel.looks")
    def looks():
        future = in_turn.submit("a")
        seen = []
        for timeout in (0, 0.05):
            try:
                future.result(timeout=timeout)
            except TimeoutError:
                seen.append(timeout)
        turns.gates[1].set()
        return [*seen, future.result()]

    assert looks() == [0, 0.05, "A"]


@in_a_test
@pytest.mark.parametrize(("timeout", "error"), [("1", TypeError), (-1, ValueError), (True, TypeError)])
def test_a_timeout_that_makes_no_sense_is_refused(timeout, error):
    @durable.workflow(name="tests.parallel.no_sense")
    def no_sense():
        square.submit(1).result(timeout=timeout)

    with pytest.raises(error, match="timeout takes"):
        no_sense()


# -- What is around a step ------------------------------------------------------------------------------------------


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

    global turns
    turns = Turns((1,))
    turns.gates[1].clear()
    assert parent() == [[0, 1, 4, 9], "A"]
    assert threads_of_steps() == []


# -- Where there is no workflow -------------------------------------------------------------------------------------


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


# -- The documentation ----------------------------------------------------------------------------------------------


@for_real
def test_the_examples_of_the_page_do_what_it_says(monkeypatch):
    monkeypatch.setattr(registry, "_workflows", dict(registry._workflows))
    page, namespace = "docs/how-to/parallel-steps.md", {"__name__": "an_example"}
    for block in blocks(page):
        exec(compile(block.text, f"{page}, {block.section}", "exec"), namespace)
    assert set(WorkflowRun.objects.values_list("status", flat=True)) == {"SUCCEEDED"}
    assert WorkflowRun.objects.count() == 3


# -- Async code -----------------------------------------------------------------------------------------------------


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
