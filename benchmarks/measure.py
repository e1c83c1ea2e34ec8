"""Measures one database, in a process of its own: `run.py` starts it, and prints what it found."""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import random
import sqlite3
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import django

ROOT = Path(__file__).resolve().parent.parent

RUNS_TO_DRAIN = 2000
STARTS = 200
# Between two starts, in seconds: random, or the starts might keep step with the worker's polls.
GAP = (0.06, 0.14)
REPLAYS = 9
RECORDED = 1000
WARM_UP = 0.5  # seconds

Numbers = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--json", type=Path, required=True)
    given = parser.parse_args()
    django.setup()
    # The runs that are to fail here are no news.
    logging.getLogger("django_durable").addHandler(logging.NullHandler())

    from django.core.management import call_command

    call_command("migrate", run_syncdb=True, verbosity=0)
    numbers = {"facts": facts(), **measure(given.seconds)}
    given.json.write_text(json.dumps(numbers))


def measure(seconds: float) -> Numbers:
    from benchmarks import floor, workflows

    floor.create_tables()
    workflows.outside_steps(0)  # the process's lease, once
    outside = floor.record(lambda: workflows.outside_steps(1))
    atomic = floor.record(lambda: workflows.atomic_steps(1))
    start = floor.record(lambda: workflows.one_step.start(1))
    steps = workflows.STEPS
    say("nothing yet, warming up")
    settle()
    beside_floor(workflows.outside_steps, outside, steps, 1, WARM_UP)
    compared = []
    for what, call, statements, count, threads in (
        ("direct run, 5 steps", workflows.outside_steps, outside, steps, 1),
        ("direct run, 5 steps, 8 threads", workflows.outside_steps, outside, steps, 8),
        ("direct run, 5 atomic steps", workflows.atomic_steps, atomic, steps, 1),
        ("direct run, 5 atomic steps, 8 threads", workflows.atomic_steps, atomic, steps, 8),
        ("start()", workflows.one_step.start, start, 0, 1),
    ):
        say(what)
        compared.append({"what": what, **beside_floor(call, statements, count, threads, seconds)})
    say("replay")
    replayed = replay()
    say("a worker's throughput")
    drained = drain()
    say("latency of an idle worker")
    return {"compared": compared, "replay": replayed, "drain": drained, "latency": latency()}


def settle() -> None:
    """Let a server that was just made write out its files: until then its commits wait for them, too."""
    from django.db import connection

    if connection.vendor == "postgresql":
        with connection.cursor() as cursor:
            cursor.execute("CHECKPOINT")


def say(what: str) -> None:
    print(f"  measuring: {what} ...", file=sys.stderr, flush=True)


# -- Beside the floor -------------------------------------------------------------------------------------------


def beside_floor(call: Any, statements: list[Any], steps: int, threads: int, seconds: float) -> Numbers:
    from benchmarks import floor
    from benchmarks.rounds import compare, share

    @contextmanager
    def ours() -> Iterator[Any]:
        yield lambda: call(1)

    rates = compare(
        {
            "ours": ours,
            "same": lambda: floor.same_statements(statements),
            "plain": lambda: floor.plain_rows(statements),
        },
        threads=threads,
        seconds=seconds,
    )
    speed = {name: statistics.median(found) for name, found in rates.items()}
    return {
        "threads": threads,
        "ms": 1000 / speed["ours"],
        "steps_per_second": speed["ours"] * steps,
        "floor_ms": 1000 / speed["same"],
        "of_floor": share(rates["ours"], rates["same"]),
        "plain_ms": 1000 / speed["plain"],
        "of_plain": share(rates["ours"], rates["plain"]),
        "commits": sum(statement.commits or not in_transaction for statement, in_transaction in within(statements)),
    }


def within(statements: list[Any]) -> Iterator[tuple[Any, bool]]:
    """Each statement, and whether it stands in a transaction."""
    inside = False
    for statement in statements:
        inside |= statement.begins
        yield statement, inside
        inside &= not statement.commits


# -- Replay -----------------------------------------------------------------------------------------------------


def replay() -> Numbers:
    """A run of 1,000 recorded steps, executed again: what each costs in memory, and with the SELECT of them all."""
    from benchmarks import workflows
    from django_durable import get_run
    from django_durable.engine import claims
    from django_durable.engine.heartbeat import inline_lease
    from django_durable.engine.replay import execute

    handle = workflows.thousand_steps.using(run_id="thousand")
    try:
        handle()
    except workflows.NotYet:
        run = get_run("thousand")
    workflows.body_seconds.clear()
    lease, whole = inline_lease("default"), []
    for _ in range(REPLAYS):
        run.resume()
        began = time.perf_counter()
        (claim,) = claims.claim(lease, 1, run_id=run.id)
        claimed = time.perf_counter() - began
        execute(claim, lease)
        whole.append(claimed + workflows.body_seconds[-1])
    per_step = 1e6 / RECORDED
    return {
        "recorded": RECORDED,
        "us": statistics.median(workflows.body_seconds) * per_step,
        "us_with_select": statistics.median(whole) * per_step,
    }


# -- A worker process -------------------------------------------------------------------------------------------


def drain() -> Numbers:
    """Many runs of one step wait; one worker process executes them all. The clock is the database's."""
    from django.db.models import Max, Min
    from django.db.transaction import atomic

    from benchmarks import workflows
    from django_durable.models import WorkflowRun

    # Those that the measurement of start() left go too.
    runs = WorkflowRun.objects.filter(workflow=workflows.one_step.name)
    runs.delete()
    with atomic():
        for number in range(RUNS_TO_DRAIN):
            workflows.one_step.start(number)
    with worker("--burst") as process:
        process.wait(timeout=300)
    done = runs.filter(status="SUCCEEDED")
    count = done.count()
    if count != RUNS_TO_DRAIN:
        raise RuntimeError(f"the worker finished {count} of {RUNS_TO_DRAIN} runs")
    times = done.aggregate(first=Min("started_at"), last=Max("finished_at"))
    seconds = (times["last"] - times["first"]).total_seconds()
    return {"runs": count, "seconds": seconds, "runs_per_second": count / seconds}


def latency() -> Numbers:
    """From the call of start() to the first line of the first step, in an idle worker with default settings."""
    from benchmarks import workflows

    with worker():
        warm = [workflows.one_step.start(number) for number in range(10)]
        for handle in warm:
            handle.result(timeout=30)
        started = []
        for number in range(STARTS):
            time.sleep(random.uniform(*GAP))
            began = time.monotonic()
            started.append((began, workflows.one_step.start(number)))
        waits = sorted((handle.result(timeout=30) - began) * 1000 for began, handle in started)
    cuts = statistics.quantiles(waits, n=100, method="inclusive")
    return {"starts": STARTS, "p50_ms": cuts[49], "p95_ms": cuts[94], "p99_ms": cuts[98], "max_ms": waits[-1]}


@contextmanager
def worker(*arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """A `durable_worker` with default settings, stopped in order at the end."""
    command = [sys.executable, "-m", "django", "durable_worker", *arguments]
    with TemporaryFile("w+") as said:
        process = subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=said)
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait(timeout=60)
            said.seek(0)
            for line in said:
                # One line a run is its usual log; what it complains of explains the numbers.
                if " INFO " not in line:
                    print(f"  worker: {line}", end="", file=sys.stderr)


# -- The machine ------------------------------------------------------------------------------------------------


def facts() -> Numbers:
    """What the numbers depend on."""
    from django.db import connection

    found: Numbers = {
        "cpus": os.cpu_count(),
        "load": os.getloadavg()[0],
        "machine": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "django": django.get_version(),
    }
    with connection.cursor() as cursor:
        if connection.vendor == "sqlite":
            found["database"] = f"SQLite {sqlite3.sqlite_version}"
            for name in ("journal_mode", "synchronous"):
                cursor.execute(f"PRAGMA {name}")
                found[name] = str(cursor.fetchone()[0])
            levels = {"0": "off", "1": "normal", "2": "full", "3": "extra"}
            found["synchronous"] = levels.get(found["synchronous"], found["synchronous"])
        else:
            import psycopg

            found["psycopg"] = psycopg.__version__
            for name in ("server_version", "fsync", "synchronous_commit"):
                cursor.execute(f"SHOW {name}")
                found[name] = cursor.fetchone()[0]
            found["database"] = f"PostgreSQL {found.pop('server_version')}"
    return found


if __name__ == "__main__":
    main()
