"""An async body, driven from the thread that holds its run."""

from __future__ import annotations

import asyncio
from typing import Any

from django_durable.engine.asynchronous.body import Body
from django_durable.engine.asynchronous.loop import event_loop
from django_durable.engine.asynchronous.threads import Lane, Result, database_thread, own_loop, result_of
from django_durable.engine.context import RunContext


def drive(context: RunContext, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """Run the async body on the process's loop; this thread serves as its database thread until it ends."""
    lane, ended = Lane(), Result()
    body = Body(context)

    async def run() -> None:
        nonlocal ended
        try:
            async with database_thread(lane):
                ended = await result_of(body.run(args, kwargs))
        finally:
            lane.close()

    asyncio.run_coroutine_threadsafe(run(), event_loop())
    with own_loop():
        try:
            lane.serve()
        except BaseException:
            # Ctrl-C: what is under way on the loop ends before its thread leaves it.
            event_loop().call_soon_threadsafe(body.leave)
            lane.serve()
            raise
    return ended.get()
