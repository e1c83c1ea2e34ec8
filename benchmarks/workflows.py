"""The workflows that are measured. Their steps do nothing, or one insert: what is left is the package's share."""

import time

import django_durable as durable
from benchmarks.models import Entry

STEPS = 5

# Where `thousand_steps` leaves the seconds that its body took, for the measuring process.
body_seconds: list[float] = []


@durable.step(atomic=False)
def outside(number: int) -> int:
    return number


@durable.step
def insert(number: int) -> int:
    Entry.objects.create(text="one row of the user's own")
    return number


@durable.step(atomic=False)
def clock() -> float:
    """The system-wide monotonic clock, which the starting process reads too."""
    return time.monotonic()


@durable.workflow
def outside_steps(number: int) -> int:
    for _ in range(STEPS):
        outside(number)
    return number


@durable.workflow
def atomic_steps(number: int) -> int:
    for _ in range(STEPS):
        insert(number)
    return number


@durable.workflow
def one_step(number: int) -> float:
    return clock()


@durable.step(atomic=False)
def time_of_day() -> float:
    """The clock that this machine's database reads too."""
    return time.time()


@durable.workflow
def sleeper(seconds: float) -> float:
    durable.sleep(seconds)
    return time_of_day()


@durable.workflow
def told() -> float:
    durable.receive()
    return clock()


@durable.workflow
def told_often(times: int, generation: int) -> None:
    for _ in range(min(times, generation)):
        durable.receive()
    if times > generation:
        durable.continue_as_new(times - generation, generation)


@durable.workflow
def parent(children: int) -> int:
    handles = [one_step.start(number) for number in range(children)]
    return len(durable.wait(handles).done)


class NotYet(Exception):
    """Fails the run, so that it can be resumed and replayed again. Not a step's error: no step is repeated."""


@durable.workflow
def thousand_steps() -> None:
    began = time.perf_counter()
    for number in range(1000):
        outside(number)
    body_seconds.append(time.perf_counter() - began)
    raise NotYet
