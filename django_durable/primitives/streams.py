"""`stream`: ordered values out of a run while it runs, and their reader."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextvars import ContextVar
from datetime import timedelta
from typing import Any

from asgiref.sync import markcoroutinefunction, sync_to_async
from django.db import connections

from django_durable.conf import as_seconds, check_text
from django_durable.engine import operations, payloads, streams
from django_durable.engine.asynchronous.awaitables import awaitable
from django_durable.engine.calls import Call
from django_durable.engine.checkpoints import Outcome
from django_durable.engine.context import StepContext, current_body, current_step
from django_durable.exceptions import DurableError, InsideTransaction, NotInWorkflow
from django_durable.serialization import describe_exception, dump_exception
from django_durable.states import StepKind, StepStatus

# The streams that this try of a step has closed: what an earlier try has closed is open again.
_closed_here: ContextVar[tuple[StepContext, frozenset[str]] | None] = ContextVar("durable_closed_here", default=None)


class Stream:
    """One of the running workflow's streams; see `stream`."""

    __slots__ = ("key",)

    def __init__(self, key: str) -> None:
        self.key = key

    def __repr__(self) -> str:
        return f"<Stream {self.key!r}>"

    def write(self, value: Any) -> None:
        """Append a value. From a workflow's body, and in an atomic step, exactly once, with the commit.

        From a step with ``atomic=False`` it is seen at once, and a further try of that step writes again. Raises
        ValueError if the stream is closed, NotInWorkflow outside a run, and SerializationError.
        """
        self._append("write", f"stream {self.key}", lambda place: payloads.dump(value, place))

    def close(self) -> None:
        """End the stream: its readers end, and nothing can be written to it any more. Otherwise as `write`."""
        self._append("close", f"close stream {self.key}", lambda place: streams.CLOSED)

    @markcoroutinefunction
    def awrite(self, value: Any) -> Coroutine[Any, Any, None]:
        """See write()."""
        return awaitable("awrite", self.write, value)

    @markcoroutinefunction
    def aclose(self) -> Coroutine[Any, Any, None]:
        """See close()."""
        return awaitable("aclose", self.close)

    def _append(self, verb: str, name: str, text_for: Callable[[str], str]) -> None:
        context, step = current_body(), current_step()
        if step is not None:
            place = f"Run {step.run.run_id}, step {step.position} ({step.name}), a value of stream {self.key!r}"
            if not self._append_in_step(step, text_for(place)):
                raise self._closed(step.run.run_id)
            return
        if context is None:
            raise NotInWorkflow(f"stream().{verb}()")
        call = Call(context, name, StepKind.STREAM)
        if not call.done:
            text = text_for(call.place)
            call.commit(lambda: self._append_in_call(call, text))
        call.answer()

    def _append_in_call(self, call: Call, text: str) -> Outcome:
        context = call.context
        if streams.append(context.alias, context.run_id, self.key, text, call.position):
            return Outcome(StepStatus.SUCCEEDED, output=payloads.dump(None, call.place))
        error = self._closed(context.run_id)
        return Outcome(StepStatus.FAILED, error=describe_exception(error), exception=dump_exception(error))

    def _append_in_step(self, step: StepContext, text: str) -> bool:
        run = step.run
        by, closed = _closed_here.get() or (None, frozenset[str]())
        closed = closed if by is step else frozenset()
        reopens = self.key not in closed
        if step.atomic and connections[run.alias].in_atomic_block:
            # The step's checkpoint is the fence, at the end of the same transaction.
            written = streams.append(run.alias, run.run_id, self.key, text, step.position, reopens=reopens)
        else:
            written = streams.append_alone(run, self.key, text, step.position, reopens=reopens)
        if written and text == streams.CLOSED:
            _closed_here.set((step, closed | {self.key}))
        return written

    def _closed(self, run_id: str) -> ValueError:
        return ValueError(
            f"Stream {self.key!r} of run {run_id} is closed: nothing can be written to it any more. Close it behind "
            "the last value, or write to a stream of another key."
        )


def stream(key: str) -> Stream:
    """Return the running workflow's stream of this key, 1 to 200 characters, to write to."""
    check_text("key", key, 200)
    return Stream(key)


# What a reader finds where there is no value yet: None is one.
_NOTHING = object()


class StreamReader:
    """Iterates over the values of a run's stream, with ``for`` or ``async for``; see `RunHandle.stream`.

    `position` is that of the latest value, from 1. `over`: nothing more will come, because the stream is closed or
    the run has ended.
    """

    def __init__(self, database: str, run_id: str, key: str, after: int, timeout: float | timedelta | None) -> None:
        check_text("key", key, 200)
        if isinstance(after, bool) or not isinstance(after, int):
            raise TypeError(f"after takes a position (a whole number), found {type(after).__name__}: {after!r}.")
        if after < 0:
            raise ValueError(f"after takes a position, 0 or more, found {after}.")
        self.position = after
        self._what = f"stream {key!r} of run {run_id}"
        self._timeout = None if timeout is None else as_seconds(timeout, "timeout")
        self._place = streams.Place(database, run_id, key, after)
        self._read: deque[tuple[int, str]] = deque()

    @property
    def over(self) -> bool:
        return self._place.over and not self._read

    def __iter__(self) -> Iterator[Any]:
        return self

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    def __next__(self) -> Any:
        started = time.monotonic()
        for pause in operations.pauses():
            if (value := self._look()) is not _NOTHING:
                return value
            if (left := self._left(started)) <= 0:
                raise StopIteration
            time.sleep(min(pause, left))
        raise AssertionError("unreachable: pauses() has no end")

    async def __anext__(self) -> Any:
        started = time.monotonic()
        for pause in operations.pauses():
            if (value := await sync_to_async(self._look)()) is not _NOTHING:
                return value
            if (left := self._left(started)) <= 0:
                raise StopAsyncIteration
            await asyncio.sleep(min(pause, left))
        raise AssertionError("unreachable: pauses() has no end")

    def _look(self) -> Any:
        """The next value, if it is there; raise what keeps this reader from waiting for it."""
        body = current_body()
        if body is not None:
            raise DurableError(
                f"Run {body.run_id} reads {self._what} in its body: what it finds is not recorded, and a replay would "
                "find more. Read it in a step, or let the runs talk by events and messages."
            )
        if not self._read:
            self._read.extend(self._place.read())
        if self._read:
            self.position, text = self._read.popleft()
            return payloads.load(text, f"Value {self.position} of {self._what}")
        alias = self._place.alias
        if self._timeout is None and not self._place.over and connections[alias].in_atomic_block:
            raise InsideTransaction._saying(
                f"There is nothing more yet in {self._what}, and its reader would wait without limit inside a "
                f"transaction on database {alias!r}: if the run was started in it, no worker sees it before the "
                "commit. Read behind the transaction, pass timeout=, or in a test call run_until_idle() first."
            )
        return _NOTHING

    def _left(self, started: float) -> float:
        """The seconds that may still be waited for the next value."""
        if self._place.over:
            return 0.0
        return float("inf") if self._timeout is None else started + self._timeout - time.monotonic()
