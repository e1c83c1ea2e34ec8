"""What a process costs the database after a thousand runs."""

from __future__ import annotations

from django.db import connection

from tests.scenarios.harness import Stage, connections_of
from tests.scenarios.workflows import probe


def test_a_worker_has_as_many_connections_after_a_thousand_runs_as_after_a_hundred(stage: Stage) -> None:
    worker = stage.worker("--concurrency=4")
    seen = []
    for hundred in range(10):
        runs = [probe.using(run_id=f"probe-{hundred}-{number}").start() for number in range(100)]
        stage.ended(*[run.id for run in runs])
        seen.append(connections_of(worker))
    # Four threads, the loop and the heartbeat; on PostgreSQL, the listener too. The heartbeat's comes with its first.
    assert 5 <= min(seen) <= max(seen) <= 6 + (connection.vendor == "postgresql"), seen


def test_a_process_with_threads_has_as_many_after_a_thousand_direct_calls(stage: Stage) -> None:
    web = stage.act("call_from_threads", 4, 250, "gate")
    seen = []

    def called() -> bool:
        assert web.code is None, web.said()
        seen.append(connections_of(web))
        return bool(stage.log("called"))

    stage.until(called, "a thousand direct calls are made", patience=60)
    assert stage.log("called")[0]["runs"] == 1000
    # Four threads and the main one; and, for a moment at each beat, the heartbeat.
    assert max(seen) <= 4 + 1 + 1, seen
    assert connections_of(web) >= 1
    stage.open("gate")
    assert web.wait() == 0, web.said()
