"""The checkout that is killed at every moment, and the few other workflows that the scenarios need.

Each effect leaves a trace outside what is tested: a Ledger row (no constraint would hide a second one), or a line in
the scenario's log, written before the effect. `reach` names the moments at which a scenario's plan may strike.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any
from uuid import uuid4

from django.db import transaction
from django.db.models import F

import django_durable as durable
from tests.app.models import Account, Ledger


class CardDeclined(Exception):
    pass


# -- What a scenario sees and steers ----------------------------------------------------------------------------


def folder() -> Path:
    return Path(os.environ["SCENARIO_DIR"])


def note(what: str, **facts: Any) -> None:
    """Add a line to the scenario's log: one write, so that no death and no other process can tear it."""
    line = json.dumps({"what": what, "pid": os.getpid(), **facts}) + "\n"
    log = os.open(folder() / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(log, line.encode())
    finally:
        os.close(log)


def freeze() -> None:
    """Stop this process right here: a signal to the process alone may let this thread go on for a while."""
    signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)


def reach(moment: str) -> None:
    """Do to this process what its plan says about this moment.

    "kill", "freeze" (at once), "stop" (when the scenario says so: see `Stage.frozen`), or "wait:<gate>".
    """
    plans = json.loads(os.environ.get("SCENARIO_PLAN", "{}"))
    if moment not in plans:
        return
    plan = plans.pop(moment)
    # Once is enough: what was frozen goes on with other runs.
    os.environ["SCENARIO_PLAN"] = json.dumps(plans)
    note("struck", moment=moment, plan=plan)
    if plan == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif plan in ("freeze", "stop"):
        if plan == "stop":
            wait_at(f"freeze {os.getpid()}")
        freeze()
    elif plan.startswith("wait:"):
        wait_at(plan.removeprefix("wait:"))
    else:
        raise ValueError(plan)


def wait_at(gate: str) -> None:
    """Wait until the scenario opens this gate."""
    deadline = time.monotonic() + 60
    while not (folder() / gate).exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"nobody opened {gate!r}")
        time.sleep(0.005)


def effect(step: str) -> str:
    """The write of an atomic step. Its token, in the row and in the checkpoint, shows that both are of one try."""
    token = f"{os.getpid()}-{uuid4().hex[:12]}"
    Ledger.objects.create(key=f"{durable.current().run_id}/{step}", note=token)
    return token


def take_seat(number: int) -> None:
    """Rows that all runs fight for, always in this order; their sum never changes."""
    Account.objects.filter(name="free").update(balance=F("balance") - number)
    Account.objects.filter(name="taken").update(balance=F("balance") + number)


# -- The checkout -----------------------------------------------------------------------------------------------


@durable.step
def reserve(customer: str) -> str:
    reach("reserve begins")
    token = effect("reserve")
    take_seat(1)
    reach("reserve ends")
    transaction.on_commit(lambda: reach("reserve committed"))
    return token


@durable.step(atomic=False)
def charge(customer: str, card: str) -> str:
    reach("charge begins")
    here = durable.current()
    note("charge", run=here.run_id, key=here.idempotency_key)
    reach("charge ends")
    if card == "declined":
        raise CardDeclined(customer)
    return f"paid by {customer}"


@durable.step
def fulfil(customer: str) -> str:
    reach("fulfil begins")
    token = effect("fulfil")
    reach("fulfil ends")
    transaction.on_commit(lambda: reach("fulfil committed"))
    return token


@durable.step
def release(customer: str) -> str:
    reach("release begins")
    token = effect("release")
    take_seat(-1)
    reach("release ends")
    transaction.on_commit(lambda: reach("release committed"))
    return token


@durable.workflow(name="checkout")
def checkout(customer: str, card: str = "good") -> dict[str, Any]:
    reach("body begins")
    reserved = reserve(customer)
    reach("body reserved")
    try:
        payment = charge(customer, card)
    except CardDeclined as declined:
        reach("body charged")
        released = release(customer)
        reach("body ends")
        return {"ok": False, "reason": str(declined), "tokens": [reserved, released], "ended_by": os.getpid()}
    reach("body charged")
    fulfilled = fulfil(customer)
    reach("body ends")
    return {"ok": True, "payment": payment, "tokens": [reserved, fulfilled], "ended_by": os.getpid()}


# -- Others -----------------------------------------------------------------------------------------------------


@durable.step(atomic=False)
def hold(gate: str) -> int:
    """Takes as long as the scenario wants."""
    note("holding", run=durable.current().run_id)
    wait_at(gate)
    return os.getpid()


@durable.step(name="hold")
def hold_transaction(gate: str) -> int:
    effect("hold")
    note("holding", run=durable.current().run_id)
    wait_at(gate)
    return os.getpid()


@durable.step(name="after")
def after() -> str:
    return effect("after")


@durable.workflow(name="long")
def long(gate: str, in_transaction: bool = False) -> int:
    """A step that lasts, between two that do not."""
    after()
    held = (hold_transaction if in_transaction else hold)(gate)
    after()
    return held


@durable.workflow(name="probe")
def probe() -> int:
    """Shows that a worker's thread is free again: executed, whatever that thread did before has ended."""
    return os.getpid()


@durable.workflow(name="poison", max_recoveries=3)
def poison() -> None:
    """Takes its worker with it, every time."""
    note("poisoned", run=durable.current().run_id)
    os._exit(137)


# -- Parallel steps ---------------------------------------------------------------------------------------------


@durable.step(name="book")
def book(place: str) -> str:
    reach(f"book {place} begins")
    token = effect(f"book {place}")
    take_seat(1)
    reach(f"book {place} ends")
    transaction.on_commit(lambda: reach(f"book {place} committed"))
    return token


@durable.step(name="ask", atomic=False)
def ask(whom: str, gate: str) -> str:
    here = durable.current()
    note("asked", run=here.run_id, whom=whom, key=here.idempotency_key)
    if gate:
        wait_at(gate)
    return f"{whom} says yes"


@durable.workflow(name="journey")
def journey(gate: str = "") -> dict[str, Any]:
    """Steps of both kinds side by side; half of the outside ones take as long as the scenario wants."""
    asked = [ask.submit(whom, gate if whom in ("bob", "dan") else "") for whom in ("ada", "bob", "cyd", "dan")]
    booked = book.map(["train", "hotel", "museum", "dinner"], max_parallel=3)
    return {"booked": booked, "asked": [future.result() for future in asked]}


# -- Children ---------------------------------------------------------------------------------------------------


@durable.step(name="first")
def first() -> str:
    return effect("first")


@durable.step(name="second")
def second() -> str:
    return effect("second")


@durable.workflow(name="member")
def member(customer: str) -> list[str]:
    return [customer, first(), second()]


@durable.workflow(name="family")
def family(customer: str) -> list[Any]:
    """Starts one child, calls another, waits for both, and returns what they came to."""
    before = first()
    started = member.start(f"{customer}, started")
    called = member(f"{customer}, called")
    done, pending = durable.wait([started])
    return [before, started.result(), called, len(done), len(pending), second()]
