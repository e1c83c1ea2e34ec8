"""A run's status and progress on users' own pages: what a token opens, and what it does not."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from enum import Enum

import pytest
from asgiref.testing import ApplicationCommunicator
from django.core import signing
from django.core.asgi import get_asgi_application
from django.db import connections
from django.db.backends.signals import connection_created
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import reverse
from django.utils import translation

import django_durable as durable
from django_durable import views
from django_durable.engine import tokens
from django_durable.models import StepCheckpoint, WorkflowRun
from django_durable.testing import run_until_idle
from tests.threads import elsewhere

pytestmark = pytest.mark.urls("tests.progress_site")

EVIL = "</script><script>alert(1)</script>\r\n\r\nevent: end\n\u2028data: {}"


class Colour(Enum):
    RED = "red"


@dataclass(frozen=True)
class Seat:
    row: str
    number: int


@durable.workflow(name="tests.views.order")
def order(secret: str = "a secret") -> str:
    durable.set_event("price", Decimal("49.50"))
    durable.set_event("internal", secret)
    durable.stream("progress").write("packed")
    durable.run_step("charge", lambda: secret)
    durable.stream("log").write(secret)
    durable.receive("shipped " + secret)
    durable.stream("progress").write(EVIL)
    durable.stream("progress").close()
    return secret


@pytest.fixture
def waiting(db: None) -> durable.RunHandle:
    """An order that waits for its message."""
    run = order.start()
    run_until_idle()
    assert run.status == "WAITING"
    return run


def finish(run: durable.RunHandle) -> None:
    run.send("on its way", "shipped a secret")
    run_until_idle()
    assert run.status == "SUCCEEDED"


def status_of(token: str) -> dict:
    response = Client().get(reverse("durable:status", args=[token]))
    assert response.status_code == 200, response.content
    assert response["Content-Type"] == "application/json"
    assert response["Cache-Control"] == "no-store"
    return json.loads(response.content)


def events(text: str) -> list[tuple[str, object]]:
    """What a browser's EventSource makes of a text: (event, data)."""
    found = []
    for block in text.replace("\r\n", "\n").replace("\r", "\n").split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n") if ": " in line)
        if "data" in fields:
            found.append((fields.get("event", "message"), json.loads(fields["data"])))
    return found


def last_id(text: str) -> str:
    return [line.removeprefix("id: ") for line in text.splitlines() if line.startswith("id: ")][-1]


def progress_of(token: str, last_event_id: str = "") -> str:
    """One answer, as a server gives it that has a single thread."""
    headers = {"Last-Event-ID": last_event_id} if last_event_id else {}
    response = Client().get(reverse("durable:progress", args=[token]), headers=headers)
    assert response.status_code == 200, response.content
    return b"".join(response.streaming_content).decode()


# -- Tokens -----------------------------------------------------------------------------------------------------


def test_a_token_permits_what_it_names_and_nothing_else():
    handle = durable.RunHandle("some run", "other")
    assert tokens.read(handle.token()) == ("other", "some run", (), ())
    token = handle.token(60, events=["b", "a"], streams=("progress", "progress"))
    assert tokens.read(token) == ("other", "some run", ("a", "b"), ("progress",))


@pytest.mark.parametrize("view", ["status", "progress"])
def test_a_token_that_is_not_ours_says_nothing_about_any_run(waiting, view):
    genuine = waiting.token()
    tampered = genuine[:-3] + ("abc" if not genuine.endswith("abc") else "abd")
    wrong = {
        "tampered": tampered,
        "expired": waiting.token(max_age=0),
        "another salt": signing.dumps(["default", waiting.id, None, [], []]),
        "another key": signing.dumps(["default", waiting.id, None, [], []], key="another", salt=tokens.SALT),
        "another database": durable.RunHandle(waiting.id, "nowhere").token(),
        "the id": waiting.id,
        "noise": "\ud7ff::é\0",
    }
    answers = {}
    for name, token in wrong.items():
        response = Client().get(reverse(f"durable:{view}", args=[token]))
        assert response.status_code == 403, name
        assert waiting.id not in response.content.decode() + str(response.headers), name
        answers[response.content] = name
    assert len(answers) == 1, "the answers tell one wrong token from another"


@pytest.mark.parametrize("view", ["status", "progress"])
def test_a_token_ends_with_its_time(waiting, view, monkeypatch):
    token = waiting.token(max_age=timedelta(minutes=5))
    address = reverse(f"durable:{view}", args=[token])
    now = views.time.time()
    for later, answer in ((299, 200), (301, 403)):
        monkeypatch.setattr(tokens.time, "time", lambda later=later: now + later)
        assert Client().get(address).status_code == answer


@pytest.mark.parametrize("view", ["status", "progress"])
def test_a_run_that_was_pruned_is_gone(db, view):
    response = Client().get(reverse(f"durable:{view}", args=[durable.RunHandle("pruned", "default").token()]))
    assert response.status_code == 404
    assert "pruned" not in response.content.decode()


@pytest.mark.parametrize("view", ["status", "progress"])
def test_nothing_but_get(waiting, view):
    address = reverse(f"durable:{view}", args=[waiting.token()])
    for method in ("post", "put", "patch", "delete", "head", "options"):
        assert getattr(Client(), method)(address).status_code == 405, method


def test_a_token_of_nonsense_is_refused_when_it_is_made():
    handle = durable.RunHandle("some run", "default")
    for arguments in ({"max_age": "soon"}, {"events": "a text"}, {"streams": [3]}):
        with pytest.raises(TypeError):
            handle.token(**arguments)
    for arguments in ({"max_age": -1}, {"events": [""]}, {"streams": ["x" * 201]}):
        with pytest.raises(ValueError, match="takes"):
            handle.token(**arguments)


# -- The status -------------------------------------------------------------------------------------------------


def test_the_status_tells_how_far_the_run_is(waiting):
    found = status_of(waiting.token())
    assert found["id"] == waiting.id
    assert (found["workflow"], found["status"], found["status_label"]) == ("tests.views.order", "WAITING", "waiting")
    assert (found["finished"], found["waiting_for"], found["note"]) == (False, "message", "Waits for a message")
    assert found["finished_at"] is None
    assert datetime.fromisoformat(found["created_at"]) <= datetime.fromisoformat(found["started_at"])
    steps = [(step["position"], step["name"], step["kind"], step["status"]) for step in found["steps"]]
    assert steps[3:5] == [(4, "charge", "step", "SUCCEEDED"), (5, "stream log", "stream", "SUCCEEDED")]
    assert steps[5][2:] == ("receive", "WAITING")
    assert found["steps"][5]["finished_at"] is None

    finish(waiting)
    found = status_of(waiting.token())
    assert (found["status"], found["finished"], found["waiting_for"], found["note"]) == ("SUCCEEDED", True, "", "")
    assert datetime.fromisoformat(found["finished_at"])


def test_no_payload_is_in_an_answer_that_does_not_name_it(db):
    secret = "c4rd-numb3r"
    run = order.start(secret)
    run_until_idle()
    # A message's topic is a step's name, and names are shown; what it waits for is shown in words.
    WorkflowRun.objects.filter(pk=run.id).update(error=secret, exception=secret, cancel_reason=secret)
    StepCheckpoint.objects.filter(run=run.id).update(error=secret, exception=secret)
    StepCheckpoint.objects.filter(run=run.id, kind="receive").update(name="receive")
    token = run.token(streams=["progress"], events=["price"])
    assert secret not in json.dumps(status_of(token))
    assert secret not in progress_of(token)
    # The test would have seen it.
    assert secret in json.dumps(status_of(run.token(events=["internal"])))
    assert secret in progress_of(run.token(streams=["log"]))


def test_events_and_streams_are_there_for_those_who_may_see_them(waiting):
    token = waiting.token(events=["price", "not set yet"], streams=["progress", "not written yet"])
    found = status_of(token)
    assert found["events"] == {"price": "49.50"}
    assert found["streams"] == {
        "not written yet": {"values": [], "closed": False},
        "progress": {"values": [{"position": 1, "value": "packed"}], "closed": False},
    }
    finish(waiting)
    closed = status_of(token)["streams"]["progress"]
    assert closed == {
        "values": [{"position": 1, "value": "packed"}, {"position": 2, "value": EVIL}],
        "closed": True,
    }
    plain = status_of(waiting.token())
    assert (plain["events"], plain["streams"]) == ({}, {})


def test_every_kind_of_value_has_a_form_that_a_browser_reads(waiting):
    values = [
        (float("nan"), None),
        (1.5, 1.5),
        ({"a": (1, {2})}, {"a": [1, [2]]}),
        ({Colour.RED: Seat("B", 12)}, {"red": {"row": "B", "number": 12}}),
        (datetime(2026, 11, 20, 12, tzinfo=UTC), "2026-11-20T12:00:00Z"),
        (b"\xff", "b'\\xff'"),
        (waiting, waiting.id),
        (ValueError("no"), "no"),
        ("\ud83d", "\ud83d"),
        (None, None),
    ]
    for value, wanted in values:
        assert json.loads(views.as_json(views.plain(value))) == wanted


def test_a_long_run_shows_its_latest_steps(db):
    @durable.workflow(name="tests.views.long")
    def long() -> None:
        for number in range(views.LATEST + 5):
            durable.run_step(f"step {number}", int)
            durable.run_step("more", int)

    run = long.start()
    run_until_idle()
    found = status_of(run.token())
    assert len(found["steps"]) == views.LATEST
    assert found["earlier_steps"] == 2 * (views.LATEST + 5) - views.LATEST
    assert [step["position"] for step in found["steps"]][-1] == 2 * (views.LATEST + 5)


def test_a_page_follows_into_the_run_that_goes_on(db):
    first, last = order.start(), order.start()
    run_until_idle()
    WorkflowRun.objects.filter(pk=first.id).update(status="SUCCEEDED", continued_as=last.id)
    token = first.token(streams=["progress"])
    found = status_of(token)
    assert (found["id"], found["status"]) == (last.id, "WAITING")
    assert found["streams"]["progress"]["values"] == [{"position": 2, "value": "packed"}]
    assert [data["position"] for name, data in events(progress_of(token)) if name == "value"] == [1]
    assert [data["position"] for name, data in events(progress_of(token, "x-1")) if name == "value"] == [2]


def test_words_are_in_the_visitors_language(waiting):
    with translation.override("de"):
        # Django's own catalogue has the word.
        translated = translation.gettext("Refresh")
        assert status_of(waiting.token())["note"] == translation.gettext("Waits for a message")
    assert translated


def test_one_look_at_a_run_costs_two_queries(waiting, django_assert_num_queries):
    token = waiting.token()
    with django_assert_num_queries(2):
        status_of(token)
    with django_assert_num_queries(2):
        progress_of(token)


# -- Server-sent events -----------------------------------------------------------------------------------------


def test_the_events_carry_the_status_and_every_value(waiting):
    token = waiting.token(streams=["progress"])
    text = progress_of(token)
    assert text.startswith("retry: ")
    (name, found), *values = events(text)
    assert name == "status"
    assert found["status"] == "WAITING"
    assert values == [("value", {"key": "progress", "position": 1, "value": "packed"})]

    finish(waiting)
    (name, found), *rest = events(progress_of(token, last_id(text)))
    assert (name, found["status"]) == ("status", "SUCCEEDED")
    assert rest == [
        ("value", {"key": "progress", "position": 2, "value": EVIL}),
        ("closed", {"key": "progress"}),
        ("end", {}),
    ]


def test_a_browser_that_asks_again_is_sent_only_what_is_new(waiting):
    token = waiting.token(streams=["progress"])
    seen = last_id(progress_of(token))
    assert events(progress_of(token, seen)) == []
    with_query = Client().get(reverse("durable:progress", args=[token]), {"after": seen})
    assert events(b"".join(with_query.streaming_content).decode()) == []


def test_a_browser_that_has_all_of_it_is_told_not_to_ask_again(waiting):
    token = waiting.token(streams=["progress"])
    finish(waiting)
    seen = last_id(progress_of(token))
    response = Client().get(reverse("durable:progress", args=[token]), headers={"Last-Event-ID": seen})
    assert response.status_code == 204


@pytest.mark.parametrize("wrong", ["", "x", "x-", "x--1", "x-1-1", "x-99999999999", "-" * 50, "x-²", "é\r\n"])
def test_an_event_id_of_nonsense_is_one_that_was_never_sent(waiting, wrong):
    token = waiting.token(streams=["progress"])
    response = Client().get(reverse("durable:progress", args=[token]), {"after": wrong})
    assert events(b"".join(response.streaming_content).decode())[0][0] == "status"


def test_no_value_ends_an_event_or_begins_another(waiting):
    finish(waiting)
    StepCheckpoint.objects.filter(run=waiting.id, position=4).update(name=EVIL)
    text = progress_of(waiting.token(streams=["progress"]))
    found = events(text)
    assert [name for name, _ in found] == ["status", "value", "value", "closed", "end"]
    assert found[0][1]["steps"][3]["name"] == EVIL
    assert text.isascii()
    assert "\r" not in text


def test_the_answer_is_one_that_no_proxy_keeps(waiting):
    response = Client().get(reverse("durable:progress", args=[waiting.token()]))
    assert response["Content-Type"] == "text/event-stream"
    assert response["Cache-Control"] == "no-store"
    assert response["X-Accel-Buffering"] == "no"
    response.close()


class Opened:
    """The parts of an answer as they come, from a server with threads."""

    def __init__(self, token: str, *, multithread: bool = True) -> None:
        address = reverse("durable:progress", args=[token])
        response = Client().get(address, **{"wsgi.multithread": multithread})
        self.parts = iter(response.streaming_content)
        self.close = response.close

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self.parts).decode()


@pytest.mark.django_db(transaction=True)
def test_a_page_sees_a_run_go_on_while_it_is_open():
    run = order.start()
    parts = Opened(run.token(streams=["progress"]))
    assert events(next(parts))[0][1]["status"] == "PENDING"
    elsewhere(run_until_idle)
    (_, found), value = events(next(parts))
    assert found["status"] == "WAITING"
    assert value[1]["value"] == "packed"
    elsewhere(lambda: finish(run))
    rest = [event for part in parts for event in events(part)]
    assert [name for name, _ in rest] == ["status", "value", "closed", "end"]


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("atomic_requests", [False, True])
def test_an_open_page_holds_no_connection_and_no_transaction_between_two_looks(atomic_requests, monkeypatch):
    run = order.start()
    held: list[object] = []

    def page() -> None:
        monkeypatch.setitem(connections["default"].settings_dict, "ATOMIC_REQUESTS", atomic_requests)
        parts = Opened(run.token())
        next(parts)
        held.append(connections["default"].connection)
        elsewhere(run_until_idle)
        next(parts)
        held.append(connections["default"].connection)
        elsewhere(lambda: finish(run))
        held.extend(connections["default"].connection for _ in parts)

    elsewhere(page)
    assert len(held) >= 3
    assert not any(held)


@pytest.mark.django_db(transaction=True)
def test_a_kept_connection_is_kept(monkeypatch):
    """CONN_MAX_AGE: the project wants its threads to have one."""
    run = order.start()

    def page() -> object:
        monkeypatch.setitem(connections["default"].settings_dict, "CONN_MAX_AGE", None)
        parts = Opened(run.token())
        next(parts)
        held = connections["default"].connection
        parts.close()
        return held

    assert elsewhere(page) is not None


@pytest.mark.django_db(transaction=True)
def test_open_pages_leave_threads_to_the_rest_of_the_site(monkeypatch):
    """What is not held open is answered at once, and its browser asks again."""
    run = order.start()
    token = run.token()
    held = [Opened(token) for _ in range(views.MAX_OPEN)]
    assert {next(parts).split("\n")[0] for parts in held} == {f"retry: {views.RETRY}"}
    further = list(Opened(token))
    assert len(further) == 1
    assert further[0].startswith(f"retry: {views.RETRY_POLLING}\n")
    held.pop().close()
    again = Opened(token)
    assert next(again).startswith(f"retry: {views.RETRY}\n")
    again.close()
    for parts in held:
        parts.close()
    assert len(list(Opened(token, multithread=False))) == 1


@pytest.mark.django_db(transaction=True)
def test_an_answer_ends_after_a_while_and_says_so_in_between(monkeypatch):
    monkeypatch.setattr(views, "DURATION", 0.5)
    monkeypatch.setattr(views, "KEEP_ALIVE", 0.1)
    run = order.start()
    parts = list(Opened(run.token()))
    assert len(parts) > 1
    assert set(parts[1:]) == {":\n\n"}


@pytest.mark.django_db(transaction=True)
def test_a_run_that_is_pruned_while_a_page_is_open_has_ended():
    run = order.start()
    parts = Opened(run.token())
    next(parts)
    elsewhere(lambda: WorkflowRun.objects.all().delete())
    assert events("".join(parts)) == [("end", {})]


@pytest.mark.django_db
def test_in_a_test_of_the_users_an_open_page_does_not_wait():
    run = order.start()
    assert len(list(Opened(run.token()))) == 1


# -- Under ASGI -------------------------------------------------------------------------------------------------


class Page:
    """A page that is open at an ASGI server."""

    def __init__(self, application, address: str) -> None:
        scope = {
            "type": "http", "http_version": "1.1", "method": "GET", "path": address, "query_string": b"",
            "headers": [(b"host", b"testserver")],
        }  # fmt: skip
        self.connection = ApplicationCommunicator(application, scope)
        self.text = ""

    async def open(self) -> None:
        await self.connection.send_input({"type": "http.request"})
        start = await self.connection.receive_output(timeout=20)
        assert start["status"] == 200
        await self.read_until("event: status")

    async def read_until(self, wanted: str) -> None:
        while wanted not in self.text:
            part = await self.connection.receive_output(timeout=20)
            self.text += part["body"].decode()

    async def leave(self) -> None:
        await self.connection.send_input({"type": "http.disconnect"})
        await self.connection.wait(timeout=20)


@pytest.fixture
def open_connections() -> Iterator[Callable[[], int]]:
    """Counts the connections that were opened since and not closed."""
    made: list[object] = []

    def note(connection: object, **kwargs: object) -> None:
        made.append(connection)

    connection_created.connect(note)
    yield lambda: len({id(wrapper) for wrapper in made if wrapper.connection is not None})
    connection_created.disconnect(note)


@pytest.mark.django_db(transaction=True)
def test_many_open_pages_cost_an_asgi_server_no_connection_and_do_not_block_it(open_connections):
    """Forty pages, of which half leave; the loop goes on turning, and the others see the end."""
    run = order.start()
    address = reverse("durable:progress", args=[run.token()])

    async def serve() -> tuple[int, list[int]]:
        application = get_asgi_application()
        pages = [Page(application, address) for _ in range(40)]
        turns = 0

        async def turn() -> None:
            nonlocal turns
            while True:
                await asyncio.sleep(0)
                turns += 1

        turning = asyncio.create_task(turn())
        await asyncio.gather(*(page.open() for page in pages))
        opened_at = turns
        await asyncio.to_thread(elsewhere, run_until_idle)
        await asyncio.gather(*(page.read_until('"WAITING"') for page in pages))
        turns_meanwhile = turns - opened_at
        held = []
        for _ in range(30):
            await asyncio.sleep(0.02)
            held.append(open_connections())
        for page in pages[:20]:
            await page.leave()
        await asyncio.to_thread(elsewhere, lambda: finish(run))
        await asyncio.gather(*(page.read_until("event: end") for page in pages[20:]))
        # What the server keeps for a request is closed behind its last byte.
        await asyncio.gather(*(page.connection.wait(timeout=20) for page in pages[20:]))
        turning.cancel()
        return turns_meanwhile, held

    turns, held = elsewhere(lambda: asyncio.run(serve()))
    assert turns > 40
    # Those of looks that are under way, in the loop's few threads, and of the one that has just ended.
    assert max(held) <= min(32, (os.cpu_count() or 1) + 4) + 1


@pytest.mark.django_db(transaction=True)
def test_a_look_opens_no_transaction_under_atomic_requests(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    run = order.start()
    run_until_idle()
    monkeypatch.setitem(connections["default"].settings_dict, "ATOMIC_REQUESTS", True)
    with CaptureQueriesContext(connections["default"]) as queries:
        assert client.get(reverse("durable:status", args=[run.token()])).status_code == 200
    assert len(queries) > 0
    assert not [query["sql"] for query in queries if query["sql"].startswith("BEGIN")]
