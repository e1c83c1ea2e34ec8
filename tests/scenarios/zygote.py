"""Forks the processes of the scenarios. Django is ready in it, so that one costs milliseconds and not a second.

It holds no connection and has no thread: what it forks begins as a process of its own. Requests are lines of JSON on
its standard input, events are lines of JSON on its standard output; when the input ends, so do its children, and it.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import sys
import traceback
from contextlib import suppress
from typing import Any

import django


def main() -> None:
    django.setup()
    # What the children would import each for themselves.
    from django.core.management.commands import migrate  # noqa: F401
    from django.db.models.sql import compiler  # noqa: F401

    from django_durable.management.commands import durable_worker  # noqa: F401
    from tests.scenarios import actors  # noqa: F401

    deaths, died = os.pipe()
    os.set_blocking(died, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(died)
    children: set[int] = set()
    with selectors.DefaultSelector() as selector:
        selector.register(deaths, selectors.EVENT_READ, "deaths")
        selector.register(sys.stdin, selectors.EVENT_READ, "requests")
        while True:
            for key, _ in selector.select():
                if key.data == "deaths":
                    os.read(deaths, 4096)
                    report_deaths(children)
                elif line := sys.stdin.readline():
                    pid = fork(json.loads(line), [deaths, died])
                    children.add(pid)
                    say(forked=pid)
                else:
                    end(children)
                    return


def say(**event: Any) -> None:
    print(json.dumps(event), flush=True)


def report_deaths(children: set[int]) -> None:
    for child in list(children):
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            children.discard(pid)
            say(died=pid, code=os.waitstatus_to_exitcode(status))


def end(children: set[int]) -> None:
    for child in children:
        # The child leads a session: with it go the processes that it has started.
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)


def fork(request: dict[str, Any], private: list[int]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        begin(request, private)
        from tests.scenarios import actors

        getattr(actors, request["act"])(*request["arguments"])
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # Past the caller's loop and its exit handlers, which are the zygote's.
        os._exit(code)


def begin(request: dict[str, Any], private: list[int]) -> None:
    """Become a process of its own."""
    from django.test import override_settings

    os.setsid()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for descriptor in private:
        os.close(descriptor)
    nothing = os.open(os.devnull, os.O_RDONLY)
    log = os.open(request["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(nothing, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(request["environment"])
    override_settings(DURABLE=json.loads(os.environ["SCENARIO_DURABLE"])).enable()


if __name__ == "__main__":
    main()
