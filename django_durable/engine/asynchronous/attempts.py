"""What a call of an async body does when its turn has come, and again each time that it is looked at."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from django_durable.engine.asynchronous.threads import in_thread
from django_durable.engine.calls import Slot, at_work_for, slot_of
from django_durable.engine.context import current_body, inside


class ExecuteOnLoop(BaseException):
    """In the thread of an async call, another async workflow is to be executed: the loop does that, and asks again."""

    def __init__(self, execution: Callable[[], Awaitable[Any]]) -> None:
        self.execution = execution
        super().__init__("an async workflow is executed on the loop")


def hands_over() -> bool:
    """Whether this thread is at work for a call of an async body, whose loop can execute an async child."""
    context = current_body()
    return context is not None and slot_of(context) is not None


class Attempts:
    """The looks of a call whose work is done in the run's thread."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.function = function

    async def attempt(self, slot: Slot) -> Any:
        def work() -> Any:
            with at_work_for(slot):
                return self.function()

        while True:
            try:
                return await in_thread(work)
            except ExecuteOnLoop as child:
                if slot.call is not None and slot.call.recorded is not None:
                    slot.context.recorded[slot.position] = slot.call.recorded
                # What the child's execution asks for itself is no query of this body.
                with inside(slot.context, busy=True):
                    await child.execution()

    async def stop(self) -> None:
        """The body does not want it any more. What a thread is at work for cannot be stopped."""
