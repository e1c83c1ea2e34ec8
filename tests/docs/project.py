"""A reader of the tutorial: makes the project from the page's own blocks, types its commands, starts its servers."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.docs.pages import Command

DEADLINE = 60  # seconds, for what takes one or two on an idle machine

# What differs from one day to the next.
CHANGING = (
    (re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}"), "<time>"),
    (re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"), "<run>"),
    (re.compile(r"\b[0-9a-f]{32}\b"), "<worker>"),
    (re.compile(r"\d+\.\d+s\b"), "<duration>"),
)


def normalized(text: str) -> list[str]:
    for pattern, name in CHANGING:
        text = pattern.sub(name, text)
    return [line.rstrip() for line in text.splitlines() if line.strip()]


def wait_for(what: Callable[[], str], condition: Callable[[], Any]) -> Any:
    """Poll for another process's state until the condition holds, and return what it returned."""
    until = time.monotonic() + DEADLINE
    while time.monotonic() < until:
        with suppress(OSError):
            if found := condition():
                return found
        time.sleep(0.02)
    raise AssertionError(f"Waited {DEADLINE} s for {what()}")


class Server:
    """A process that stays, with what it has printed so far."""

    def __init__(self, arguments: list[str], folder: Path, env: dict[str, str], log: Path) -> None:
        self.log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(arguments, cwd=folder, env=env, stdout=output, stderr=output)

    @property
    def printed(self) -> str:
        return self.log.read_text(encoding="utf-8")

    def wait_until_it_says(self, text: str) -> None:
        def said() -> bool:
            assert self.process.poll() is None or text in self.printed, f"It has ended:\n{self.printed}"
            return text in self.printed

        wait_for(lambda: f"{text!r} in\n{self.printed}", said)

    def kill(self) -> None:
        """SIGKILL: it can do nothing about it, and is gone when this returns."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(DEADLINE)
        finally:
            self.kill()


class Project:
    """A folder in which a reader works."""

    def __init__(self, home: Path, env: dict[str, str]) -> None:
        self.home = home
        self.folder = home
        self.servers: list[Server] = []
        # As in the reader's virtual environment: these tests' own python and django-admin come first. The settings
        # of these tests are none of the project's business.
        self.env = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("DJANGO_", "DURABLE_", "DATABASE_", "PYTEST_", "PYTHON"))
        }
        self.env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{self.env['PATH']}"
        self.env |= env

    def write(self, caption: str, text: str) -> None:
        """Write a captioned block where its caption says: a file, or the end of one."""
        name, _, where = caption.partition(", ")
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if where:
            text = f"{path.read_text()}\n\n{text}"
        path.write_text(text, encoding="utf-8")

    def type(self, command: Command, **env: str) -> str:
        """Run a command to its end, compare what it printed with what the page says, and return it."""
        arguments = shlex.split(command.line)
        if arguments[0] == "cd":
            self.folder /= arguments[1]
            return ""
        done = subprocess.run(
            arguments, cwd=self.folder, env=self.env | env, capture_output=True, text=True, timeout=DEADLINE
        )
        printed = done.stdout + done.stderr
        assert done.returncode == 0, f"{command.line} ended with {done.returncode}:\n{printed}"
        missing = [line for line in normalized(command.output) if line not in normalized(printed)]
        assert not missing, f"{command.line} did not print {missing}, but:\n{printed}"
        return printed

    def start(self, line: str) -> Server:
        log = self.home / f"server-{len(self.servers)}.log"
        server = Server(shlex.split(line), self.folder, self.env | {"PYTHONUNBUFFERED": "1"}, log)
        self.servers.append(server)
        return server

    def shell(self, source: str) -> str:
        """What a few lines print in the project."""
        return self.type(Command(shlex.join(["python", "manage.py", "shell", "-v", "0", "-c", source]), ""))

    def close(self) -> None:
        for server in self.servers:
            server.kill()
