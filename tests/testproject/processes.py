"""Starts the example's programs as a reader of the README would: from outside, by their files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
TESTPROJECT = ROOT / "testproject"


def environment(**changes: str) -> dict[str, str]:
    """Return the environment for the example: it has settings and databases of its own."""
    ours = ("DJANGO_", "DURABLE_", "DATABASE_URL")
    env = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
    return env | changes


def run(*command: str, timeout: float, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        cwd=TESTPROJECT,
        env=environment(**env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )


@contextmanager
def started(*command: str, **env: str) -> Iterator[subprocess.Popen[str]]:
    """Start a program for the length of this block."""
    with subprocess.Popen(
        [sys.executable, *command],
        cwd=TESTPROJECT,
        env=environment(**env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    process.kill()


@contextmanager
def payment_service(ledger: Path, *options: str) -> Iterator[str]:
    """Start the payment service, and yield its address."""
    with started("-m", "payments", "--ledger", str(ledger), *options) as process:
        first: dict[str, Any] = json.loads(process.stdout.readline())
        yield first["listening"]
