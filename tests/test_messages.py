"""`send`, `receive`: each message once, in order, whoever dies in between."""

import logging
import threading
from datetime import timedelta

import pytest
from django.db import IntegrityError, connection, transaction
from django.test.utils import CaptureQueriesContext

import django_durable as durable
from django_durable.models import Message, StepCheckpoint, WorkflowRun
from django_durable.testing import advance, crash_after, crash_before, run_until_idle
from tests.app.models import Ledger
from tests.app.workflows import echo, times
from tests.docs.test_reference import own_registry, run_examples  # noqa: F401 (a fixture)
from tests.test_counts import commits, statements
from tests.threads import elsewhere, together

pytestmark = pytest.mark.django_db


@durable.step(name="keep")
def keep(what):
    Ledger.objects.create(key=str(what))


@durable.workflow(name="tests.messages.collect")
def collect(count, topic=None, timeout=None):
    """Takes so many messages."""
    return [durable.receive(topic, timeout=timeout, default="nothing came") for _ in range(count)]


@durable.workflow(name="tests.messages.listen")
def listen(*topics):
    return [durable.receive(topic) for topic in topics]


def unread(run):
    return list(Message.objects.filter(run=run.id, consumed_at=None).order_by("pk").values_list("body", flat=True))


# -- In order, and each once ----------------------------------------------------------------------------------------


def test_messages_come_in_the_order_in_which_they_were_sent():
    run = collect.start(5)
    for number in range(5):
        durable.send(run, number)
    run_until_idle()
    assert run.result(0) == [0, 1, 2, 3, 4]


def test_each_topic_has_an_order_of_its_own():
    run = listen.start("b", None, "a", "b")
    for topic, message in [("a", 1), ("b", 2), (None, 3), ("b", 4)]:
        durable.send(run.id, message, topic)
    run_until_idle()
    assert run.result(0) == [2, 3, 1, 4]


def test_a_message_waits_for_a_receiver_that_comes_later():
    run = collect.using(run_after=timedelta(days=1)).start(1)
    durable.send(run, "early")
    run_until_idle()
    assert run.status == "WAITING"
    advance("1 day")
    run_until_idle()
    assert run.result(0) == ["early"]


def test_a_run_waits_as_a_row_and_the_sender_makes_it_due():
    run = collect.start(1, "tickets")
    run_until_idle()
    model = run.model
    assert (model.status, model.waiting_for, model.worker, model.wake_at) == ("WAITING", "message:tickets", "", None)
    (step,) = run.model.steps.all()
    assert (step.kind, step.name, step.status) == ("receive", "receive tickets", "WAITING")
    durable.send(run, "another topic")
    assert run.status == "WAITING"
    durable.send(run, {"seat": "A1"}, "tickets")
    assert run.status == "PENDING"
    run_until_idle()
    assert run.result(0) == [{"seat": "A1"}]
    assert unread(run) == ['"another topic"']


def test_a_message_to_another_run_wakes_nobody_here():
    one, other = collect.start(1), collect.start(1)
    run_until_idle()
    durable.send(one, "for one")
    assert (one.status, other.status) == ("PENDING", "WAITING")


def test_a_handle_sends_too():
    run = collect.start(2, "t")
    run.send(1, "t", key="k")
    run.send(2, topic="t", key="k")
    run.send(3, topic="t")
    run_until_idle()
    assert run.result(0) == [1, 3]


def test_a_message_says_when_it_was_taken_and_by_which_step():
    run = collect.start(1)
    durable.send(run, "m", key="k")
    run_until_idle()
    message = Message.objects.get(run=run.id)
    step = run.model.steps.get()
    assert (message.consumed_by, message.key, message.topic) == (step.position, "k", "")
    assert message.created_at <= message.consumed_at


# -- Keys -----------------------------------------------------------------------------------------------------------


def test_a_repeat_is_dropped_also_after_the_first_was_read():
    """A webhook comes twice, the second time after an hour."""
    run = collect.start(2, "paid")
    durable.send(run, "first", "paid", key="webhook 1")
    run_until_idle()
    attempt = run.model.attempt
    durable.send(run, "again", "paid", key="webhook 1")
    run_until_idle()
    # A thousand repeats would be a thousand replays.
    assert (run.status, run.model.attempt) == ("WAITING", attempt)
    durable.send(run, "second", "paid", key="webhook 2")
    run_until_idle()
    assert run.result(0) == ["first", "second"]


def test_a_key_is_one_of_its_run_and_its_topic():
    one, other = collect.start(1, "a"), collect.start(1, "a")
    for run, topic in [(one, "a"), (one, "b"), (other, "a"), (one, None)]:
        durable.send(run, "m", topic, key="k")
    assert Message.objects.count() == 4


def test_without_a_key_equal_messages_are_different_ones():
    run = collect.start(2)
    durable.send(run, "same")
    durable.send(run, "same")
    run_until_idle()
    assert run.result(0) == ["same", "same"]


@pytest.mark.django_db(transaction=True)
def test_the_same_key_sent_from_many_places_at_once_arrives_once():
    run = collect.start(2, timeout=0)
    together(*[lambda: durable.send(run, "m", key="k") for _ in range(8)])
    run_until_idle()
    assert run.result(0) == ["m", "nothing came"]


# -- In the caller's transaction ------------------------------------------------------------------------------------


@pytest.mark.django_db(transaction=True)
def test_a_message_is_sent_when_the_senders_transaction_commits():
    run = collect.start(1)
    run_until_idle()
    with transaction.atomic():
        durable.send(run, "m")
        if connection.vendor == "postgresql":
            assert elsewhere(lambda: run.status) == "WAITING"
        assert elsewhere(lambda: Message.objects.count()) == 0
    assert run.status == "PENDING"


@pytest.mark.django_db(transaction=True)
def test_a_message_is_rolled_back_with_the_senders_transaction():
    run = collect.start(1)
    run_until_idle()
    with transaction.atomic():
        durable.send(run, "m", key="k")
        transaction.set_rollback(True)
    assert (run.status, Message.objects.count()) == ("WAITING", 0)
    durable.send(run, "the same key is free again", key="k")
    run_until_idle()
    assert run.result(0) == ["the same key is free again"]


def test_a_message_to_an_ended_run_is_stored_and_never_read():
    run = echo.start(1)
    run_until_idle()
    durable.send(run, "late")
    assert run_until_idle() == 0
    assert (run.status, unread(run)) == ("SUCCEEDED", ['"late"'])


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("run_id", ["nobody", "with a \0", "\ud800", "x" * 500], ids=["none", "nul", "half", "long"])
def test_an_unknown_run_is_a_clear_answer_and_the_views_transaction_goes_on(run_id):
    with transaction.atomic():
        Ledger.objects.create(key="before")
        with pytest.raises(durable.RunNotFound):
            durable.send(run_id, "m")
        Ledger.objects.create(key="after")
    assert (times("before"), times("after"), Message.objects.count()) == (1, 1, 0)


# -- From a workflow ------------------------------------------------------------------------------------------------


@durable.workflow(name="tests.messages.tell")
def tell(to, *messages):
    for message in messages:
        durable.send(to, message)
        keep(message)


@pytest.mark.parametrize("crash", [crash_before, crash_after])
@pytest.mark.parametrize("step", ["send", "keep"])
def test_a_workflow_sends_exactly_once_whenever_it_dies(crash, step):
    run = collect.start(2)
    sender = tell.start(run, "a", "b")
    with crash(step):
        run_until_idle()
    run_until_idle()
    assert sender.status == "SUCCEEDED"
    assert run.result(0) == ["a", "b"]
    assert Message.objects.count() == 2


@pytest.mark.django_db(databases=["default", "other"])
def test_a_workflow_sends_exactly_once_into_another_database():
    """Two databases have no common commit: what is repeated after a crash is dropped there."""
    run = collect.using(database="other").start(3, timeout=0)
    sender = tell.start(run, "a", "b")
    with crash_before("keep"):
        run_until_idle()
    # As if the process had died before its own commit.
    StepCheckpoint.objects.filter(run=sender.id).delete()
    run_until_idle()
    run_until_idle("other")
    assert run.result(0) == ["a", "b", "nothing came"]


@durable.step(name="send_and_fail")
def send_and_fail(to, fails):
    durable.send(to, "from a step")
    if fails:
        raise ValueError("undone")


@durable.workflow(name="tests.messages.from_a_step")
def from_a_step(to, fails):
    send_and_fail(to, fails)


@pytest.mark.parametrize("fails", [False, True])
def test_an_atomic_steps_message_is_sent_with_its_commit_or_not_at_all(fails):
    run = collect.start(1)
    run_until_idle()
    sender = from_a_step.start(run, fails)
    run_until_idle()
    assert sender.status == ("FAILED" if fails else "SUCCEEDED")
    assert run.status == ("WAITING" if fails else "SUCCEEDED")
    assert Message.objects.count() == (0 if fails else 1)


def test_an_atomic_step_that_dies_before_its_commit_sends_nothing_and_then_once():
    run = collect.start(2, timeout=60)
    sender = from_a_step.start(run, False)
    with crash_before("send_and_fail"):
        run_until_idle()
    run_until_idle()
    advance("2 minutes")
    run_until_idle()
    assert (sender.status, run.result(0)) == ("SUCCEEDED", ["from a step", "nothing came"])


def test_a_run_may_send_to_itself():
    @durable.workflow(name="tests.messages.own")
    def own():
        me = durable.current().run_id
        durable.send(me, "note")
        return durable.receive()

    assert own() == "note"


def test_an_unknown_receiver_can_be_caught_in_the_workflow_and_takes_its_place_in_the_history():
    @durable.workflow(name="tests.messages.to_nobody")
    def to_nobody():
        try:
            durable.send("nobody", "m")
        except durable.RunNotFound:
            keep("caught")
        durable.sleep(60)
        return "went on"

    run = to_nobody.start()
    run_until_idle()
    assert run.status == "WAITING"
    advance("1 minute")
    run_until_idle()
    assert (run.result(0), times("caught")) == ("went on", 1)


# -- Nothing lost, nothing twice ------------------------------------------------------------------------------------


@durable.workflow(name="tests.messages.work_off")
def work_off(count):
    for _ in range(count):
        keep(durable.receive("jobs"))
    return "done"


@pytest.mark.parametrize("crash", [crash_before, crash_after])
@pytest.mark.parametrize("step", ["receive jobs", "keep"])
@pytest.mark.parametrize("parked", [False, True])
def test_a_message_that_was_taken_when_the_process_died_is_neither_lost_nor_taken_twice(crash, step, parked):
    run = work_off.start(2)
    if parked:
        run_until_idle()
    for message in ("a", "b"):
        durable.send(run, message, "jobs")
    with crash(step):
        run_until_idle()
    run_until_idle()
    assert run.result(0) == "done"
    assert (times("a"), times("b")) == (1, 1)
    assert Message.objects.filter(consumed_at=None).count() == 0


def test_a_message_whose_step_is_forgotten_by_a_retry_is_there_again():
    """It was taken on a course that followed from an error, and the retry takes another."""
    broken = [True]

    @durable.step(name="unsure", atomic=False)
    def unsure():
        if broken:
            raise ConnectionError

    @durable.workflow(name="tests.messages.other_course", max_attempts=2, retry_delay=60)
    def other_course():
        try:
            unsure()
        except ConnectionError:
            keep(durable.receive())
            raise
        return durable.receive()

    run = other_course.start()
    durable.send(run, "only one")
    run_until_idle()
    assert times("only one") == 1
    broken.clear()
    advance("2 minutes")
    run_until_idle()
    assert run.result(0) == "only one"
    assert Message.objects.get().consumed_by == 2


def test_a_message_that_a_step_before_the_error_took_stays_taken():
    broken = [True]

    @durable.step(name="unsure_then", atomic=False)
    def unsure_then(message):
        if broken:
            raise ConnectionError

    @durable.workflow(name="tests.messages.same_course", max_attempts=2, retry_delay=60)
    def same_course():
        message = durable.receive()
        unsure_then(message)
        return [message, durable.receive(timeout=0)]

    run = same_course.start()
    durable.send(run, "only one")
    run_until_idle()
    broken.clear()
    advance("2 minutes")
    run_until_idle()
    assert run.result(0) == ["only one", None]


def test_a_paused_run_keeps_its_messages():
    run = collect.start(1)
    run_until_idle()
    assert run.pause()
    durable.send(run, "m")
    assert run_until_idle() == 0
    assert run.resume()
    run_until_idle()
    assert run.result(0) == ["m"]


def test_a_cancelled_run_keeps_its_messages_for_resume():
    run = collect.start(2)
    durable.send(run, 1)
    run_until_idle()
    assert run.cancel()
    durable.send(run, 2)
    assert run_until_idle() == 0
    assert run.resume()
    run_until_idle()
    assert run.result(0) == [1, 2]


def test_a_fork_repeats_what_was_received_and_takes_no_message_away():
    run = collect.start(2)
    durable.send(run, 1)
    run_until_idle()
    fork = run.fork(from_step=2)
    run_until_idle()
    assert (run.status, fork.status) == ("WAITING", "WAITING")
    durable.send(run, "for the run")
    durable.send(fork, "for the fork")
    run_until_idle()
    assert (run.result(0), fork.result(0)) == ([1, "for the run"], [1, "for the fork"])


# -- Timeouts -------------------------------------------------------------------------------------------------------


def test_after_the_timeout_the_default_is_recorded_and_stays():
    run = collect.start(2, timeout=60)
    run_until_idle()
    assert run.model.wake_at is not None
    advance("61 seconds")
    run_until_idle()
    # The second wait of the run; the first has its answer.
    assert run.status == "WAITING"
    durable.send(run, "late for the first")
    run_until_idle()
    assert run.result(0) == ["nothing came", "late for the first"]


def test_the_timeout_counts_from_the_first_wait_and_not_from_the_last_restart():
    run = collect.start(1, timeout=3600)
    run_until_idle()
    ends = run.model.wake_at
    for _ in range(3):
        advance("10 minutes")
        run.pause()
        run.resume()
        run_until_idle()
        assert (run.status, run.model.wake_at) == ("WAITING", ends)
    advance("31 minutes")
    run_until_idle()
    assert run.result(0) == ["nothing came"]


@pytest.mark.parametrize("crash", [crash_before, crash_after])
def test_a_default_survives_a_crash(crash):
    run = collect.start(1, "t", 60)
    run_until_idle()
    advance("61 seconds")
    with crash("receive t"):
        run_until_idle()
    if crash is crash_after:
        durable.send(run, "too late: it has been told that there is none", "t")
    run_until_idle()
    assert run.result(0) == ["nothing came"]


def test_a_message_that_comes_with_the_timeout_is_taken():
    run = collect.start(1, timeout=60)
    run_until_idle()
    advance("2 minutes")
    durable.send(run, "just in time")
    run_until_idle()
    assert run.result(0) == ["just in time"]


@pytest.mark.parametrize("sent", [False, True])
def test_a_timeout_of_zero_looks_once(sent):
    run = collect.start(1, timeout=0)
    if sent:
        durable.send(run, "m")
    assert run_until_idle() == 1
    assert run.result(0) == ["m" if sent else "nothing came"]


def test_a_short_timeout_holds_the_thread_and_parks_nothing():
    run = collect.start(1, timeout=0.5)
    assert run_until_idle() == 1
    assert run.result(0) == ["nothing came"]


@pytest.mark.parametrize("timeout", [-1, "1", float("nan")])
def test_what_is_no_timeout_is_a_clear_error(timeout):
    run = collect.start(1, timeout=timeout)
    run_until_idle()
    with pytest.raises((TypeError, ValueError), match="timeout takes"):
        run.result(0)


# -- What a message may be ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "message",
    [None, "", "\0", "\ud800 half a character", {"b": 1, "a": [1.5, float("inf")]}, b"\0\xff", (1, 2), "x" * 100_000],
    ids=["none", "empty", "nul", "surrogate", "nested", "bytes", "tuple", "long"],
)
def test_a_message_comes_as_it_was_sent(message):
    run = collect.start(1)
    durable.send(run, message)
    run_until_idle()
    (received,) = run.result(0)
    assert (received, type(received)) == (message, type(message))


def test_what_cannot_be_stored_is_refused_at_the_sender():
    run = collect.start(1)
    with pytest.raises(durable.SerializationError, match=f"A message to run {run.id}"):
        durable.send(run, threading.Lock())
    assert Message.objects.count() == 0


def test_what_cannot_be_stored_is_refused_in_a_workflow_and_named():
    run = collect.start(1)

    @durable.workflow(name="tests.messages.unstorable")
    def unstorable():
        durable.send(run, threading.Lock())

    sender = unstorable.start()
    run_until_idle()
    with pytest.raises(durable.SerializationError, match="step 1"):
        sender.result(0)


@pytest.mark.parametrize("name", ["topic", "key"])
@pytest.mark.parametrize(
    ("value", "error"),
    [("", ValueError), ("x" * 201, ValueError), ("a\0", ValueError), ("\ud800", ValueError), (1, TypeError)],
    ids=["empty", "long", "nul", "surrogate", "number"],
)
def test_a_topic_and_a_key_are_short_readable_text(name, value, error):
    run = collect.start(1)
    with pytest.raises(error, match=f"{name} takes"):
        durable.send(run, "m", **{name: value})


def test_the_longest_topic_and_key_work():
    run = collect.start(1, "t" * 200)
    run_until_idle()
    durable.send(run, "m", "t" * 200, key="k" * 200)
    run_until_idle()
    assert run.result(0) == ["m"]


@pytest.mark.parametrize("run", [None, 1, object()], ids=["none", "number", "object"])
def test_what_is_no_run_is_a_type_error(run):
    with pytest.raises(TypeError, match=r"send\(\) takes a run's handle or its id"):
        durable.send(run, "m")


def test_receive_is_for_a_workflows_body():
    with pytest.raises(durable.NotInWorkflow, match="outside a workflow"):
        durable.receive()

    @durable.step(name="receives")
    def receives():
        durable.receive()

    @durable.workflow(name="tests.messages.in_a_step")
    def in_a_step():
        receives()

    with pytest.raises(durable.NotInWorkflow, match="inside a step"):
        in_a_step()


# -- What it costs --------------------------------------------------------------------------------------------------


def tables(queries):
    """Verb and table of each statement that is none of BEGIN and COMMIT."""
    names = {model._meta.db_table: model.__name__ for model in (Message, StepCheckpoint, WorkflowRun)}
    found = []
    for sql in statements(queries):
        model = next((names[table] for table in names if f'"{table}"' in sql), "")
        found.append(f"{sql.split()[0]} {model}")
    return found


@pytest.mark.django_db(transaction=True)
def test_a_receive_with_a_message_there_is_one_commit_of_four_statements():
    counts = []
    for count in (1, 11):
        run = collect.start(count)
        for number in range(count):
            durable.send(run, number)
        with CaptureQueriesContext(connection) as queries:
            run_until_idle()
        assert run.status == "SUCCEEDED"
        counts.append((len(tables(queries)), commits(queries)))
    (one, one_commits), (eleven, eleven_commits) = counts
    # Lock the run, look for the message, mark it as read, record it.
    assert (eleven - one, eleven_commits - one_commits) == (40, 10)


@pytest.mark.django_db(transaction=True)
def test_parking_is_one_commit():
    run = collect.start(1)
    with CaptureQueriesContext(connection) as queries:
        run_until_idle()
    assert run.status == "WAITING"
    # Beside the claim.
    assert commits(queries) == 1
    assert [each for each in tables(queries) if each.startswith("INSERT")] == ["INSERT StepCheckpoint"]


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("waits", [False, True])
def test_a_send_is_one_commit_of_two_statements_and_a_third_for_who_waits(waits):
    run = collect.start(1)
    if waits:
        run_until_idle()
    with CaptureQueriesContext(connection) as queries:
        durable.send(run, "m")
    assert commits(queries) == 1
    # The run is there and begins no wait meanwhile; the message; the run is due.
    wanted = ["SELECT WorkflowRun", "INSERT Message", *(["UPDATE WorkflowRun"] if waits else [])]
    assert [each for each in tables(queries) if each.split()[1:]] == wanted


# -- What goes wrong -------------------------------------------------------------------------------------------------


def test_the_database_itself_refuses_a_second_message_of_a_key():
    run = collect.start(1)
    durable.send(run, "m", key="k")
    with pytest.raises(IntegrityError), transaction.atomic():
        Message.objects.create(run_id=run.id, topic="", key="k", body="1", created_at=run.model.created_at)


def test_a_waiting_run_is_silent(caplog):
    run = collect.start(1)
    with caplog.at_level(logging.INFO, "django_durable"):
        run_until_idle()
    assert run.status == "WAITING"
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


# -- The page -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("own_registry")
def test_the_examples_of_the_page_do_what_they_say():
    run_examples("docs/how-to/messages-and-events.md")
