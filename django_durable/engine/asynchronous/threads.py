"""The thread that holds a run: the database work of its async body is sent there, and what came of it back."""

from __future__ import annotations

import queue
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import asynccontextmanager, contextmanager
from typing import Any, NamedTuple, TypeVar

from asgiref.sync import AsyncToSync, SyncToAsync, ThreadSensitiveContext, sync_to_async

T = TypeVar("T")


class Lane(Executor):
    """Executes what is submitted in the thread that calls `serve`."""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._closed = False

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        if self._closed:
            raise RuntimeError("The run that this code belonged to has ended, and its thread is not there any more.")
        future: Future[Any] = Future()

        def work() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                value = fn(*args, **kwargs)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(value)

        self._work.put(work)
        return future

    def close(self) -> None:
        self._closed = True
        self._work.put(None)

    def serve(self) -> None:
        while (work := self._work.get()) is not None:
            work()


@contextmanager
def own_loop() -> Iterator[None]:
    """What asgiref knows of this thread's loop is as before behind the block: a later async_to_sync() is not ours."""
    known = SyncToAsync.threadlocal
    before = {name: getattr(known, name) for name in ("main_event_loop", "main_event_loop_pid") if hasattr(known, name)}
    try:
        yield
    finally:
        for name in ("main_event_loop", "main_event_loop_pid"):
            if name in before:
                setattr(known, name, before[name])
            elif hasattr(known, name):
                delattr(known, name)


@asynccontextmanager
async def database_thread(lane: Lane) -> AsyncIterator[None]:
    """Thread-sensitive calls of the block's code go to the lane."""
    try:
        around = ThreadSensitiveContext(executor=lane)
    except TypeError:
        # asgiref before 3.13 has no such argument. This is what it does.
        around = ThreadSensitiveContext()
        token = SyncToAsync.thread_sensitive_context.set(around)
        SyncToAsync.context_to_thread_executor[around] = lane  # type: ignore[assignment, unused-ignore]
        AsyncToSync.executors.current = None
        try:
            yield
        finally:
            SyncToAsync.context_to_thread_executor.pop(around, None)
            SyncToAsync.thread_sensitive_context.reset(token)
    else:
        async with around:
            yield


class Result(NamedTuple):
    """What a function returned or raised: a Future refuses StopIteration, and would cancel who awaits it."""

    value: Any = None
    error: BaseException | None = None

    def get(self) -> Any:
        if self.error is not None:
            raise self.error
        return self.value


async def result_of(coroutine: Awaitable[Any]) -> Result:
    try:
        return Result(await coroutine)
    except BaseException as error:
        return Result(error=error)


async def in_thread(function: Callable[[], T]) -> T:
    """Call it in the run's database thread."""

    def call() -> Result:
        try:
            return Result(function())
        except BaseException as error:
            return Result(error=error)

    result = await sync_to_async(call, thread_sensitive=True)()
    value: T = result.get()
    return value
