"""One run, for users' own pages: its status as JSON, and its progress as server-sent events, by a signed token.

A token is made by `RunHandle.token` and permits what it names: the run's status, the names of its steps, and the
events and streams that its maker has listed.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import fields, is_dataclass
from enum import Enum
from hashlib import sha256
from math import isfinite
from typing import Any, ParamSpec, TypeVar

from asgiref.sync import sync_to_async
from django.core.handlers.asgi import ASGIRequest
from django.core.serializers.json import DjangoJSONEncoder
from django.db import connections, transaction
from django.http import HttpRequest, HttpResponse, JsonResponse, StreamingHttpResponse
from django.utils import translation
from django.utils.translation import gettext, ngettext
from django.utils.translation import gettext_noop as _
from django.views.decorators.http import require_GET

from django_durable.engine import payloads, streams, tokens
from django_durable.engine.tokens import Permission
from django_durable.exceptions import RunNotFound
from django_durable.handles import RunHandle
from django_durable.models import Event, StepCheckpoint, WorkflowRun
from django_durable.states import FINISHED, OPEN_STEPS, RunStatus, StepStatus

P = ParamSpec("P")
R = TypeVar("R")

# The latest steps, and the latest values of a stream, that one answer holds.
LATEST = 200
# A page is served for so many seconds, then its browser asks anew: no proxy takes it for dead, and a server that
# stops does not wait for it.
DURATION = 45.0
# After so many seconds without news a comment goes out: a browser that has gone is noticed.
KEEP_ALIVE = 10.0
# The seconds between two looks: few behind news.
SHORTEST_PAUSE, LONGEST_PAUSE = 0.1, 1.0
# Under WSGI an open page holds a thread, of which a server may have four. So many may be open in a process; others,
# and all where there is only one thread, are sent what there is, and their browsers ask again.
MAX_OPEN = 2
# Milliseconds after which a browser asks again.
RETRY, RETRY_POLLING = 500, 2000

WAITING_FOR = {
    "approval": _("Waits for a decision"),
    "children": _("Waits for other runs"),
    "event": _("Waits for another run"),
    "message": _("Waits for a message"),
    "resume": _("Paused"),
    "retry": _("Will be tried again"),
    "run": _("Waits for another run"),
    "sleep": _("Waits for its time"),
    "start": _("Waits for its time"),
}

_open = threading.Semaphore(MAX_OPEN)


def _outside_transactions(view: Callable[P, R]) -> Callable[P, R]:
    """No transaction for a look, under ATOMIC_REQUESTS neither: on SQLite it would take the one write lock."""
    for alias in connections.settings:
        view = transaction.non_atomic_requests(using=alias)(view)
    return view


@_outside_transactions
@require_GET
def status(request: HttpRequest, token: str) -> HttpResponse:
    """How far a run has come, as JSON."""
    permission = tokens.read(token)
    if permission is None:
        return _refused()
    try:
        found = seen(permission)
        found["streams"] = {key: _latest(permission, key) for key in permission.streams}
    except RunNotFound:
        return _gone()
    return HttpResponse(as_json(found), content_type="application/json", headers={"Cache-Control": "no-store"})


@_outside_transactions
@require_GET
def progress(request: HttpRequest, token: str) -> HttpResponse | StreamingHttpResponse:
    """A run's progress as server-sent events, until it has ended: `status`, `value`, `closed` and `end`."""
    permission = tokens.read(token)
    if permission is None:
        return _refused()
    follower = Follower(permission, request.headers.get("Last-Event-ID") or request.GET.get("after", ""))
    try:
        first = follower.look()
    except RunNotFound:
        return _gone()
    if follower.over and not first:
        # It has all of it: so a browser is told not to ask again.
        return HttpResponse(status=204)
    parts: Any
    if isinstance(request, ASGIRequest):
        parts = _parts_async(follower, first)
    else:
        parts = _parts(follower, first, threaded=request.META.get("wsgi.multithread", True))
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingHttpResponse(parts, content_type="text/event-stream", headers=headers)


def _refused() -> HttpResponse:
    return JsonResponse({"error": gettext("This link is not valid, or not any more.")}, status=403)


def _gone() -> HttpResponse:
    return JsonResponse({"error": gettext("There is nothing to show any more.")}, status=404)


# -- What is shown ----------------------------------------------------------------------------------------------


def state(alias: str, run_id: str) -> dict[str, Any]:
    """The run, or the one that goes on for it, without any payload; raise RunNotFound."""
    shown = ("workflow", "status", "waiting_for", "created_at", "started_at", "finished_at", "continued_as")
    while True:
        run = WorkflowRun.objects.using(alias).filter(pk=run_id).only(*shown).first()
        if run is None:
            raise RunNotFound(run_id, alias)
        if not run.continued_as:
            break
        run_id = run.continued_as
    # What follows the colon may be another run's id, or a name that is nobody's business.
    waiting_for = run.waiting_for.partition(":")[0] if run.status == RunStatus.WAITING else ""
    columns = ("position", "name", "kind", "status", "attempts", "started_at", "finished_at")
    steps = StepCheckpoint.objects.using(alias).filter(run=run_id).order_by("-position").values(*columns)
    latest = [_step(row) for row in steps[:LATEST]][::-1]
    return {
        "id": run_id,
        "workflow": run.workflow,
        "status": run.status,
        "status_label": _label(RunStatus, run.status),
        "finished": run.status in FINISHED,
        "waiting_for": waiting_for,
        "note": gettext(WAITING_FOR[waiting_for]) if waiting_for in WAITING_FOR else "",
        "created_at": run.created_at,
        "started_at": run.started_at,
        "finished_at": run.finished_at,
        "earlier_steps": latest[0]["position"] - 1 if latest else 0,
        "steps": latest,
    }


def _step(row: dict[str, Any]) -> dict[str, Any]:
    attempts = row["attempts"]
    if row["status"] in OPEN_STEPS:
        row["finished_at"] = None
    row["status_label"] = _label(StepStatus, row["status"])
    row["note"] = ngettext("%(n)d attempt", "%(n)d attempts", attempts) % {"n": attempts} if attempts > 1 else ""
    return row


def _label(statuses: Any, status: str) -> str:
    return str(statuses(status).label) if status in statuses else status


def seen(permission: Permission) -> dict[str, Any]:
    """What a token permits to see, but for the streams; raise RunNotFound."""
    found = state(permission.database, permission.run_id)
    found["events"] = {}
    if permission.events:
        events = Event.objects.using(permission.database).filter(run=found["id"], key__in=permission.events)
        for key, text in events.order_by("key").values_list("key", "value"):
            found["events"][key] = _loaded(text)
    return found


def _latest(permission: Permission, key: str) -> dict[str, Any]:
    values, closed = streams.latest_values(permission.database, permission.run_id, key, LATEST)
    return {"values": [{"position": place, "value": _loaded(text)} for place, text in values], "closed": closed}


def _loaded(text: str) -> Any:
    return plain(payloads.load(text, "A value for a page"))


def plain(value: Any) -> Any:
    """What JSON has for a stored value: collections are lists, objects their fields, and what is neither is text."""
    match value:
        case Enum():
            return plain(value.value)
        case bool() | int() | str() | None:
            return value
        case float():
            # A browser takes NaN and Infinity for an error.
            return value if isfinite(value) else None
        case dict():
            return {str(key.value if isinstance(key, Enum) else key): plain(item) for key, item in value.items()}
        case list() | tuple() | set() | frozenset():
            return [plain(item) for item in value]
        case RunHandle():
            return value.id
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    try:
        return DjangoJSONEncoder().default(value)
    except TypeError:
        return str(value)


def as_json(value: Any) -> str:
    """JSON of ASCII letters in one line: no value can end an event, or a script."""
    return json.dumps(value, cls=DjangoJSONEncoder, separators=(",", ":"))


# -- Server-sent events -----------------------------------------------------------------------------------------


class Follower:
    """What one open page has been sent, and what it is sent next."""

    def __init__(self, permission: Permission, last_id: str) -> None:
        self.alias = permission.database
        self.permission = permission
        # The run has ended, and all of it is sent.
        self.over = False
        # Seconds until the next look.
        self.pause = SHORTEST_PAUSE
        # The rest of the answer is made behind the request's middleware, and partly in other threads.
        self._language = translation.get_language()
        self._spoke = time.monotonic()
        self._looked = False
        # An event's id tells how far a page is: the last state, and the positions in the streams. A browser that asks
        # again sends it.
        self._state, *places = last_id.split("-")
        known = len(places) == len(permission.streams) and all(p.isdecimal() and len(p) < 10 for p in places)
        self._sent = {key: int(places[at]) if known else 0 for at, key in enumerate(permission.streams)}
        self._places = {
            key: streams.Place(self.alias, permission.run_id, key, after) for key, after in self._sent.items()
        }

    def look(self) -> str:
        """The events to send now; a comment if there were none for long. Raises RunNotFound."""
        with translation.override(self._language):
            text = "".join(self._news())
        if self.over and (text or self._looked):
            text += self._event("end", "{}")
        self._looked, now = True, time.monotonic()
        if text:
            self.pause = SHORTEST_PAUSE
        else:
            self.pause = min(LONGEST_PAUSE, self.pause * 1.5)
            if now - self._spoke >= KEEP_ALIVE:
                text = ":\n\n"
        if text:
            self._spoke = now
        return text

    def _news(self) -> Iterator[str]:
        found = seen(self.permission)
        text = as_json(found)
        version = sha256(text.encode()).hexdigest()[:16]
        if version != self._state:
            self._state = version
            yield self._event("status", text)
        for key, place in self._places.items():
            if place.over:
                continue
            for position, value in place.read():
                self._sent[key] = position
                yield self._event("value", as_json({"key": key, "position": position, "value": _loaded(value)}))
            self._sent[key] = place.position
            if place.closed:
                yield self._event("closed", as_json({"key": key}))
        self.over = found["finished"] and all(place.over for place in self._places.values())

    def _event(self, name: str, data: str) -> str:
        where = "-".join([self._state, *map(str, self._sent.values())])
        return f"id: {where}\nevent: {name}\ndata: {data}\n\n"

    def look_again(self, *, close: bool) -> str:
        """`look`, without keeping a connection until the next one; a run that was pruned meanwhile has ended."""
        try:
            return self.look()
        except RunNotFound:
            self.over = True
            return self._event("end", "{}")
        finally:
            let_go(close=close)


def _parts(follower: Follower, text: str, *, threaded: bool) -> Iterator[str]:
    """The answer under WSGI: between two looks this thread sleeps."""
    stays = threaded and _open.acquire(blocking=False)
    try:
        # In a test's transaction nothing happens while this thread waits.
        once = not stays or connections[follower.alias].in_atomic_block
        let_go()
        until = time.monotonic() + DURATION
        yield f"retry: {RETRY if stays else RETRY_POLLING}\n\n{text}"
        while not (once or follower.over or time.monotonic() >= until):
            time.sleep(follower.pause)
            if text := follower.look_again(close=False):
                yield text
    finally:
        if stays:
            _open.release()


async def _parts_async(follower: Follower, text: str) -> AsyncIterator[str]:
    """The answer under ASGI: between two looks it costs neither a thread nor a connection."""
    # In the request's own thread, where the middleware and the first look may have left a connection open.
    once = await sync_to_async(lambda: connections[follower.alias].in_atomic_block)()
    await sync_to_async(let_go)(close=True)
    # Any thread will do, of the few that the loop has for such.
    look_again = sync_to_async(follower.look_again, thread_sensitive=False)
    until = time.monotonic() + DURATION
    yield f"retry: {RETRY}\n\n{text}"
    while not (once or follower.over or time.monotonic() >= until):
        await asyncio.sleep(follower.pause)
        if text := await look_again(close=True):
            yield text


def let_go(*, close: bool = False) -> None:
    """Close this thread's connections that are not to be kept; `close`: all, as no request of its own will use them."""
    for connection in connections.all(initialized_only=True):
        # In a test's transaction this would be the test's.
        if connection.in_atomic_block:
            continue
        if close:
            connection.close()
        else:
            connection.close_if_unusable_or_obsolete()
