"""`send`, `receive`: what others tell a run, in order, each message once."""

from __future__ import annotations

from collections.abc import Coroutine
from datetime import timedelta
from typing import Any

from asgiref.sync import markcoroutinefunction

from django_durable.conf import as_seconds, check_text
from django_durable.engine import endings, mailbox, payloads
from django_durable.engine.asynchronous.awaitables import awaitable
from django_durable.engine.calls import Awaited, Call, body
from django_durable.engine.checkpoints import Outcome
from django_durable.engine.context import current_body
from django_durable.handles import RunHandle, run_address
from django_durable.states import StepKind, StepStatus


def send(run: RunHandle | str, message: Any, topic: str | None = None, key: str | None = None) -> None:
    """Send a message to a run, in the caller's transaction; it waits there until the run calls `receive`.

    `run`: a handle, or an id. `topic`: 1 to 200 characters, or None. `key`: 1 to 200 characters; a further message
    with it to the same run and topic is dropped, also after the first was read. From a workflow's body it is sent
    exactly once. A run that has ended stores it and never reads it. Raises `RunNotFound`, and `SerializationError`
    for what cannot be stored.
    """
    alias, run_id = run_address(run, "send()")
    topic = _checked(topic, "topic") or ""
    key = _checked(key, "key")
    context = current_body()
    if context is None:
        mailbox.put(alias, run_id, topic, payloads.dump(message, f"A message to run {run_id}"), key)
        return
    call = Call(context, f"send {topic}".strip(), StepKind.SEND)
    if not call.done:
        text = payloads.dump(message, call.place)
        if alias != context.alias and key is None:
            # Another database's commit is not ours: what a crash in between repeats is dropped there.
            key = f"{context.run_id}:{call.position}"[-200:]

        def act() -> Outcome:
            mailbox.put(alias, run_id, topic, text, key)
            return Outcome(StepStatus.SUCCEEDED, output=payloads.dump(None, call.place))

        call.commit(act)
    call.answer()


def receive(topic: str | None = None, timeout: float | timedelta | None = None, default: Any = None) -> Any:
    """Return the next message to this run under the topic: first in, first out, each exactly once.

    The run is WAITING while there is none. After `timeout` (seconds or timedelta; 0 looks once, None waits without
    limit) it returns `default`. Raises NotInWorkflow outside a workflow's body.
    """
    context = body("receive")
    topic = _checked(topic, "topic") or ""
    seconds = None if timeout is None else as_seconds(timeout, "timeout")
    call = Call(context, f"receive {topic}".strip(), StepKind.RECEIVE)
    if call.done:
        return call.answer()
    return call.wait(
        lambda: mailbox.take(context.alias, context.run_id, topic, call.position),
        lambda: Awaited(endings.message_key(topic)),
        timeout=seconds,
        otherwise=lambda: Outcome(StepStatus.SUCCEEDED, output=payloads.dump(default, call.place)),
    )


@markcoroutinefunction
def asend(
    run: RunHandle | str, message: Any, topic: str | None = None, key: str | None = None
) -> Coroutine[Any, Any, None]:
    """See send()."""
    return awaitable("asend", send, run, message, topic, key)


@markcoroutinefunction
def areceive(
    topic: str | None = None, timeout: float | timedelta | None = None, default: Any = None
) -> Coroutine[Any, Any, Any]:
    """See receive()."""
    return awaitable("areceive", receive, topic, timeout, default)


def _checked(value: str | None, name: str) -> str | None:
    if value is not None:
        check_text(name, value, 200)
    return value
