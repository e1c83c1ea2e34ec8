"""Runs that wait, and rivals: processes that act just when a run is about to wait.

A run says over UDP where it stands; a rival that hears it acts at once or a few milliseconds later. So what is waited
for becomes true before, while and after the run looks for it.
"""

from __future__ import annotations

import json
import random
import socket
import threading
import time
from contextlib import suppress
from typing import Any

from django.db import close_old_connections, transaction

import django_durable as durable
from django_durable.engine import claims
from django_durable.engine.heartbeat import inline_lease
from django_durable.engine.replay import execute
from tests.scenarios.workflows import effect, folder, note

# A run goes this many rounds: one that parks often is replayed often.
ROUNDS = 10
RIVALS = 2
THREADS = 2
# Seconds: about what a send and a wait take, and what an execution from its claim to its end takes.
SEND, EXECUTION = 0.006, 0.03


# -- The race -------------------------------------------------------------------------------------------------------


def pause(most: float) -> None:
    """Not at all, or for as long as it takes to meet the other in the middle."""
    if random.random() < 0.8:
        time.sleep(random.uniform(0, most))


def challenge(number: int, **what: Any) -> None:
    """Tell one of the rivals what to do now. A replay tells it again, and is not listened to."""
    port = int((folder() / f"rival-{number % RIVALS}").read_text())
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as speaker:
        speaker.sendto(json.dumps(what).encode(), ("127.0.0.1", port))


def rival(number: int) -> None:
    """Hear challenges and answer each one once, until the gate "over" opens."""
    heard: set[bytes] = set()
    lock = threading.Lock()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        listener.bind(("127.0.0.1", 0))
        listener.settimeout(0.2)

        def answer() -> None:
            while not (folder() / "over").exists():
                with suppress(TimeoutError):
                    said = listener.recv(4096)
                    with lock:
                        known = said in heard
                        heard.add(said)
                    if not known:
                        pause(SEND)
                        act(**json.loads(said))
            close_old_connections()

        crew = [threading.Thread(target=answer) for _ in range(THREADS)]
        for thread in crew:
            thread.start()
        # Written when it listens, and moved when it is whole.
        half = folder() / f"half-{number}"
        half.write_text(str(listener.getsockname()[1]))
        half.rename(folder() / f"rival-{number}")
        wait_at_for_long("over")
        for thread in crew:
            thread.join()


def wait_at_for_long(gate: str) -> None:
    while not (folder() / gate).exists():
        time.sleep(0.1)


def act(how: str, run: str, value: Any = None) -> None:
    try:
        ACTS[how](run, value)
    except Exception as error:
        note("rival failed", how=how, run=run, error=repr(error))


def send_in_a_long_transaction(run: str, value: int) -> None:
    with transaction.atomic():
        durable.send(run, value, "race")
        pause(SEND)


def go(run: str, value: Any) -> None:
    """Execute a run that no worker serves, here and now, until it ends or waits."""
    lease = inline_lease("default")
    # A claim passes over a row that is locked: by the run that begins to wait for this one.
    while not (claimed := claims.claim(lease, 1, run_id=run)):
        time.sleep(0.001)
    for claim in claimed:
        execute(claim, lease)


ACTS = {
    "send": lambda run, value: durable.send(run, value, "race"),
    "send slowly": send_in_a_long_transaction,
    "send once": lambda run, value: durable.send(run, value, "race", key=str(value)),
    "send from a body": lambda run, value: teller.using(run_id=f"{run}-body-{value}")(run, value),
    "send from a step": lambda run, value: teller.using(run_id=f"{run}-step-{value}")(run, value, True),
    "go": go,
    "cancel": lambda run, value: durable.get_run(run).cancel(),
}


@durable.step(name="tell")
def tell(run: str, value: int) -> None:
    durable.send(run, value, "race")


@durable.workflow(name="teller", queue="rivals")
def teller(run: str, value: int, in_step: bool = False) -> None:
    (tell if in_step else _send)(run, value)


def _send(run: str, value: int) -> None:
    durable.send(run, value, "race")


@durable.step(name="publish")
def publish(value: Any) -> None:
    durable.set_event("k", value)


@durable.step(name="publish outside", atomic=False)
def publish_outside(value: Any) -> None:
    durable.set_event("k", value)


@durable.workflow(name="runner", queue="rivals")
def runner(value: Any) -> Any:
    """Ends when a rival is told to execute it."""
    return value


@durable.workflow(name="publisher", queue="rivals")
def publisher(value: Any, how: str) -> None:
    """Publishes when a rival is told to execute it, and does not end behind it: that would be news, too."""
    if how == "body":
        durable.set_event("k", value)
    else:
        (publish if how == "step" else publish_outside)(value)
    durable.receive("never")


@durable.workflow(name="receiver")
def receiver() -> list[int]:
    """Receives what a rival sends just now."""
    me, got = durable.current().run_id, []
    ways = ["send", "send slowly", "send once", "send from a body", "send from a step"]
    for number in range(ROUNDS):
        how = ways[number % len(ways)]
        challenge(number, how=how, run=me, value=number)
        if how == "send once":
            challenge(number + 1, how=how, run=me, value=number)
        pause(SEND)
        got.append(durable.receive("race"))
    return got


@durable.workflow(name="follower")
def follower() -> list[Any]:
    """Waits for an event that another run publishes just now, or ends without."""
    got = []
    for number in range(ROUNDS):
        how = ["body", "step", "outside", ""][number % 4]
        other = publisher.start(number, how) if how else runner.start(number)
        challenge(number, how="go", run=other.id)
        pause(EXECUTION)
        got.append(durable.get_event(other, "k", default="none"))
    return got


@durable.workflow(name="parent")
def parent() -> list[Any]:
    """Waits for children that end just now."""
    got: list[Any] = []
    for number in range(ROUNDS):
        children = [runner.start(number) for _ in range(1 if number % 4 in (0, 3) else 2)]
        for each, child in enumerate(children):
            challenge(number + each, how="cancel" if number % 4 == 3 else "go", run=child.id)
        pause(EXECUTION)
        match number % 4:
            case 0:
                got.append(children[0].result())
            case 1:
                got.append(len(durable.wait(children).done))
            case 2:
                first = durable.wait(children, "FIRST")
                got.append([len(first.done) >= 1, len(durable.wait(first.pending).done) + len(first.done)])
            case 3:
                try:
                    got.append(children[0].result())
                except durable.RunCancelled:
                    got.append("cancelled")
    return got


EXPECTED = {
    "receiver": list(range(ROUNDS)),
    "follower": ["none" if number % 4 == 3 else number for number in range(ROUNDS)],
    "parent": [[number, 2, [True, 2], "cancelled"][number % 4] for number in range(ROUNDS)],
}


# -- Killed at every statement --------------------------------------------------------------------------------------

# Parked for, as the scenario's PARK_AFTER is shorter.
NAP = 0.02


@durable.step(name="record")
def record(what: str) -> str:
    return effect(what)


@durable.workflow(name="helper")
def helper() -> str:
    durable.sleep(NAP)
    record("helped")
    return "helped"


@durable.workflow(name="waiting")
def waiting() -> dict[str, Any]:
    """One wait of each kind; behind each an effect that must be there once."""
    durable.sleep(NAP)
    record("slept")
    durable.set_event("ready", 1)
    child = helper.start()
    first = durable.receive("orders")
    record(f"received {first}")
    second = durable.receive("orders")
    record(f"received {second}")
    helped = child.result()
    record("joined")
    return {"messages": [first, second], "helped": helped, "missing": durable.receive("orders", timeout=0)}


@durable.workflow(name="asking")
def asking(run: str) -> int:
    value = durable.get_event(run, "ready")
    record(f"asked {value}")
    return value


@durable.workflow(name="sending")
def sending(run: str) -> None:
    """Sends from its body and from a step."""
    durable.send(run, "first", "orders")
    record("sent first")
    send_second(run)


@durable.step(name="send second")
def send_second(run: str) -> None:
    effect("sent second")
    durable.send(run, "second", "orders")


def send_both(run: str) -> None:
    """What a view does: all of it in its own transaction, and keys for the case that it is asked again."""
    with transaction.atomic():
        for message in ("first", "second"):
            durable.send(run, message, "orders", key=message)


def call_sending(run_id: str, run: str) -> None:
    sending.using(run_id=run_id)(run)


EFFECTS = {
    "waiting": ["slept", "received first", "received second", "joined"],
    "helper": ["helped"],
    "asking": ["asked 1"],
    "sending": ["sent first", "sent second"],
}
