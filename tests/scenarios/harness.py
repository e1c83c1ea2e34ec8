"""The stage of a scenario: it starts processes, strikes them, waits for what they do, and leaves none behind."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from django.db import connection, transaction

from django_durable.models import Worker, WorkflowRun
from django_durable.states import FINISHED, UNFINISHED
from tests.scenarios import oracle

ROOT = Path(__file__).absolute().parents[2]

# So short that a frozen process is taken for dead while the test watches.
SHORT_LEASE = {"LEASE_SECONDS": 2, "HEARTBEAT_SECONDS": 0.3, "POLL_INTERVAL": 0.2}
# So long that it cannot run out here: what goes on, goes on without it.
LONG_LEASE = {"LEASE_SECONDS": 600, "HEARTBEAT_SECONDS": 1, "POLL_INTERVAL": 0.5}

PATIENCE = 40.0


class Zygote:
    """The process that forks the others; see tests/scenarios/zygote.py."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.scenarios.zygote"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # Ctrl-C is for pytest: at its end the zygote's input ends, and then it takes its children with it.
            start_new_session=True,
        )
        self.codes: dict[int, int] = {}
        self.forked: deque[int] = deque()
        self.unread = b""

    def fork(self, request: dict[str, Any]) -> int:
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        self.process.stdin.flush()
        deadline = time.monotonic() + PATIENCE
        while not self.forked:
            assert time.monotonic() < deadline, "the zygote does not answer"
            self.hear(0.1)
        return self.forked.popleft()

    def hear(self, timeout: float = 0) -> None:
        """Take in what the zygote has said."""
        readable, _, _ = select.select([self.process.stdout], [], [], timeout)
        if not readable:
            return
        said = os.read(self.process.stdout.fileno(), 65536)
        assert said, "the zygote has died"
        *lines, self.unread = (self.unread + said).split(b"\n")
        for line in lines:
            event = json.loads(line)
            if "forked" in event:
                self.forked.append(event["forked"])
                # A number may come back.
                self.codes.pop(event["forked"], None)
            else:
                self.codes[event["died"]] = event["code"]

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait(PATIENCE)
        self.process.stdout.close()


def state_of(pid: int) -> str:
    """The kernel's letter for a process; Z when it is dead."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return "Z"


def gone(pid: int) -> bool:
    """Whether the process has ended. Its parent may be dead, and nobody may have asked for it."""
    return state_of(pid) == "Z"


class Process:
    """A process of the scenario. It leads a session, so that what it starts ends with it."""

    def __init__(self, pid: int, log: Path, poll: Callable[[], int | None]) -> None:
        self.pid = pid
        self.log = log
        self.poll = poll
        self._code: int | None = None

    @property
    def code(self) -> int | None:
        """The exit status, negative for a signal; None while it lives."""
        if self._code is None:
            self._code = self.poll()
        return self._code

    @property
    def state(self) -> str:
        return state_of(self.pid)

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def strike(self, number: signal.Signals) -> None:
        assert self.code is None, f"process {self.pid} had ended with {self.code} before it was to get {number.name}"
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.strike(signal.SIGKILL)
        assert self.wait() == -signal.SIGKILL

    def terminate(self) -> None:
        self.strike(signal.SIGTERM)

    def freeze(self) -> None:
        self.strike(signal.SIGSTOP)

    def thaw(self) -> None:
        self.strike(signal.SIGCONT)

    def wait(self, patience: float = PATIENCE) -> int:
        """Wait for its end and return its exit status."""
        deadline = time.monotonic() + patience
        while self.code is None:
            assert time.monotonic() < deadline, f"process {self.pid} does not end:\n{self.said()[-3000:]}"
            time.sleep(0.002)
        return self.code

    def end(self) -> None:
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            # It has ended; or it was forked a moment ago, and does not lead its session yet.
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
        self.wait()


class Stage:
    """One scenario's processes, its log and its gates."""

    def __init__(self, folder: Path, environment: dict[str, str], zygote: Zygote) -> None:
        self.folder = folder
        self.environment = environment
        self.zygote = zygote
        # The DURABLE settings of the processes that are started from here on.
        self.options: dict[str, Any] = dict(LONG_LEASE)
        self.processes: list[Process] = []

    # -- Processes --

    def act(self, act: str, *arguments: Any, plan: dict[str, str] | None = None) -> Process:
        """Fork a process that plays a part of tests/scenarios/actors.py; `plan` says what strikes it, and when."""
        log = self._new_log(act)
        request = {"act": act, "arguments": arguments, "log": str(log), "environment": self._own(plan)}
        pid = self.zygote.fork(request)

        def poll() -> int | None:
            self.zygote.hear()
            return self.zygote.codes.get(pid)

        return self._joined(Process(pid, log, poll))

    def worker(self, *arguments: str, plan: dict[str, str] | None = None) -> Process:
        """Fork a `durable_worker`, and return when it is at work."""
        worker = self.act("worker", *arguments, plan=plan)
        self.until(lambda: self.lives(worker), "a worker begins")
        return worker

    def frozen(self, process: Process) -> None:
        """Return when the process has stopped at the moment of its plan ("stop").

        We hold SQLite's write lock meanwhile: another thread of the process, frozen while that has it, would keep the
        file from everybody, and this scenario would be about that.
        """
        self.sees("struck", pid=process.pid, plan="stop")
        with transaction.atomic():
            self.open(f"freeze {process.pid}")
            self.until(lambda: process.state == "T", "the process freezes")

    def worker_that_may_die(self, *arguments: str, plan: dict[str, str]) -> Process:
        """Fork a `durable_worker` whose plan may strike before anybody has looked."""
        return self.act("worker", *arguments, plan=plan)

    def finish(self) -> None:
        """Let a clean worker finish everything. PostgreSQL may need a moment to see that a client has died."""

        def finished() -> bool:
            worker = self.act("worker", "--burst")
            assert worker.wait() == 0, worker.said()
            return not WorkflowRun.objects.filter(status__in=UNFINISHED).exists()

        self.until(finished, "a clean worker finishes everything")

    def command(self, *arguments: str, plan: dict[str, str] | None = None, **environment: str) -> Process:
        """Start `python -m django ...` as a user would."""
        log = self._new_log(arguments[0])
        with log.open("wb") as output:
            started = subprocess.Popen(
                [sys.executable, "-m", "django", *arguments],
                cwd=ROOT,
                env={**self.environment, **self._own(plan), **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        return self._joined(Process(started.pid, log, started.poll))

    def _new_log(self, name: str) -> Path:
        return self.folder / f"{len(self.processes):03}-{name}.txt"

    def _own(self, plan: dict[str, str] | None) -> dict[str, str]:
        return {
            "SCENARIO_DIR": str(self.folder),
            "SCENARIO_DURABLE": json.dumps(self.options),
            "SCENARIO_PLAN": json.dumps(plan or {}),
        }

    def _joined(self, process: Process) -> Process:
        self.processes.append(process)
        return process

    def close(self) -> None:
        for process in self.processes:
            process.end()

    # -- What is seen --

    def lives(self, process: Process) -> bool:
        """Whether the process has a worker's row."""
        assert process.code is None, f"it ended with {process.code}:\n{process.said()[-3000:]}"
        return Worker.objects.filter(pid=process.pid).exists()

    def log(self, what: str, **facts: Any) -> list[dict[str, Any]]:
        """The lines of the scenario's log that say this."""
        path = self.folder / "log"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        wanted = {"what": what, **facts}
        return [line for line in lines if wanted.items() <= line.items()]

    def until(
        self, condition: Callable[[], Any], what: str, patience: float = PATIENCE, *, database: bool = True
    ) -> Any:
        """Return the condition's first true value; fail, with what the processes said, if there is none in time.

        `database` says whether that can be asked how the runs stand.
        """
        deadline = time.monotonic() + patience
        while not (value := condition()):
            if time.monotonic() > deadline:
                said = "\n".join(f"{each.log.name}, {each.state}:\n{each.said()[-2000:]}" for each in self.processes)
                rows = WorkflowRun.objects.exclude(status="SUCCEEDED").order_by("pk")
                runs = list(rows.values("pk", "status", "worker", "attempt", "recoveries")[:20]) if database else []
                raise AssertionError(f"waited {patience:g} s in vain: {what}\n{said}\n{runs}")
            time.sleep(0.01)
        return value

    def sees(self, what: str, patience: float = PATIENCE, **facts: Any) -> dict[str, Any]:
        """Wait for the log's first line that says this, and return it."""
        return self.until(lambda: self.log(what, **facts), f"{what} {facts}", patience)[0]

    def ended(self, *run_ids: str, status: str = "SUCCEEDED", patience: float = PATIENCE) -> None:
        """Wait until these runs have ended so."""

        def all_ended() -> bool:
            found = dict(WorkflowRun.objects.filter(pk__in=run_ids).values_list("pk", "status"))
            other = [run_id for run_id in found if found[run_id] in FINISHED - {status}]
            if other:
                run = WorkflowRun.objects.get(pk=other[0])
                raise AssertionError(f"run {run.pk} is {run.status}, not {status}: {run.error}")
            return len(found) == len(run_ids) and set(found.values()) == {status}

        self.until(all_ended, f"{len(run_ids)} runs are {status}", patience)

    # -- What is done --

    def pass_time(self, seconds: float) -> None:
        """Let this much time go by: where the scenario is about the time itself, and not about an event."""
        time.sleep(seconds)

    def open(self, gate: str) -> None:
        (self.folder / gate).touch()

    def judge(self, *run_ids: str) -> dict[str, Any]:
        """Fail unless each of these checkouts was done exactly once; return the facts."""
        facts = oracle.collect()
        oracle.judge(facts, self.log("charge"), list(run_ids))
        return facts


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def answer(port: int, path: str) -> int:
    """The status of a health request; 0 if nobody listens."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as response:
            return int(response.status)
    except urllib.error.HTTPError as refused:
        refused.close()
        return int(refused.code)
    except urllib.error.URLError:
        return 0


def connections_of(process: Process) -> int:
    """How many connections the process has to its database, counted from outside."""
    if connection.vendor == "sqlite":
        path = os.path.realpath(connection.settings_dict["NAME"])
        files = Path(f"/proc/{process.pid}/fd").iterdir()
        return sum(os.path.realpath(file) == path for file in files)
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
            "AND backend_type = 'client backend' AND pid <> pg_backend_pid()"
        )
        return int(cursor.fetchone()[0])
