"""An atomic step's writes and its checkpoint are one commit, whatever happens; and so is the fence around both."""

import threading
from datetime import timedelta

import pytest
from django.contrib.admin.models import LogEntry
from django.contrib.auth.models import Permission
from django.db import DataError, IntegrityError, OperationalError, connection, connections, transaction
from django.utils import timezone

import django_durable as durable
from django_durable.exceptions import Crash, LeaseLost
from django_durable.models import StepCheckpoint, Worker, WorkflowRun
from django_durable.serialization import dump_exception
from django_durable.states import RunStatus
from django_durable.testing import crash_before, run_until_idle
from tests.app.models import Account, Ledger
from tests.app.workflows import times
from tests.threads import elsewhere

pytestmark = pytest.mark.django_db(transaction=True)

happenings: list = []


@pytest.fixture(autouse=True)
def nothing_happened_yet():
    happenings.clear()


@durable.workflow(name="tests.transactions.one")
def one(*args): ...


@pytest.fixture(autouse=True)
def one_again(monkeypatch):
    monkeypatch.setattr(one, "func", one.func)


def workflow_of(step):
    """A workflow of one step, as it is deployed in this test."""
    one.func = lambda *args: step(*args)
    return one


def outcome():
    step = StepCheckpoint.objects.get()
    return (step.status, step.kind, step.attempts)


# -- Together or not at all -----------------------------------------------------------------------------------------


@durable.step(name="pay")
def pay(then=None):
    """Write, then do what the test wants to see the consequence of."""
    Ledger.objects.create(key="paid")
    happenings.append("pay")
    return THEN[then]() if then else "paid"


def fails():
    raise ValueError("after the write")


def unstorable():
    return lambda: None


def too_large():
    return "x" * 3_000_000


def swallows_an_integrity_error():
    permission = Permission.objects.first()
    try:
        Permission.objects.create(content_type=permission.content_type, codename=permission.codename, name="twice")
    except IntegrityError:
        return "went on as if nothing had happened"


def swallows_an_integrity_error_of_a_cursor():
    table = Permission._meta.db_table
    columns = "id, content_type_id, codename, name"
    try:
        with connection.cursor() as cursor:
            cursor.execute(f"INSERT INTO {table} ({columns}) SELECT {columns} FROM {table}")
    except IntegrityError:
        return "went on as if nothing had happened"


def swallows_it_properly():
    permission = Permission.objects.first()
    try:
        with transaction.atomic():
            Permission.objects.create(content_type=permission.content_type, codename=permission.codename, name="twice")
    except IntegrityError:
        return "noticed"


def leaves_a_dangling_reference():
    LogEntry.objects.create(user_id=10**6, object_repr="x", action_flag=1)


def rolls_back_by_itself():
    transaction.set_rollback(True)
    return "asked for a rollback"


THEN = {
    each.__name__: each
    for each in [
        fails,
        unstorable,
        too_large,
        swallows_an_integrity_error,
        swallows_an_integrity_error_of_a_cursor,
        swallows_it_properly,
        leaves_a_dangling_reference,
        rolls_back_by_itself,
    ]
}


def test_the_write_and_the_checkpoint_are_there_together():
    assert workflow_of(pay)() == "paid"
    assert (times("paid"), outcome()) == (1, ("SUCCEEDED", "atomic", 1))


@pytest.mark.parametrize(
    ("then", "error"),
    [
        ("fails", ValueError),
        ("unstorable", durable.SerializationError),
        ("too_large", durable.PayloadTooLarge),
        ("leaves_a_dangling_reference", IntegrityError),
    ],
)
def test_a_step_that_fails_leaves_no_write_and_one_recorded_error(then, error):
    for _ in range(2):
        with pytest.raises(error):
            workflow_of(pay).using(run_id="1")(then)
    assert (times("paid"), outcome()) == (0, ("FAILED", "atomic", 1))
    assert happenings == ["pay"]
    assert not LogEntry.objects.exists()


@pytest.mark.parametrize("how", ["swallows_an_integrity_error", "swallows_an_integrity_error_of_a_cursor"])
def test_a_swallowed_database_error_never_leaves_a_checkpoint_without_its_effect(how):
    """On PostgreSQL the transaction is broken from the error on, and its COMMIT would be a silent ROLLBACK."""
    run = workflow_of(pay).start(how)
    run_until_idle()
    if run.status == "SUCCEEDED":
        # A database that goes on behind a statement that failed.
        assert (times("paid"), outcome()[0], connection.vendor) == (1, "SUCCEEDED", "sqlite")
    else:
        assert (times("paid"), outcome()[0], run.status) == (0, "FAILED", "FAILED")
        # What to do about it; the database's own words do not say where the error was.
        assert "caught a database error and went on" in StepCheckpoint.objects.get().error


def test_a_database_error_in_a_block_of_its_own_may_be_caught():
    assert workflow_of(pay)("swallows_it_properly") == "noticed"
    assert (times("paid"), outcome()[0]) == (1, "SUCCEEDED")


@pytest.mark.timeout(20)
def test_a_step_that_asks_for_a_rollback_is_not_taken_for_a_success():
    """set_rollback(True) makes atomic() roll back without a word: write and checkpoint both gone."""
    run = workflow_of(pay).start("rolls_back_by_itself")
    run_until_idle()
    recorded = StepCheckpoint.objects.filter(status="SUCCEEDED").count()
    assert recorded == times("paid")
    assert run.status == "FAILED"


def test_what_waits_for_the_commit_happens_after_it():
    @durable.step(name="with_mail")
    def with_mail():
        Ledger.objects.create(key="paid")

        def mail():
            happenings.append((times("paid"), StepCheckpoint.objects.count(), connection.in_atomic_block))

        transaction.on_commit(mail)

    workflow_of(with_mail)()
    assert happenings == [(1, 1, False)]


def test_what_waits_for_a_commit_that_does_not_come_does_not_happen():
    @durable.step(name="with_mail")
    def with_mail():
        transaction.on_commit(lambda: happenings.append("mail"))
        return 1 / 0

    with pytest.raises(ZeroDivisionError):
        workflow_of(with_mail)()
    assert happenings == []


def test_an_error_after_the_commit_does_not_undo_a_step_that_is_done():
    @durable.step(name="with_mail")
    def with_mail():
        Ledger.objects.create(key="paid")
        transaction.on_commit(lambda: 1 / 0)
        return "done"

    assert workflow_of(with_mail)() == "done"
    assert (times("paid"), outcome()) == (1, ("SUCCEEDED", "atomic", 1))


# -- Another's outcome ----------------------------------------------------------------------------------------------


def insert_outcome(run_id, **changes):
    """What another executor of the run, one that took this one for dead, has recorded meanwhile."""
    run = WorkflowRun.objects.get(pk=run_id)
    facts = {
        "position": 1,
        "name": "pay",
        "kind": "atomic",
        "status": "SUCCEEDED",
        "output": '"the other\'s"',
        "attempt": run.attempt,
        "started_at": run.created_at,
        "finished_at": run.created_at,
        **changes,
    }
    StepCheckpoint.objects.create(run_id=run_id, **facts)


@durable.step(name="pay", atomic=False)
def pay_outside():
    Ledger.objects.create(key="paid")
    happenings.append("pay")
    return "mine"


def meanwhile(act, step):
    """A workflow whose executor is overtaken by `act` after its claim and before its first step is committed."""

    def body():
        elsewhere(lambda: act("overtaken"))
        return step()

    one.func = body
    return one.using(run_id="overtaken")


@pytest.mark.parametrize(("step", "effects"), [(pay, 0), (pay_outside, 1)], ids=["atomic", "outside"])
def test_another_ones_outcome_is_taken_and_an_atomic_steps_writes_are_undone(step, effects):
    assert meanwhile(insert_outcome, step)() == "the other's"
    assert happenings == ["pay"]
    assert (times("paid"), StepCheckpoint.objects.count()) == (effects, 1)
    assert WorkflowRun.objects.get().output == '"the other\'s"'


def test_another_ones_error_is_taken_too():
    def act(run_id):
        insert_outcome(run_id, status="FAILED", output="", exception=dump_exception(ZeroDivisionError("the other's")))

    with pytest.raises(ZeroDivisionError, match="the other's"):
        meanwhile(act, pay)()
    assert times("paid") == 0


def test_a_failure_gives_way_to_another_ones_success():
    assert meanwhile(insert_outcome, lambda: pay("fails"))() == "the other's"
    assert (times("paid"), outcome()[0]) == (0, "SUCCEEDED")


# -- The fence ------------------------------------------------------------------------------------------------------


def take_over(run_id):
    """What another worker does that claims a run whose executor was thought dead."""
    now = timezone.now()
    moments = {"started_at": now, "last_seen": now, "expires_at": now + timedelta(hours=1)}
    Worker.objects.create(id="another", host="elsewhere", pid=1, **moments)
    WorkflowRun.objects.filter(pk=run_id).update(attempt=2, worker="another")


def swallowing(step):
    def body():
        try:
            return step()
        except Exception:
            happenings.append("caught")
            return "caught"

    return body


@pytest.mark.parametrize(("step", "effects"), [(pay, 0), (pay_outside, 1)], ids=["atomic", "outside"])
def test_an_executor_that_was_overtaken_records_nothing(step, effects):
    meanwhile(take_over, swallowing(step)).start()
    run_until_idle()
    run = WorkflowRun.objects.get()
    assert (run.status, run.attempt, run.worker, run.output) == ("RUNNING", 2, "another", "")
    assert not StepCheckpoint.objects.exists()
    assert times("paid") == effects
    assert happenings == ["pay"], "an `except Exception` has seen it"


def test_losing_the_lease_reaches_a_workflow_that_asks_for_everything():
    def body():
        try:
            pay()
        except BaseException as error:
            happenings.append(type(error))
        Ledger.objects.create(key="the body goes on")
        pay()

    meanwhile(take_over, body).start()
    run_until_idle()
    assert happenings == ["pay", LeaseLost]
    assert (times("paid"), WorkflowRun.objects.get().status) == (0, "RUNNING")


@pytest.mark.parametrize("end", [lambda: "my result", fails], ids=["result", "error"])
def test_an_end_of_one_that_was_overtaken_is_not_recorded(end):
    meanwhile(take_over, end).start()
    run_until_idle()
    run = WorkflowRun.objects.get()
    assert (run.status, run.output, run.error, run.failures) == ("RUNNING", "", "", 0)


def cancel(run_id):
    """As another process does it: this one's memory does not know."""
    runs = WorkflowRun.objects.filter(pk=run_id)
    assert runs.move(RunStatus.CANCELLED, cancel_reason="changed my mind", finished_at=timezone.now())


@pytest.mark.parametrize(("step", "effects"), [(pay, 0), (pay_outside, 1)], ids=["atomic", "outside"])
def test_after_a_cancel_no_atomic_step_commits_and_an_outside_call_is_kept(step, effects):
    def body():
        swallowing(step)()
        happenings.append("further")
        pay()

    meanwhile(cancel, body).start()
    run_until_idle()
    run = durable.get_run("overtaken")
    assert run.status == "CANCELLED"
    assert times("paid") <= effects
    assert StepCheckpoint.objects.count() == times("paid")
    assert "further" not in happenings
    assert "caught" not in happenings


def test_a_cancelled_call_that_was_recorded_is_not_repeated_by_resume():
    """The cancel comes while the outside call is under way."""

    @durable.step(name="call", atomic=False)
    def call():
        happenings.append("call")
        if len(happenings) == 1:
            elsewhere(lambda: cancel("1"))
        return "answer"

    def body():
        answer = call()
        return [answer, pay()]

    one.func = body
    with pytest.raises(durable.RunCancelled):
        one.using(run_id="1")()
    assert outcome() == ("SUCCEEDED", "step", 1)
    durable.get_run("1").resume()
    run_until_idle()
    assert durable.get_run("1").result(timeout=0) == ["answer", "paid"]
    assert happenings == ["call", "pay"]


def test_an_outside_call_of_one_that_was_overtaken_is_not_recorded_over_the_new_owners():
    @durable.step(name="call", atomic=False)
    def call():
        elsewhere(lambda: take_over("1"))
        elsewhere(lambda: insert_outcome("1", name="call", kind="step"))
        return "mine"

    one.func = lambda: call()
    one.using(run_id="1").start()
    run_until_idle()
    assert StepCheckpoint.objects.get().output == '"the other\'s"'


# -- Dying around a commit ------------------------------------------------------------------------------------------


def dies_at(statement, table):
    """The process dies just before it sends such a statement, once the step was executed."""

    def check(execute, sql, params, many, context):
        if happenings and sql.startswith(statement) and table._meta.db_table in sql:
            raise Crash(sql)
        return execute(sql, params, many, context)

    return connection.execute_wrapper(check)


@pytest.mark.parametrize(("step", "effects"), [(pay, 1), (pay_outside, 2)], ids=["atomic", "outside"])
def test_a_process_that_dies_before_the_checkpoint_repeats_the_step(step, effects):
    run = workflow_of(step).start()
    with pytest.raises(Crash), dies_at("INSERT", StepCheckpoint):
        run_until_idle()
    assert run.status == "RUNNING"
    run_until_idle()
    assert run.status == "SUCCEEDED"
    assert (times("paid"), run.model.recoveries) == (effects, 1)


@pytest.mark.parametrize("step", [pay, pay_outside], ids=["atomic", "outside"])
def test_a_process_that_dies_before_the_end_is_stored_repeats_no_step(step):
    run = workflow_of(step).start()
    with pytest.raises(Crash), dies_at("UPDATE", WorkflowRun):
        run_until_idle()
    assert run.status == "RUNNING"
    run_until_idle()
    assert (run.status, times("paid"), happenings) == ("SUCCEEDED", 1, ["pay"])


def test_a_crash_before_an_atomic_step_leaves_nothing_of_it():
    run = workflow_of(pay).start()
    with crash_before("pay"):
        run_until_idle()
    assert (times("paid"), StepCheckpoint.objects.count()) == (0, 0)
    run_until_idle()
    assert (run.status, times("paid")) == ("SUCCEEDED", 1)


# -- Where the database has row locks and several isolation levels ---------------------------------------------------

if connection.vendor == "postgresql":

    @durable.step(name="level", isolation=None)
    def level():
        with connection.cursor() as cursor:
            cursor.execute("SHOW transaction_isolation")
            return cursor.fetchone()[0]

    @pytest.mark.parametrize("wanted", ["read committed", "repeatable read", "serializable", "SERIALIZABLE"])
    def test_a_step_has_the_isolation_level_that_it_asks_for(wanted):
        step = durable.step(name="level", isolation=wanted)(level.func)
        assert workflow_of(step)() == wanted.lower()
        # And only there.
        assert level.func() == "read committed"

    def test_a_cancel_inside_an_atomic_steps_transaction_undoes_it():
        @durable.step(name="pay")
        def paying():
            Ledger.objects.create(key="paid")
            elsewhere(lambda: cancel("1"))

        one.func = lambda: paying()
        with pytest.raises(durable.RunCancelled, match="changed my mind"):
            one.using(run_id="1")()
        assert (times("paid"), StepCheckpoint.objects.count()) == (0, 0)

    def test_a_takeover_inside_an_atomic_steps_transaction_undoes_it():
        @durable.step(name="pay")
        def paying():
            Ledger.objects.create(key="paid")
            elsewhere(lambda: take_over("1"))

        one.func = lambda: paying()
        one.using(run_id="1").start()
        run_until_idle()
        assert (times("paid"), StepCheckpoint.objects.count()) == (0, 0)

    def test_from_the_fence_to_the_commit_nobody_can_change_the_run_and_before_it_everybody_can():
        """An unlocked look would let a cancel commit in between, and the step's writes after it."""

        def try_to_lock():
            with transaction.atomic():
                WorkflowRun.objects.select_for_update(nowait=True).get()

        def at_the_fence(execute, sql, params, many, context):
            result = execute(sql, params, many, context)
            if sql.startswith("INSERT") and StepCheckpoint._meta.db_table in sql:
                with pytest.raises(OperationalError, match="could not obtain lock"):
                    elsewhere(try_to_lock)
                happenings.append("locked")
            return result

        @durable.step(name="pay")
        def paying():
            Ledger.objects.create(key="paid")
            # No lock on the run is held while the user's code runs, or a cancel would wait for the whole step.
            elsewhere(try_to_lock)
            happenings.append("free")

        with connection.execute_wrapper(at_the_fence):
            workflow_of(paying)()
        assert happenings == ["free", "locked"]

    def test_an_outcome_of_another_inside_the_transaction_is_taken():
        @durable.step(name="pay")
        def paying():
            Ledger.objects.create(key="paid")
            elsewhere(lambda: insert_outcome("1"))
            return "mine"

        one.func = lambda: paying()
        assert one.using(run_id="1")() == "the other's"
        assert (times("paid"), StepCheckpoint.objects.count()) == (0, 1)

    @pytest.mark.parametrize("isolation", ["repeatable read", "serializable"])
    def test_a_serialization_failure_runs_the_whole_step_again(isolation):
        account = Account.objects.create(name="Ada", balance=100)

        @durable.step(name="add", isolation=isolation)
        def add():
            balance = Account.objects.get(pk=account.pk).balance
            happenings.append(balance)
            Ledger.objects.create(key="added")
            if len(happenings) == 1:
                elsewhere(lambda: Account.objects.filter(pk=account.pk).update(balance=500))
            Account.objects.filter(pk=account.pk).update(balance=balance + 1)
            return balance + 1

        assert workflow_of(add)() == 501
        account.refresh_from_db()
        # The second run saw the other's write; what the first had written is gone.
        assert (account.balance, happenings, times("added")) == (501, [100, 500], 1)
        # It is no failed try of the step.
        assert outcome() == ("SUCCEEDED", "atomic", 1)

    def test_a_serialization_failure_at_commit_runs_the_whole_step_again():
        """Write skew: each reads what the other writes; the second to commit is refused."""
        ada, bob = Account.objects.create(name="Ada", balance=1), Account.objects.create(name="Bob", balance=1)

        def leave(me, other):
            if Account.objects.get(pk=other.pk).balance:
                Account.objects.filter(pk=me.pk).update(balance=0)

        def other_leaves():
            with transaction.atomic():
                with connection.cursor() as cursor:
                    cursor.execute("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE")
                leave(bob, ada)

        @durable.step(name="leave", isolation="serializable")
        def leaving():
            happenings.append(1)
            leave(ada, bob)
            if len(happenings) == 1:
                elsewhere(other_leaves)

        workflow_of(leaving)()
        assert len(happenings) == 2
        assert sorted(Account.objects.values_list("name", "balance")) == [("Ada", 1), ("Bob", 0)]

    def test_a_deadlock_runs_the_whole_step_again():
        ada, bob = Account.objects.create(name="Ada"), Account.objects.create(name="Bob")
        has_bob = threading.Event()

        def touch(account):
            Account.objects.filter(pk=account.pk).update(balance=1)

        def lock_timeout(wait):
            with connection.cursor() as cursor:
                cursor.execute(f"SET LOCAL deadlock_timeout = '{wait}'")

        def other():
            try:
                with transaction.atomic():
                    lock_timeout("60s")  # so that it is the step which the database ends
                    touch(bob)
                    has_bob.set()
                    touch(ada)
            finally:
                connections.close_all()

        def somebody_waits():
            with connection.cursor() as cursor:
                cursor.execute("SELECT count(*) FROM pg_locks WHERE NOT granted")
                return cursor.fetchone()[0]

        thread = threading.Thread(target=other)

        @durable.step(name="touch")
        def touching():
            happenings.append(1)
            touch(ada)
            if len(happenings) == 1:
                lock_timeout("10ms")
                thread.start()
                assert has_bob.wait(10)
                while not somebody_waits():
                    pass
            touch(bob)
            Ledger.objects.create(key="touched")

        workflow_of(touching)()
        thread.join(10)
        assert (len(happenings), times("touched"), outcome()) == (2, 1, ("SUCCEEDED", "atomic", 1))

    @pytest.mark.parametrize("in_one_statement", [True, False], ids=["a statement", "the transaction"])
    def test_a_step_beyond_its_timeout_is_stopped_and_undone(in_one_statement):
        @durable.step(name="slow", timeout=timedelta(milliseconds=100))
        def slow():
            Ledger.objects.create(key="paid")
            with connection.cursor() as cursor:
                for _ in range(1 if in_one_statement else 200):
                    cursor.execute("SELECT pg_sleep(%s)", [10 if in_one_statement else 0.01])

        for _ in range(2):
            with pytest.raises(durable.StepTimeout, match=r"'slow' of run 1 took longer than its timeout of 0\.1 s"):
                workflow_of(slow).using(run_id="1")()
        assert (times("paid"), outcome()) == (0, ("FAILED", "atomic", 1))

    def test_a_timeout_is_over_with_its_step():
        @durable.step(name="quick", timeout=5)
        def quick():
            return setting()

        def setting():
            with connection.cursor() as cursor:
                cursor.execute("SHOW statement_timeout")
                return cursor.fetchone()[0]

        assert workflow_of(quick)() == "5s"
        assert setting() == "0"

    def test_the_users_own_statement_timeout_is_the_users_own_error():
        @durable.step(name="own")
        def own():
            with connection.cursor() as cursor:
                cursor.execute("SET LOCAL statement_timeout = 10")
                cursor.execute("SELECT pg_sleep(5)")

        with pytest.raises(OperationalError, match="statement timeout"):
            workflow_of(own)()

    def test_a_value_that_the_database_refuses_is_the_steps_error():
        @durable.step(name="wide")
        def wide():
            Ledger.objects.create(key="x" * 201)

        for _ in range(2):
            with pytest.raises(DataError, match="too long"):
                workflow_of(wide).using(run_id="1")()

    def test_a_connection_that_is_killed_within_a_step_is_a_pause():
        @durable.step(name="pay")
        def paying():
            happenings.append(1)
            Ledger.objects.create(key="paid")
            if len(happenings) == 1:
                pid = connection.connection.info.backend_pid
                elsewhere(lambda: kill(pid))
            return Ledger.objects.count()

        def kill(pid):
            with connection.cursor() as cursor:
                cursor.execute("SELECT pg_terminate_backend(%s, 5000)", [pid])

        assert workflow_of(paying)() == 1
        assert (len(happenings), times("paid"), outcome()) == (2, 1, ("SUCCEEDED", "atomic", 1))

    def test_a_connection_that_is_killed_between_steps_is_a_pause():
        def kill(pid):
            with connection.cursor() as cursor:
                cursor.execute("SELECT pg_terminate_backend(%s, 5000)", [pid])

        def body():
            pay()
            pid = connection.connection.info.backend_pid
            elsewhere(lambda: kill(pid))
            return pay_outside()

        one.func = body
        assert one() == "mine"
        assert times("paid") == 2
