"""Measures what waiting costs, on one database, in a process of its own: `run.py waiting` starts it.

It also is the worker whose statements are counted: `python -m benchmarks.waiting --watched FILE`.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import django

from benchmarks.measure import GAP, ROOT, facts, say, settle, worker

PARTS = ("parked", "woken", "loop", "families")

SIZES = (0, 10_000, 100_000)
# Of these, so many are executed up to their wait; the rest are copies of their rows.
EXECUTED = 100_000
# Runs in one transaction of whoever starts or sends many.
TOGETHER = 1000

WARM_UP = 200
CLAIMS = 31
CLAIMED = 8
IDLE = 10.0  # seconds
WAKES = 100
# Over so many seconds the timers of one measurement come due.
SPREAD = 10.0
WOKEN = 10_000
LOOP = 2000
MARKS = (100, 500, 1000, 2000)
# At each mark, the median over so many waits.
AROUND = 25
GENERATION = 100
FAMILIES = (1000, 10_000)

Numbers = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parked", type=int, nargs="+", default=SIZES)
    parser.add_argument("--executed", type=int, default=EXECUTED)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--watched", type=Path)
    given = parser.parse_args()
    django.setup()
    if given.watched:
        work_watched(given.watched)
        return
    logging.getLogger("django_durable").addHandler(logging.NullHandler())

    from django.core.management import call_command

    call_command("migrate", run_syncdb=True, verbosity=0)
    numbers: Numbers = {"facts": facts()}
    measures: dict[str, Callable[[], Any]] = {
        "parked": lambda: parked(sorted(given.parked), given.executed),
        "woken": woken,
        "loop": loop,
        "families": families,
    }
    for name in given.parts:
        clear()
        numbers[name] = measures[name]()
    given.json.write_text(json.dumps(numbers))


def clear() -> None:
    """Empty tables, as new ones: what the part before has left is not to be measured."""
    from django.core.management import call_command

    call_command("flush", interactive=False, verbosity=0)
    tidy()


def tidy() -> None:
    """What a server does by itself in time: statistics, and the files written out."""
    from django.db import connection

    with connection.cursor() as cursor:
        if connection.vendor == "postgresql":
            cursor.execute("VACUUM (ANALYZE)")
        else:
            cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    settle()


# -- Many parked runs -------------------------------------------------------------------------------------------


def parked(sizes: list[int], executed: int) -> list[Numbers]:
    """A worker's memory, its claim and its idle statements beside many parked runs, and how fast others wake."""
    found = []
    for kind in ("asleep", "for a message"):
        clear()
        before = 0
        for size in sizes:
            say(f"{size:,} runs parked, {kind}")
            row: Numbers = {"kind": kind, "parked": size, "executed": min(size, executed)}
            more = min(size, executed) - min(before, executed)
            if more > 0:
                row |= park(kind, more)
            copy_up_to(size)
            before = size
            tidy()
            with worker() as process:
                warm_up()
                row["memory_mb"] = resident(process.pid)
                if size in (sizes[0], sizes[-1]):
                    row |= wake_latency(kind)
            row |= idle()
            row |= claim_times()
            found.append(row)
    return found


def park(kind: str, count: int) -> Numbers:
    """Start so many runs, and let one worker process execute them up to their wait."""
    from benchmarks import workflows

    begin = (lambda: workflows.sleeper.start(30 * 86400.0)) if kind == "asleep" else workflows.told.start
    with worker() as process:
        warm_up()
        began = time.monotonic()
        for start in range(0, count, TOGETHER):
            in_batches(range(min(TOGETHER, count - start)), lambda _: begin())
            # Not all at once: this is no measurement of a long queue.
            until(lambda: pending() < TOGETHER)
        until(nothing_due, seconds=0.1)
        seconds = time.monotonic() - began
        return {"parked_per_second": count / seconds, "memory_of_who_parked_mb": resident(process.pid)}


def copy_up_to(size: int) -> None:
    """Copy the parked runs and their checkpoints until there are so many."""
    from django.db import connection
    from django.db.models import Model

    from django_durable.models import StepCheckpoint, WorkflowRun

    there = WorkflowRun.objects.waiting().count()
    times = size // there - 1 if there else 0
    if times < 1:
        return

    def columns(model: type[Model], key: str) -> tuple[str, str]:
        names = [connection.ops.quote_name(str(field.column)) for field in model._meta.concrete_fields]
        return ", ".join(names), ", ".join(f"{name} || '-' || number" if name == f'"{key}"' else name for name in names)

    runs, steps = WorkflowRun._meta.db_table, StepCheckpoint._meta.db_table
    numbers = "WITH RECURSIVE copies(number) AS (SELECT 1 UNION ALL SELECT number + 1 FROM copies WHERE number < %s)"
    waiting = f"SELECT id FROM {runs} WHERE status = 'WAITING'"
    with connection.cursor() as cursor:
        # The steps first: afterwards the copied runs are waiting too.
        into, values = columns(StepCheckpoint, "run_id")
        cursor.execute(
            f"{numbers} INSERT INTO {steps} ({into}) SELECT {values} FROM {steps}, copies WHERE run_id IN ({waiting})",
            [times],
        )
        into, values = columns(WorkflowRun, "id")
        cursor.execute(
            f"{numbers} INSERT INTO {runs} ({into}) SELECT {values} FROM {runs}, copies WHERE id IN ({waiting})",
            [times],
        )


def warm_up() -> None:
    """Let the worker use all its threads: each has a connection, and everything is imported."""
    from benchmarks import workflows

    in_batches(range(WARM_UP), workflows.one_step.start)
    until(nothing_due)
    # The last of them may have just committed.
    time.sleep(0.5)


def resident(pid: int) -> float:
    import psutil

    return float(psutil.Process(pid).memory_info().rss) / 2**20


def idle() -> Numbers:
    """The statements of a worker with nothing to do, and the time that it waits for their answers."""
    with TemporaryDirectory() as folder:
        seen = Path(folder) / "seen"
        command = [sys.executable, "-m", "benchmarks.waiting", f"--watched={seen}"]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            # Behind its start, and the first sweep.
            until(lambda: seen.exists() and len(seen.read_text().splitlines()) > 3)
            time.sleep(2)
            begun = time.monotonic()
            time.sleep(IDLE)
            ended = time.monotonic()
            process.terminate()
        lines = [json.loads(line) for line in seen.read_text().splitlines()]
    took = [seconds for at, seconds in lines if begun <= at < ended]
    return {"idle_statements_per_second": len(took) / IDLE, "idle_ms_per_second": 1000 * sum(took) / IDLE}


def work_watched(seen: Path) -> None:
    """A `durable_worker` that notes each of its statements: when, and how long."""
    from django.core.management import call_command
    from django.db.backends.signals import connection_created

    def note(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        began = time.monotonic()
        try:
            return execute(sql, params, many, context)
        finally:
            print(json.dumps([began, time.monotonic() - began]), file=lines, flush=True)

    def watch(connection: Any, **kwargs: object) -> None:
        if note not in connection.execute_wrappers:
            connection.execute_wrappers.append(note)

    with seen.open("w") as lines:
        connection_created.connect(watch, weak=False)
        call_command("durable_worker", verbosity=0)


def claim_times() -> Numbers:
    """A claim with nothing due, and one of eight due runs, each executed afterwards."""
    from benchmarks import workflows
    from django_durable.engine import claims
    from django_durable.engine.heartbeat import inline_lease
    from django_durable.engine.replay import execute

    lease = inline_lease("default")
    nothing, eight = [], []
    for _ in range(CLAIMS):
        nothing.append(timed(lambda: claims.claim(lease, CLAIMED)))
        in_batches(range(CLAIMED), workflows.one_step.start)
        eight.append(timed(lambda: claims.claim(lease, CLAIMED)))
        for claim in eight[-1][0]:
            execute(claim, lease)
    if any(len(claimed) != CLAIMED for claimed, _, _ in eight):
        raise RuntimeError("something else is due, or somebody else claims")
    return {
        "claim_ms": statistics.median(ms for _, ms, _ in eight),
        "claim_statements": statistics.median(count for _, _, count in eight),
        "empty_claim_ms": statistics.median(ms for _, ms, _ in nothing),
        "empty_claim_statements": statistics.median(count for _, _, count in nothing),
    }


def timed(work: Callable[[], Any]) -> tuple[Any, float, int]:
    """What the work returns, its milliseconds, and how many statements it sends."""
    from django.db import connection

    count = 0

    def note(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        nonlocal count
        count += not sql.startswith("BEGIN")
        return execute(sql, params, many, context)

    with connection.execute_wrapper(note):
        began = time.perf_counter()
        result = work()
        return result, 1000 * (time.perf_counter() - began), count


# -- Waking -----------------------------------------------------------------------------------------------------


def wake_latency(kind: str) -> Numbers:
    """From what wakes a run to the first line of its next step, in an idle worker with default settings."""
    waits = sorted(timer_waits() if kind == "asleep" else message_waits())
    cuts = statistics.quantiles(waits, n=100, method="inclusive")
    return {"wake_p50_ms": cuts[49], "wake_p95_ms": cuts[94], "wakes": len(waits)}


def timer_waits() -> Iterator[float]:
    """From the time at which the sleep ends, by the clock that this machine and its database share."""
    from benchmarks import workflows

    handles = [workflows.sleeper.start(2 + random.uniform(0, SPREAD)) for _ in range(WAKES)]
    for handle in handles:
        woken = handle.result(timeout=60)
        yield 1000 * (woken - handle.model.steps.get(position=1).finished_at.timestamp())


def message_waits() -> Iterator[float]:
    """From the call of send()."""
    from benchmarks import workflows

    handles = [workflows.told.start() for _ in range(WAKES)]
    until(nothing_due)
    sent = []
    for handle in handles:
        time.sleep(random.uniform(*GAP))
        sent.append(time.monotonic())
        handle.send("go on")
    for began, handle in zip(sent, handles, strict=True):
        yield 1000 * (handle.result(timeout=60) - began)


def woken() -> Numbers:
    """All wait for a message, each gets one, and one worker process ends them. The clock is the database's."""
    from django.db.models import Max, Min

    from benchmarks import workflows
    from django_durable.models import WorkflowRun

    say(f"{WOKEN:,} runs that get a message each")
    park("for a message", WOKEN)
    tidy()
    runs = WorkflowRun.objects.filter(workflow=workflows.told.name)
    ids = list(runs.values_list("pk", flat=True))
    began = time.monotonic()
    in_batches(ids, lambda run_id: send(run_id))
    sending = time.monotonic() - began
    with worker("--burst") as process:
        process.wait(timeout=600)
    done = runs.filter(status="SUCCEEDED").aggregate(first=Min("finished_at"), last=Max("finished_at"))
    count = runs.filter(status="SUCCEEDED").count()
    if count != WOKEN:
        raise RuntimeError(f"the worker finished {count} of {WOKEN} runs")
    seconds = (done["last"] - done["first"]).total_seconds()
    return {"runs": count, "runs_per_second": count / seconds, "sends_per_second": count / sending}


def send(run_id: str) -> None:
    import django_durable as durable

    durable.send(run_id, "go on")


# -- A loop of waits --------------------------------------------------------------------------------------------


def loop() -> list[Numbers]:
    """One run that takes a message after another, parked each time; and one that begins anew every hundred."""
    from benchmarks import workflows

    found = []
    for generation in (LOOP, GENERATION):
        say(f"a loop of {LOOP:,} waits, {generation:,} in each run")
        with worker():
            warm_up()
            handle = workflows.told_often.start(LOOP, generation)
            until(is_parked)
            took = []
            for number in range(LOOP):
                began = time.monotonic()
                handle.send(number)
                sent = time.monotonic()
                until(is_parked if number < LOOP - 1 else nothing_due, seconds=0.001)
                took.append((time.monotonic() - began, sent - began))
            handle.result(timeout=60)
        found.append(
            {
                "generation": generation,
                "seconds": sum(whole for whole, _ in took),
                "ms_at": {mark: median_before(mark, [whole for whole, _ in took]) for mark in MARKS},
                "send_ms_at": {mark: median_before(mark, [sending for _, sending in took]) for mark in MARKS},
            }
        )
        clear()
    return found


def median_before(mark: int, seconds: list[float]) -> float:
    return 1000 * statistics.median(seconds[mark - AROUND : mark])


def is_parked() -> bool:
    """Whether the one run of the loop waits again."""
    from django_durable.models import WorkflowRun

    return WorkflowRun.objects.waiting().filter(waiting_for="message:").exists()


# -- Children ---------------------------------------------------------------------------------------------------


def families() -> list[Numbers]:
    """One run starts so many children and waits for all of them; one worker process."""
    from django.db.models import Max, Min

    from benchmarks import workflows

    found = []
    for children in FAMILIES:
        say(f"a run with {children:,} children")
        with worker():
            warm_up()
            handle = workflows.parent.start(children)
            if handle.result(timeout=1800) != children:
                raise RuntimeError("not all children have ended")
        run = handle.model
        times = run.children.aggregate(first=Min("created_at"), started=Max("created_at"), ended=Max("finished_at"))
        found.append(
            {
                "children": children,
                "seconds": (run.finished_at - run.started_at).total_seconds(),
                "starting": (times["started"] - times["first"]).total_seconds(),
                "until_last_child": (times["ended"] - run.started_at).total_seconds(),
                "behind_last_child": (run.finished_at - times["ended"]).total_seconds(),
                "executions": run.attempt,
            }
        )
        clear()
    return found


# -- Helpers ----------------------------------------------------------------------------------------------------


def in_batches(items: Any, act: Callable[[Any], object]) -> None:
    from django.db.transaction import atomic

    items = list(items)
    for start in range(0, len(items), TOGETHER):
        with atomic():
            for item in items[start : start + TOGETHER]:
                act(item)


def pending() -> int:
    from django_durable.models import WorkflowRun

    return WorkflowRun.objects.pending().count()


def nothing_due() -> bool:
    from django_durable.models import WorkflowRun

    return not WorkflowRun.objects.filter(status__in=["PENDING", "RUNNING"]).exists()


def until(true: Callable[[], bool], seconds: float = 0.01, limit: float = 1800) -> None:
    """Ask again and again, with pauses of so many seconds."""
    end = time.monotonic() + limit
    while not true():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {limit:g} s: {true.__name__}")
        time.sleep(seconds)


# -- The table --------------------------------------------------------------------------------------------------


def table(found: Numbers) -> str:
    told = dict(found["facts"])
    lines = ["", f"{told.pop('database')}: {', '.join(f'{name} {value}' for name, value in told.items())}", ""]
    if "parked" in found:
        lines += [
            f"{'':24}{'worker':>10}{'who parked':>12}{'parked':>9}{'claim of 8':>18}{'claim of none':>18}"
            f"{'idle, each second':>22}{'wakes in':>18}",
            f"{'':24}{'MB':>10}{'MB':>12}{'per s':>9}{'ms, statements':>18}{'ms, statements':>18}"
            f"{'statements, ms':>22}{'p50, p95 ms':>18}",
        ]
        for row in found["parked"]:
            maker, rate = row.get("memory_of_who_parked_mb"), row.get("parked_per_second")
            wakes = f"{row['wake_p50_ms']:9.1f}{row['wake_p95_ms']:9.1f}" if "wake_p50_ms" in row else ""
            lines.append(
                f"{row['parked']:>9,} {row['kind']:14}{row['memory_mb']:10.1f}"
                f"{f'{maker:.1f}' if maker else '':>12}{f'{rate:,.0f}' if rate else '':>9}"
                f"{row['claim_ms']:11.2f}{row['claim_statements']:7.0f}"
                f"{row['empty_claim_ms']:11.2f}{row['empty_claim_statements']:7.0f}"
                f"{row['idle_statements_per_second']:13.1f}{row['idle_ms_per_second']:9.1f}{wakes}"
                f"{copies(row)}"
            )
        lines.append("")
    if "woken" in found:
        row = found["woken"]
        lines += [
            f"{row['runs']:,} waiting runs that got a message each: one worker process ends "
            f"{row['runs_per_second']:,.0f} runs/s (sent before, {row['sends_per_second']:,.0f} a second)",
            "",
        ]
    for row in found.get("loop", ()):
        at = ", ".join(
            f"{ms:.1f} ms at {mark} ({row['send_ms_at'][mark]:.1f} send)" for mark, ms in row["ms_at"].items()
        )
        lines.append(f"loop of {LOOP:,} waits, {row['generation']:,} in each run: {row['seconds']:.1f} s; {at}")
    lines += [""] if "loop" in found else []
    for row in found.get("families", ()):
        lines.append(
            f"parent of {row['children']:,}: {row['seconds']:.1f} s, starting them {row['starting']:.1f} s, until the "
            f"last child's end {row['until_last_child']:.1f} s, behind it {row['behind_last_child']:.2f} s, "
            f"{row['executions']} executions of the parent"
        )
    return "\n".join(lines)


def copies(row: Numbers) -> str:
    copied = row["parked"] - row["executed"]
    return f"   ({copied:,} are copies)" if copied else ""


if __name__ == "__main__":
    main()
