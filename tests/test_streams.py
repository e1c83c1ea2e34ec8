"""Streams: what a run writes while it runs is read in order, once, by whoever follows it."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from datetime import timedelta
from pathlib import Path

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.db import connections, transaction
from django.db.models import F
from django.test.utils import CaptureQueriesContext

import django_durable as durable
from django_durable.engine import streams
from django_durable.exceptions import InsideTransaction, NotInWorkflow, RunNotFound
from django_durable.models import StepCheckpoint, StreamItem, WorkflowRun
from django_durable.testing import crash_after, crash_before, run_until_idle
from tests.app.models import Ledger
from tests.threads import elsewhere, together

# A worker that knows the workflows of this file.
WORKER = """
import django.core.management
django.setup()
import tests.test_streams
django.core.management.call_command("durable_worker", "--burst")
"""
ROOT = Path(__file__).resolve().parent.parent


@durable.step(name="write_together")
def write_together(key: str, *values: object) -> None:
    """An atomic step: its rows and what it streams are one commit."""
    for value in values:
        Ledger.objects.create(key=f"{key[:9]}: {value}")
        durable.stream(key).write(value)


@durable.step(name="write_at_once", atomic=False)
def write_at_once(key: str, *values: object) -> None:
    for value in values:
        durable.stream(key).write(value)


@durable.workflow(name="tests.streams.report")
def report(key: str = "progress") -> str:
    stream = durable.stream(key)
    stream.write("begun")
    write_together(key, 1, 2)
    write_at_once(key, 3)
    stream.write({"done": (4, timedelta(seconds=5))})
    stream.close()
    return "ended"


EVERYTHING = ["begun", 1, 2, 3, {"done": (4, timedelta(seconds=5))}]


def positions(run_id: str, key: str = "progress") -> list[int]:
    items = StreamItem.objects.filter(run=run_id, key=key).order_by("position")
    return list(items.values_list("position", flat=True))


# -- Writing ----------------------------------------------------------------------------------------------------


@pytest.mark.django_db
def test_the_reader_sees_what_was_written_in_the_order_of_writing():
    run = report.start()
    run_until_idle()
    reader = run.stream("progress")
    assert list(reader) == EVERYTHING
    assert (reader.position, reader.over) == (5, True)
    assert positions(run.id) == [1, 2, 3, 4, 5, 6]


@pytest.mark.django_db
def test_each_write_of_a_body_is_a_step_of_its_own_and_a_steps_writes_are_not():
    run = report.start()
    run_until_idle()
    steps = list(run.model.steps.values_list("position", "name", "kind"))
    assert steps == [
        (1, "stream progress", "stream"),
        (2, "write_together", "atomic"),
        (3, "write_at_once", "step"),
        (4, "stream progress", "stream"),
        (5, "close stream progress", "stream"),
    ]
    writers = StreamItem.objects.filter(run=run.id).order_by("position").values_list("step", flat=True)
    assert list(writers) == [1, 2, 2, 3, 4, 5]


@pytest.mark.django_db
def test_two_streams_of_a_run_and_the_same_stream_of_two_runs_do_not_mix():
    first, second = report.start("a"), report.start("a")
    other = report.start("b")
    run_until_idle()
    assert list(first.stream("a")) == list(second.stream("a")) == list(other.stream("b")) == EVERYTHING
    assert list(first.stream("b")) == []


@pytest.mark.django_db
@pytest.mark.parametrize("step", ["stream progress", "write_together", "write_at_once", "close stream progress"])
@pytest.mark.parametrize("crash", [crash_before, crash_after])
def test_a_crash_beside_any_commit_neither_repeats_nor_loses_a_value(crash, step):
    run = report.start()
    with crash(step):
        run_until_idle()
    run_until_idle()
    assert run.model.recoveries == 1
    assert list(run.stream("progress")) == EVERYTHING
    assert positions(run.id) == [1, 2, 3, 4, 5, 6]


@pytest.mark.django_db
def test_an_atomic_steps_writes_go_with_its_transaction():
    @durable.step(name="fails_once", max_attempts=2, retry_delay=0)
    def fails_once() -> None:
        tries.append(1)
        durable.stream("progress").write(f"try {len(tries)}")
        if len(tries) == 1:
            raise OSError("the first try")

    @durable.workflow(name="tests.streams.rolls_back")
    def rolls_back() -> None:
        fails_once()

    tries: list[int] = []
    run = rolls_back.start()
    run_until_idle()
    assert list(run.stream("progress")) == ["try 2"]
    assert positions(run.id) == [1]


@pytest.mark.django_db
def test_a_step_of_the_outside_world_that_is_tried_again_writes_again():
    @durable.step(name="fails_once", atomic=False, max_attempts=2, retry_delay=0)
    def fails_once() -> None:
        tries.append(1)
        durable.stream("progress").write(f"try {len(tries)}")
        durable.stream("progress").close()
        if len(tries) == 1:
            raise OSError("the first try")

    @durable.workflow(name="tests.streams.writes_again")
    def writes_again() -> None:
        fails_once()

    tries: list[int] = []
    run = writes_again.start()
    run_until_idle()
    assert run.status == "SUCCEEDED"
    # The first try had closed the stream. That is no reason for the second to fail.
    assert list(run.stream("progress")) == ["try 1", "try 2"]
    assert positions(run.id) == [1, 2, 3]


@pytest.mark.django_db(transaction=True)
def test_what_one_write_costs():
    """The last position, the value, and a fence: the checkpoint's own, or one look at the run's row."""
    costs: list[list[str]] = []

    def write() -> None:
        with CaptureQueriesContext(connections["default"]) as captured:
            durable.stream("progress").write(1)
        costs.append([query["sql"].split()[0] for query in captured])

    @durable.workflow(name="tests.streams.costs")
    def wide() -> None:
        write()
        durable.run_step("outside", write)
        durable.run_step("atomic", write, atomic=True)

    wide.start()
    run_until_idle()
    assert costs == [
        ["BEGIN", "SELECT", "INSERT", "INSERT", "COMMIT"],
        ["BEGIN", "SELECT", "INSERT", "SELECT", "COMMIT"],
        ["SELECT", "INSERT"],
    ]


@pytest.mark.django_db
def test_a_replay_writes_nothing_again():
    run = report.start()
    with crash_before("write_at_once"):
        run_until_idle()
    with crash_after("close stream progress"):
        run_until_idle()
    run_until_idle()
    assert run.model.recoveries == 2
    assert list(run.stream("progress")) == EVERYTHING


@pytest.mark.django_db
@pytest.mark.parametrize("place", ["body", "atomic step", "step", "same step"])
def test_a_closed_stream_takes_no_more_and_says_so(place):
    def write_on() -> None:
        durable.stream("progress").write("too late")

    def close_and_write_on() -> None:
        durable.stream("progress").close()
        write_on()

    @durable.workflow(name="tests.streams.closes_early")
    def closes_early() -> None:
        durable.stream("progress").write("in time")
        if place == "same step":
            durable.run_step("closes", close_and_write_on)
        durable.stream("progress").close()
        {"body": write_on}.get(place, lambda: durable.run_step("late", write_on, atomic=place == "atomic step"))()

    run = closes_early.start()
    run_until_idle()
    with pytest.raises(ValueError, match=rf"Stream 'progress' of run {run.id} is closed"):
        run.result(timeout=0)
    assert list(run.stream("progress")) == ["in time"]
    # And the same on a replay.
    run.resume()
    run_until_idle()
    with pytest.raises(ValueError, match="is closed"):
        run.result(timeout=0)


@pytest.mark.django_db
def test_a_workflow_may_catch_that_its_stream_is_closed():
    @durable.workflow(name="tests.streams.catches")
    def catches() -> str:
        durable.stream("progress").close()
        try:
            durable.stream("progress").write(1)
        except ValueError as error:
            caught = str(error)
        durable.stream("another").write(1)
        return caught

    run = catches.start()
    with crash_after("stream another"):
        run_until_idle()
    run_until_idle()
    assert "is closed" in run.result(timeout=0)
    assert list(run.stream("another")) == [1]


@durable.step(name="speak", atomic=False)
async def speak(*words: str) -> int:
    stream = durable.stream("progress")
    for word in words:
        await stream.awrite(word)
    return len(words)


@pytest.mark.django_db(transaction=True)
def test_an_async_agent_streams_its_words():
    @durable.workflow(name="tests.streams.agent")
    async def agent() -> int:
        stream = durable.stream("progress")
        await stream.awrite("begun")
        counts = await asyncio.gather(speak.acall("a", "b"), speak.acall("c"), stream.awrite("beside"))
        await stream.aclose()
        try:
            await stream.awrite("too late")
        except ValueError:
            return sum(filter(None, counts))
        return 0

    run = agent.start()
    with crash_before("close stream progress"):
        run_until_idle()
    run_until_idle()
    assert run.result(timeout=0) == 3
    first, *rest = run.stream("progress")
    assert first == "begun"
    assert sorted(rest) == ["a", "b", "beside", "c"]
    assert rest.index("a") < rest.index("b")
    assert positions(run.id) == [1, 2, 3, 4, 5, 6]
    assert set(run.model.steps.values_list("position", "name")) == {
        (1, "stream progress"),
        (2, "speak"),
        (3, "speak"),
        (4, "stream progress"),
        (5, "close stream progress"),
        (6, "stream progress"),
    }


def test_a_stream_is_written_to_by_a_run_alone():
    stream = durable.stream("progress")
    for act in (stream.close, lambda: stream.write(1), async_to_sync(stream.aclose)):
        with pytest.raises(NotInWorkflow):
            act()


@pytest.mark.parametrize(
    ("key", "error"), [("", ValueError), ("x" * 201, ValueError), ("a\0", ValueError), (3, TypeError)]
)
def test_a_key_that_cannot_be_stored_is_refused_at_once(key, error):
    with pytest.raises(error, match="key takes"):
        durable.stream(key)
    with pytest.raises(error, match="key takes"):
        durable.RunHandle("some run", "default").stream(key)


@pytest.mark.django_db
def test_the_longest_key_is_stored():
    run = report.start("k" * 200)
    run_until_idle()
    assert list(run.stream("k" * 200)) == EVERYTHING


@pytest.mark.django_db
def test_a_value_that_cannot_be_stored_names_the_place():
    @durable.workflow(name="tests.streams.unstorable")
    def unstorable(in_step: bool) -> None:
        if in_step:
            durable.run_step("writes", durable.stream("progress").write, object())
        durable.stream("progress").write(object())

    for in_step in (True, False):
        run = unstorable.start(in_step)
        run_until_idle()
        with pytest.raises(
            durable.SerializationError, match=rf"Run {run.id}, step 1 \({'writes' if in_step else 'stream progress'}\)"
        ):
            run.result(timeout=0)
    assert not StreamItem.objects.exists()


# -- Several writers --------------------------------------------------------------------------------------------


@pytest.fixture
def open_run() -> WorkflowRun:
    """A run that somebody executes, for writers in threads of their own."""
    run = report.start()
    WorkflowRun.objects.filter(pk=run.id).update(status="RUNNING", attempt=1)
    return run.model


def in_a_transaction(run: WorkflowRun, *values: str) -> None:
    """What an atomic step does: several values, and its checkpoint."""
    with transaction.atomic():
        for value in values:
            assert streams.append("default", run.pk, "progress", value, 1)


@pytest.mark.django_db(transaction=True)
def test_writers_at_the_same_time_leave_no_gap_and_lose_nothing(open_run):
    """Twelve threads as parallel steps are; some write several values in a transaction, and every third rolls back."""

    def writer(number: int):
        def write() -> None:
            for turn in range(10):
                names = [f"{number}.{turn}.{part}" for part in range(1 + number % 3)]
                try:
                    with transaction.atomic():
                        for name in names:
                            assert streams.append("default", open_run.pk, "progress", f'"{name}"', number)
                        if number % 3 == 2:
                            raise OSError("the step fails")
                except OSError:
                    continue

        return write

    assert together(*map(writer, range(12))) == [None] * 12
    values = list(durable.get_run(open_run.pk).stream("progress", timeout=0))
    wanted = {
        f"{number}.{turn}.{part}"
        for number in range(12)
        if number % 3 != 2
        for turn in range(10)
        for part in range(1 + number % 3)
    }
    assert sorted(values) == sorted(wanted)
    assert positions(open_run.pk) == list(range(1, len(wanted) + 1))
    for number in range(12):
        own = [value for value in values if value.startswith(f"{number}.")]
        assert own == sorted(own), "one writer's values are in its own order"


@pytest.mark.django_db(transaction=True)
def test_a_reader_beside_the_writers_misses_nothing(open_run):
    """A position is seen only behind all before it, or a reader that goes on from the last would skip some."""
    handle = durable.get_run(open_run.pk)

    def write(number: int):
        return lambda: [in_a_transaction(open_run, f'"{number}.{turn}"') for turn in range(25)] and None

    def read() -> list[str]:
        reader = handle.stream("progress", timeout=20)
        return [next(reader) for _ in range(100)]

    *_, first, second = together(*map(write, range(4)), read, read)
    assert first == second
    assert len(set(first)) == 100


@pytest.mark.django_db(transaction=True)
def test_a_step_that_sees_an_older_state_is_run_again_and_does_not_fail():
    """In "repeatable read" another's value is not to be seen, and its position is taken."""
    other_may_commit = connections["default"].features.has_select_for_update
    others: list[threading.Thread] = []

    def other() -> None:
        try:
            in_a_transaction(run.model, '"other"')
        finally:
            connections.close_all()

    @durable.step(name="looks_first", isolation="repeatable read")
    def looks_first() -> None:
        tries.append(StreamItem.objects.count())
        if not others:
            others.append(threading.Thread(target=other, daemon=True))
            others[0].start()
            if other_may_commit:
                others[0].join(timeout=20)
        durable.stream("progress").write("own")

    @durable.workflow(name="tests.streams.looks_first")
    def looks() -> None:
        looks_first()

    tries: list[int] = []
    run = looks.start()
    run_until_idle()
    others[0].join(timeout=20)
    assert run.status == "SUCCEEDED"
    assert sorted(run.stream("progress", timeout=0)) == ["other", "own"]
    assert positions(run.id) == [1, 2]
    assert tries == ([0, 1] if other_may_commit else [0])


@pytest.mark.django_db(transaction=True)
def test_an_executor_that_lost_its_run_mixes_nothing_into_the_stream_of_the_next():
    @durable.step(name="loses_the_run", atomic=False)
    def loses_the_run() -> None:
        tries.append(1)
        durable.stream("progress").write(f"execution {len(tries)}")
        if len(tries) == 1:
            elsewhere(lambda: WorkflowRun.objects.update(attempt=F("attempt") + 1))
            durable.stream("progress").write("of an executor that has no run any more")
            tries.append(1)

    @durable.workflow(name="tests.streams.loses")
    def loses() -> None:
        loses_the_run()

    tries: list[int] = []
    run = loses.start()
    run_until_idle()
    assert run.status == "SUCCEEDED"
    assert list(run.stream("progress")) == ["execution 1", "execution 2"]


@pytest.mark.django_db(transaction=True)
def test_a_step_of_the_outside_world_ends_its_story_after_a_cancel():
    """Its outcome is still recorded, so that resume() does not repeat it; then what it streams belongs there, too."""

    @durable.step(name="is_cancelled", atomic=False)
    def is_cancelled() -> None:
        durable.stream("progress").write("before")
        elsewhere(run.cancel)
        durable.stream("progress").write("after")

    @durable.workflow(name="tests.streams.is_cancelled")
    def cancelled() -> None:
        is_cancelled()
        durable.stream("progress").write("from the body")

    run = cancelled.start()
    run_until_idle()
    assert run.status == "CANCELLED"
    assert list(run.stream("progress")) == ["before", "after"]


@pytest.mark.django_db(transaction=True)
def test_parallel_steps_write_to_one_stream():
    """Each in its own thread and transaction; two of them to two streams, in opposite orders."""

    @durable.step(name="crosswise")
    def crosswise(number: int) -> None:
        keys = ["a", "b"] if number % 2 else ["b", "a"]
        for key in keys:
            durable.stream(key).write(number)

    @durable.workflow(name="tests.streams.parallel")
    def parallel() -> None:
        crosswise.map(range(8), max_parallel=4)

    run = parallel.start()
    run_until_idle()
    assert run.status == "SUCCEEDED", run.model.error
    for key in ("a", "b"):
        assert sorted(run.stream(key)) == list(range(8))
        assert positions(run.id, key) == list(range(1, 9))


# -- Reading ----------------------------------------------------------------------------------------------------


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("end", ["close", "succeed", "cancel"])
def test_a_reader_waits_for_more_and_ends_with_the_stream_or_the_run(open_run, end):
    handle = durable.get_run(open_run.pk)
    seen = threading.Semaphore(0)

    def read() -> list[object]:
        values = []
        for value in handle.stream("progress"):
            values.append(value)
            seen.release()
        return values

    def write(text: str) -> None:
        in_a_transaction(open_run, text)
        assert seen.acquire(timeout=20), "the reader did not see it"

    ends = {
        "close": lambda: in_a_transaction(open_run, ""),
        "succeed": lambda: WorkflowRun.objects.held(open_run.pk, 1).move("SUCCEEDED"),
        "cancel": handle.cancel,
    }
    values, _ = together(read, lambda: (write("1"), write("2"), write("null"), ends[end]()))
    assert values == [1, 2, None]


@pytest.mark.django_db(transaction=True)
def test_what_was_written_just_before_the_end_is_read(open_run):
    in_a_transaction(open_run, "1")
    reader = durable.get_run(open_run.pk).stream("progress")
    assert next(reader) == 1
    in_a_transaction(open_run, "2")
    WorkflowRun.objects.held(open_run.pk, 1).move("SUCCEEDED")
    assert list(reader) == [2]


@pytest.mark.django_db(transaction=True)
def test_async_code_follows_a_stream_without_blocking_its_loop(open_run):
    handle = durable.get_run(open_run.pk)

    async def follow() -> tuple[list[object], int]:
        turns = 0

        async def turn() -> None:
            nonlocal turns
            while True:
                await asyncio.sleep(0)
                turns += 1

        async def write() -> None:
            for text in ("1", "2", ""):
                before = turns
                while turns < before + 3:
                    await asyncio.sleep(0.001)
                await sync_to_async(in_a_transaction)(open_run, text)

        turning, writing = asyncio.create_task(turn()), asyncio.create_task(write())
        values = [value async for value in handle.stream("progress")]
        turning.cancel()
        await writing
        await sync_to_async(connections.close_all)()
        return values, turns

    values, turns = elsewhere(lambda: asyncio.run(follow()))
    assert values == [1, 2]
    assert turns > 6


@pytest.mark.django_db
def test_a_reader_goes_on_behind_the_position_that_an_earlier_one_came_to():
    run = report.start()
    run_until_idle()
    first = run.stream("progress")
    assert [next(first), next(first)] == EVERYTHING[:2]
    second = run.stream("progress", after=first.position)
    assert list(second) == EVERYTHING[2:]
    assert list(run.stream("progress", after=99)) == []
    for wrong, error in ((-1, ValueError), ("3", TypeError), (True, TypeError)):
        with pytest.raises(error, match="after takes"):
            run.stream("progress", after=wrong)


@pytest.mark.django_db
def test_more_values_than_one_look_reads():
    @durable.workflow(name="tests.streams.many")
    def many(count: int) -> None:
        write_together("progress", *range(count))

    count = 2 * streams.BATCH + 1
    run = many.start(count)
    run_until_idle()
    assert list(run.stream("progress")) == list(range(count))


@pytest.mark.django_db
def test_with_a_timeout_of_zero_a_reader_takes_what_is_there():
    run = report.start()
    reader = run.stream("progress", timeout=0)
    assert list(reader) == []
    assert not reader.over
    with crash_before("write_at_once"):
        run_until_idle()
    assert list(reader) == ["begun", 1, 2]
    assert not reader.over
    run_until_idle()
    assert list(reader) == EVERYTHING[3:]
    assert reader.over


@pytest.mark.django_db
def test_in_a_transaction_a_reader_does_not_wait_for_ever_for_a_run_that_nobody_else_sees():
    run = report.start()
    with pytest.raises(InsideTransaction, match=rf"nothing more yet in stream 'progress' of run {run.id}"):
        next(run.stream("progress"))
    with crash_before("write_at_once"):
        run_until_idle()
    reader, read = run.stream("progress"), []
    with pytest.raises(InsideTransaction):
        read.extend(iter(lambda: next(reader), object()))
    run_until_idle()
    # What it had read is read, and it goes on from there.
    assert reader.position == 3
    assert list(reader) == EVERYTHING[3:]


@pytest.mark.django_db
def test_a_run_that_is_gone_has_no_stream():
    with pytest.raises(RunNotFound):
        next(durable.RunHandle("no such run", "default").stream("progress"))


@pytest.mark.django_db
def test_a_workflows_body_is_told_not_to_read_what_a_replay_would_find_longer():
    @durable.workflow(name="tests.streams.reads")
    def reads(other: durable.RunHandle, in_step: bool) -> list[object]:
        if in_step:
            return durable.run_step("reads", lambda: list(other.stream("progress")))
        return list(other.stream("progress"))

    other = report.start()
    run_until_idle()
    in_body, in_step = reads.start(other, False), reads.start(other, True)
    run_until_idle()
    with pytest.raises(durable.DurableError, match="in its body: what it finds is not recorded"):
        in_body.result(timeout=0)
    assert in_step.result(timeout=0) == EVERYTHING


@pytest.mark.django_db
def test_a_reader_goes_on_in_the_run_that_goes_on_for_this_one():
    first, last = report.start(), report.start()
    run_until_idle()
    # The first run of the line ended open, as one that continues does.
    StreamItem.objects.filter(run=first.id, value="").delete()
    WorkflowRun.objects.filter(pk=first.id).update(continued_as=last.id)
    reader = first.stream("progress")
    assert list(reader) == EVERYTHING * 2
    assert reader.position == 10
    for after in range(11):
        assert list(first.stream("progress", after=after)) == (EVERYTHING * 2)[after:]


@pytest.mark.django_db
def test_a_loop_without_end_is_one_stream_for_its_reader():
    @durable.workflow(name="tests.streams.loops")
    def loops(turn: int) -> None:
        durable.stream("progress").write(turn)
        if turn < 4:
            durable.continue_as_new(turn + 1)
        durable.stream("progress").close()

    run = loops.start(1)
    run_until_idle()
    assert list(run.stream("progress")) == [1, 2, 3, 4]
    assert list(run.stream("progress", after=2)) == [3, 4]
    assert streams.latest_values("default", run.id, "progress", 9) == ([(4, "4")], True)
    # What was pruned from the middle is missing, and no more.
    third = durable.get_run(f"{run.id}~3")
    assert list(third.stream("progress")) == [3, 4]
    WorkflowRun.objects.filter(pk=f"{run.id}~2").delete()
    assert list(run.stream("progress")) == [1, 3, 4]


@pytest.mark.django_db
def test_a_fork_has_the_values_of_the_steps_that_it_keeps_and_leaves_the_original_alone():
    run = report.start()
    run_until_idle()
    fork = run.fork(from_step=3)
    assert list(fork.stream("progress", timeout=0)) == ["begun", 1, 2]
    run_until_idle()
    assert list(fork.stream("progress")) == list(run.stream("progress")) == EVERYTHING
    assert positions(fork.id) == positions(run.id)


@pytest.mark.django_db(transaction=True)
def test_another_process_streams_and_this_one_reads_while_it_runs(process_env):
    run = report.using(run_id="in another process").start()
    worker = subprocess.Popen([sys.executable, "-c", WORKER], cwd=ROOT, env=process_env)
    try:
        assert list(run.stream("progress", timeout=60)) == EVERYTHING
        assert run.result(timeout=60) == "ended"
        assert worker.wait(timeout=60) == 0
    finally:
        worker.kill()
        worker.wait()
    assert StepCheckpoint.objects.filter(run=run.id).count() == 5
