"""An order whose async steps run beside each other; each effect leaves a trace that a second one would double."""

from __future__ import annotations

import asyncio
from typing import Any

from asgiref.sync import sync_to_async

import django_durable as durable
from tests.app.models import Ledger
from tests.scenarios.workflows import note, reach, wait_at


@durable.step(atomic=False)
async def ask(service: str, gate: str | None = None) -> str:
    """A service: it answers when its gate is open."""
    here = durable.current()
    note("asked", run=here.run_id, service=service, key=here.idempotency_key)
    if gate is not None:
        # Not in the run's own thread: others need that.
        await asyncio.to_thread(wait_at, gate)
    await sync_to_async(reach)(f"{service} answers")
    return f"{service} answered"


@durable.step
def book(what: str) -> str:
    Ledger.objects.create(key=f"{durable.current().run_id}/{what}")
    reach(f"{what} booked")
    return what


@durable.workflow
async def order(slow_gate: str) -> list[Any]:
    async def fast() -> list[str]:
        return [await ask("fast"), await book.acall("fast"), await ask("faster"), await book.acall("faster")]

    async def slow() -> list[str]:
        return [await ask("slow", slow_gate), await book.acall("slow")]

    answers = await asyncio.gather(fast(), slow())
    message = await durable.areceive("paid")
    return [*answers, message, await ask("last")]
