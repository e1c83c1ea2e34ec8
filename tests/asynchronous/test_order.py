"""Whatever finished first, a replay of an async workflow goes the same way."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from asgiref.sync import sync_to_async

import django_durable as durable
from django_durable.testing import advance, crash_after, crash_before, run_until_idle
from tests.app.workflows import times
from tests.asynchronous.common import (
    Refused,
    double,
    gate,
    left_on_the_loop,
    seen,
    steps_of,
    write,
)

pytestmark = pytest.mark.django_db


CHAINS = {"a": 3, "b": 3, "c": 2}


async def in_turn(name: str, order: list[str]) -> str:
    """Return when it is this one's turn to be finished."""
    place = order.index(name)
    if place and order[place - 1] not in seen:
        await gate(order[place - 1]).wait()
    seen.append(name)
    gate(name).set()
    return name


@durable.workflow(name="tests.async.chains")
async def chains(order: list[str]) -> list[Any]:
    came: list[str] = []

    async def chain(letter: str) -> list[str]:
        done = []
        for number in range(CHAINS[letter]):
            done.append(await durable.arun_step(f"{letter}{number}", in_turn, f"{letter}{number}", order))
            came.append(done[-1])
        return done

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(chain(letter)) for letter in CHAINS]
    last = await durable.arun_step("last", str, came)
    return [[task.result() for task in tasks], came, last]


def an_order(seed: int) -> list[str]:
    """The steps of all chains, mixed, each chain's in its own order."""
    letters = [letter for letter, length in CHAINS.items() for _ in range(length)]
    random.Random(seed).shuffle(letters)
    numbers = dict.fromkeys(CHAINS, -1)
    order = []
    for letter in letters:
        numbers[letter] += 1
        order.append(f"{letter}{numbers[letter]}")
    return order


@pytest.mark.parametrize("seed", range(12))
def test_whatever_finishes_first_a_replay_goes_the_same_way(seed):
    order = an_order(seed)
    run = chains.start(order)
    for step in random.Random(seed).sample(order, 3):
        if step in {name for _, name, _ in steps_of(run)}:
            continue
        recorded, executed = steps_of(run), len(seen)
        with crash_after(step):
            run_until_idle()
        assert set(recorded) <= set(steps_of(run))
        assert not {name for _, name, _ in recorded} & set(seen[executed:])
    with crash_before("last"):
        run_until_idle()
    before, executed = steps_of(run), list(seen)
    assert len(before) == len(order)
    run_until_idle()
    assert seen == executed
    results, came, last = run.result(timeout=0)
    assert results == [[f"{letter}{number}" for number in range(length)] for letter, length in CHAINS.items()]
    assert sorted(came) == sorted(order)
    assert last == str(came)


@durable.workflow(name="tests.async.first_wins")
async def first_wins(order: list[str]) -> list[Any]:
    racers = [asyncio.create_task(durable.arun_step(name, in_turn, name, order)) for name in ("x", "y", "z")]
    done, pending = await asyncio.wait(racers, return_when=asyncio.FIRST_COMPLETED)
    for racer in pending:
        racer.cancel()
    winner = [racer.result() for racer in done]
    return [*winner, await durable.arun_step("after the race", str, winner)]


def test_a_race_has_the_same_winner_on_replay_and_does_not_run_the_losers_again():
    run = first_wins.start(["y", "never", "x", "z"])
    with crash_before("after the race"):
        run_until_idle()
    assert seen == ["y"]
    assert run.model.steps.filter(name="y").get().position == 2
    run_until_idle()
    assert seen == ["y"]
    assert run.result(timeout=0) == ["y", "['y']"]
    assert run.model.steps.filter(name="after the race").get().position == 4


@durable.workflow(name="tests.async.one_fails")
async def one_fails() -> list[str]:
    async def others() -> None:
        await double(1)
        await durable.arun_step("stuck", gate("never").wait)

    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(others())
            group.create_task(durable.arun_step("fails", fail_when_others_are_stuck))
    except* Refused as errors:
        failed = [error.args[0] for error in errors.exceptions]
    return [*failed, await write.acall("undone")]


async def fail_when_others_are_stuck() -> None:
    await sync_to_async(lambda: None)()
    raise Refused("one fails", 1)


def test_an_error_in_a_task_group_stops_its_siblings_also_on_replay():
    run = one_fails.start()
    with crash_before("write"):
        run_until_idle()
    run_until_idle()
    assert run.result(timeout=0) == ["one fails", "undone"]
    assert times("undone") == 1
    assert not left_on_the_loop()


@durable.workflow(name="tests.async.changed")
async def changed(names: str) -> None:
    await asyncio.gather(*(durable.arun_step(name, str, name) for name in seen or names))
    await durable.asleep(60)


def test_code_that_no_longer_fits_its_history_sets_the_run_aside():
    run = changed.start("ab")
    run_until_idle()
    seen.extend("ac")
    advance("2 minutes")
    run_until_idle()
    assert run.status == "DEAD"
    assert "recorded 'b', the code now calls 'c'" in run.model.error
    assert not left_on_the_loop()
