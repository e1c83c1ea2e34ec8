"""Processes of ours: started with an environment of their own, listened to, and ended whatever happens."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any
from urllib.parse import quote

import httpx

TESTPROJECT = Path(__file__).resolve().parent.parent
Event = dict[str, Any]


class Child:
    """One process. All it prints goes to its log; its lines of JSON, and its end, are events too."""

    def __init__(self, name: str, command: list[str], env: dict[str, str], log: Path, events: SimpleQueue[Event]):
        self.name = name
        self.log = log
        self.events = events
        self.ending = False  # set when its end is wanted
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log.open("a")
        self.process = subprocess.Popen(
            [sys.executable, *command],
            cwd=TESTPROJECT,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            # Ctrl-C is for us alone: we end the children, each in its own way.
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._listen, name=name, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self.process.pid

    def ask_to_end(self) -> None:
        """SIGTERM, if it is still there."""
        self.ending = True
        if self.process.poll() is None:
            self.process.terminate()

    def kill(self) -> None:
        """SIGKILL: no handler runs, nothing is flushed, no connection is closed."""
        self.ending = True
        self.process.kill()
        self.process.wait()
        self._reader.join()

    def tail(self, lines: int = 15) -> str:
        """Return the end of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def _listen(self) -> None:
        assert self.process.stdout is not None
        with self._log, self.process.stdout:
            # Ends with the process. What it wrote before a SIGKILL is still in the pipe.
            for line in self.process.stdout:
                self._log.write(line)
                self._log.flush()
                event = _parse(line)
                if event is not None:
                    self.events.put({"at": time.time(), "by": self.name, **event})
            code = self.process.wait()
        self.events.put({"at": time.time(), "by": self.name, "what": "ended", "child": self, "code": code})


class Children:
    """The processes of one demo or one shop, sharing a folder for all they write."""

    def __init__(self, folder: Path, env: dict[str, str]) -> None:
        self.folder = folder
        self.env = env
        self.events: SimpleQueue[Event] = SimpleQueue()
        self.all: list[Child] = []

    def start(self, name: str, *command: str, **env: str) -> Child:
        log = self.folder / "log" / f"{name}.log"
        child = Child(name, list(command), {**self.env, **env}, log, self.events)
        self.all.append(child)
        return child

    def run(self, *command: str) -> None:
        """Run a management command to its end."""
        done = subprocess.run(
            [sys.executable, "manage.py", *command],
            cwd=TESTPROJECT,
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
        )
        if done.returncode:
            raise ChildFailed(f"manage.py {' '.join(command)} failed:\n{done.stdout}")

    def next_event(self) -> Event:
        """Wait until a process tells something; that it has ended by itself is an error."""
        event = self.events.get()
        if event.get("what") == "ended":
            raise ChildFailed.ended(event["child"], event["code"])
        return event

    def end(self, grace: float = 10) -> None:
        """Let them end in order; kill those that do not, or all that are left at a second Ctrl-C."""
        try:
            for child in self.all:
                child.ask_to_end()
            deadline = time.monotonic() + grace
            with suppress(subprocess.TimeoutExpired):
                for child in self.all:
                    child.process.wait(max(0, deadline - time.monotonic()))
        finally:
            for child in self.all:
                child.kill()


class ChildFailed(Exception):
    """A process did not do what it was started for; the text says which, and shows the end of its log."""

    @classmethod
    def ended(cls, child: Child, code: int | None) -> ChildFailed:
        return cls(f"The {child.name} ended by itself (exit status {code}). The end of {child.log}:\n{child.tail()}")


@contextmanager
def children(folder: Path, env: dict[str, str]) -> Iterator[Children]:
    """Start processes in this block; none of them outlives it."""
    started = Children(folder, env)
    try:
        yield started
    finally:
        started.end()


def environment(folder: Path) -> dict[str, str]:
    """Return the environment of processes that work in this folder: ours, but for what would change the shop."""
    folder = folder.resolve()
    shops_own = ("DEBUG", "SECRET_KEY", "ALLOWED_HOSTS", "PAYMENTS_URL", "SHOP_STORY", "SHOP_STORY_HOLD")
    env = {name: value for name, value in os.environ.items() if name not in shops_own}
    return env | {
        "DJANGO_SETTINGS_MODULE": "project.settings",
        "SHOP_VAR": str(folder),
        # Whatever the environment says: a database that has other work would get tables, and an administrator whose
        # password everybody knows.
        "DATABASE_URL": f"sqlite:///{quote(str(folder / 'shop.sqlite3'))}",
        "PYTHONUNBUFFERED": "1",
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until_answers(url: str, child: Child, timeout: float = 30) -> None:
    """Wait until the child answers HTTP at this address."""
    deadline = time.monotonic() + timeout
    while True:
        if child.process.poll() is not None:
            raise ChildFailed.ended(child, child.process.returncode)
        try:
            httpx.get(url, trust_env=False, timeout=5)
            return
        except httpx.TransportError as error:
            if time.monotonic() > deadline:
                raise ChildFailed(f"The {child.name} does not answer at {url}: {error}\n{child.tail()}") from error
        time.sleep(0.05)


def _parse(line: str) -> Event | None:
    if not line.startswith("{"):
        return None
    try:
        event: Event = json.loads(line)
    except ValueError:
        return None
    return event
