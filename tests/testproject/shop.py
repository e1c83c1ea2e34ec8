"""The shop with its payment service, opened as an operator would, and asked as a visitor does: over HTTP."""

from __future__ import annotations

import json
import re
import socket
import sqlite3
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.testproject.processes import payment_service, run, started

DEADLINE = 90  # seconds, for what takes a few on an idle machine

LOOK = """
import json
from shop.models import Order, Ticket
from django_durable.models import WorkflowRun
print(json.dumps({
    "orders": [[order.public_id, order.status, order.seats] for order in Order.objects.prefetch_related("tickets")],
    "tickets": [[ticket.seat, ticket.status, ticket.holder and str(ticket.holder)]
                for ticket in Ticket.objects.filter(event=1).select_related("holder")],
    "runs": dict(WorkflowRun.objects.values_list("id", "status")),
}))
"""


class Shop:
    """A shop without a worker yet, seen through its pages, and through its own settings."""

    def __init__(self, url: str, env: dict[str, str]) -> None:
        self.url = url
        self.env = env

    def post(self, page: str, action: str, **fields: Any) -> str:
        """Post the form of a page; return where that leads."""
        with httpx.Client(base_url=self.url, trust_env=False, timeout=60) as client:
            html = client.get(page).raise_for_status().text
            hidden = dict(re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)"', html))
            answer = client.post(action, data={**hidden, **fields})
            assert answer.status_code == 302, answer.text
            return answer.headers["Location"]

    def buy(self, email: str, seats: list[str]) -> str:
        return self.post("/events/1/", "/events/1/buy/", email=email, seat=seats, card="tok_4242")

    def wait(self, email: str) -> str:
        return self.post("/events/1/", "/events/1/wait/", email=email, card="tok_4242")

    def cancel(self, order: str) -> str:
        return self.post(order, f"{order}cancel/")

    def worker(self) -> Any:
        return started("manage.py", "durable_worker", **self.env)

    def look(self) -> dict[str, Any]:
        """All there is, as the shop itself sees it."""
        done = run("manage.py", "shell", "--no-imports", "-c", LOOK, timeout=DEADLINE, **self.env)
        assert done.returncode == 0, done.stdout
        return json.loads(done.stdout)

    def wait_for(self, statuses: dict[str, int]) -> dict[str, Any]:
        """Wait until there are so many orders of these statuses; then look."""
        until = time.monotonic() + DEADLINE
        with closing(connect(self.env["DATABASE_URL"])) as connection:
            while True:
                found = dict(connection.execute("SELECT status, count(*) FROM shop_order GROUP BY status").fetchall())
                if found == statuses:
                    return self.look()
                assert time.monotonic() < until, f"After {DEADLINE} s there are not {statuses}, but {found}"
                time.sleep(0.1)


def connect(url: str) -> Any:
    if url.startswith("sqlite:"):
        return sqlite3.connect(url.removeprefix("sqlite:///"), timeout=DEADLINE)
    import psycopg

    return psycopg.connect(url, autocommit=True)


@contextmanager
def opened(tmp_path: Path, database: str) -> Iterator[Shop]:
    with ExitStack() as stack:
        payments = stack.enter_context(payment_service(tmp_path / "ledger.sqlite3", "--faults", "0"))
        env = {"SHOP_VAR": str(tmp_path), "DATABASE_URL": database, "PAYMENTS_URL": payments}
        for command in (["migrate", "--verbosity=0"], ["seed_shop"]):
            done = run("manage.py", *command, timeout=60, **env)
            assert done.returncode == 0, done.stdout
        with closing(socket.socket()) as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        web = stack.enter_context(started("manage.py", "runserver", "--noreload", address, **env))
        shop = Shop(f"http://{address}", env)
        while True:
            try:
                httpx.get(shop.url, trust_env=False, timeout=30)
                break
            except httpx.ConnectError:
                assert web.poll() is None, "the web server has ended"
                time.sleep(0.05)
        yield shop
