"""Steps and workflows that several tests of parallel steps use, and what they see of an execution."""

import threading
from contextlib import contextmanager

import pytest
from django.db.models import F

import django_durable as durable
from django_durable import signals
from django_durable.engine import claims
from django_durable.engine.leases import Lease
from django_durable.engine.replay import execute
from django_durable.models import StepCheckpoint
from tests.app.models import Account, Ledger

in_a_test = pytest.mark.django_db

# With threads and connections of their own, as in a worker.
for_real = pytest.mark.django_db(transaction=True)
PATIENCE = 20
calls: list = []


def threads_of_steps():
    return [thread for thread in threading.enumerate() if thread.name.endswith("-step")]


def history():
    return list(StepCheckpoint.objects.order_by("position").values_list("position", "name", "status"))


def wait(event):
    assert event.wait(PATIENCE), "it never came"


@contextmanager
def told_of_records(receiver):
    def recorded(**facts):
        receiver(facts)

    signals.step_recorded.connect(recorded, weak=False)
    try:
        yield
    finally:
        signals.step_recorded.disconnect(recorded)


def execute_as_a_worker(run):
    """One execution by a process with a lease of its own: threads, connections, and no test's clock."""
    lease = Lease("default", "worker", ["default"])
    lease.register()
    claims.wake_due("default")
    (claim,) = claims.claim(lease, 1, run_id=run.id)
    # A crash leaves it as a killed process would.
    execute(claim, lease)
    lease.remove()


@durable.step(name="square", atomic=False)
def square(number):
    calls.append(number)
    return number * number


@durable.step(name="last", atomic=False)
def last():
    calls.append("last")


@durable.workflow(name="tests.parallel.squares")
def squares(count, limit=8):
    mapped = square.map(range(count), max_parallel=limit)
    futures = [square.submit(number) for number in range(3)]
    # Asked for in another order than they were submitted in.
    submitted = [futures[place].result() for place in (2, 0, 1)]
    last()
    return [mapped, submitted, futures[2].result()]


class Turns:
    """Lets parallel steps be recorded in this order of positions, and notes that they were."""

    def start(self, order):
        self.order = list(order)
        self.gates = {position: threading.Event() for position in order}
        self.seen = []
        self.all_recorded = threading.Event()
        self.gates[self.order[0]].set()

    def __call__(self, facts):
        if facts["name"] == "in turn":
            self.seen.append(facts["position"])
            following = self.order[len(self.seen) :]
            (self.gates[following[0]] if following else self.all_recorded).set()


turns = Turns()


@durable.step(name="in turn", atomic=False)
def in_turn(label):
    calls.append(label)
    wait(turns.gates[int(durable.current().idempotency_key.rpartition(":")[2])])
    return label.upper()


@durable.step(name="deposit")
def deposit(name):
    Account.objects.filter(name=name).update(balance=F("balance") + 1)
    Ledger.objects.create(key=f"deposit {durable.current().idempotency_key}")
    return Account.objects.get(name=name).balance


@durable.workflow(name="tests.parallel.deposits")
def deposits(names, limit=8):
    return sorted(deposit.map(names, max_parallel=limit))


class Declined(Exception):
    def __init__(self, text, *, code):
        super().__init__(text)
        self.code = code


@durable.step(name="pay", atomic=False)
def pay(who):
    calls.append(who)
    if who.startswith("bad") and calls.count(who) == 1:
        raise Declined(f"no: {who}", code=51)
    return f"paid by {who}"
