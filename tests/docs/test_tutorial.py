"""The tutorial, read by somebody who types every line of it."""

from __future__ import annotations

import re
import socket
from http.cookiejar import CookieJar
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import HTTPCookieProcessor, build_opener

import pytest

from tests.docs.conftest import Reader
from tests.docs.pages import Command
from tests.docs.project import normalized, wait_for

PASSWORD = "for the tutorial"


class Browser:
    """Follows links and posts forms, with their cookies and their CSRF tokens."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.open = build_opener(HTTPCookieProcessor(CookieJar())).open
        self.url = ""

    def get(self, path: str) -> str:
        with self.open(self.address + path, timeout=30) as answer:
            self.url = answer.url
            return answer.read().decode()

    def post(self, path: str, html: str, **fields: str) -> str:
        token = re.search(r'name="csrfmiddlewaretoken" value="(\w+)"', html)
        assert token, f"There is no form in {html}"
        body = urlencode({"csrfmiddlewaretoken": token[1], **fields}).encode()
        with self.open(self.address + path, data=body, timeout=30) as answer:
            self.url = answer.url
            return answer.read().decode()


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


class Actor:
    """What the reader of the tutorial does and sees beside the commands that end by themselves."""

    def __init__(self, reader: Reader) -> None:
        self.project = reader.project
        self.port = free_port()
        self.browser = Browser(f"http://127.0.0.1:{self.port}")
        reader.types |= {
            "python manage.py runserver": self.open_the_shop,
            "python manage.py durable_worker -v 2": self.start_a_worker,
            "pkill -9 -f durable_worker": self.kill_the_worker,
            "python manage.py createsuperuser": self.become_an_admin,
        }
        reader.sees |= {
            "the first worker says": self.buy_a_ticket,
            "the second worker says": self.see_it_go_on,
        }

    def open_the_shop(self, command: Command) -> None:
        # The page's address may be taken on the machine of the tests.
        self.project.start(f"{command.line} --noreload 127.0.0.1:{self.port}")

    def start_a_worker(self, command: Command) -> None:
        self.worker = self.project.start(command.line)
        (line,) = [line.partition("INFO ")[2] for line in command.output.splitlines()]
        self.worker.wait_until_it_says(line.partition(": ")[2])

    def buy_a_ticket(self, lines: list[str]) -> None:
        home = wait_for(lambda: "the shop", lambda: self.browser.get("/"))
        assert home.count("<button") == 5
        ticket = re.search(r'Seat A1:.*?value="(\d+)"', home, re.DOTALL)[1]
        page = self.browser.post("/buy/", home, ticket=ticket, email="ada@example.com")
        self.order = self.browser.url.removeprefix(self.browser.address)
        self.run_id = self.order.split("/")[2]
        assert "Seat A1: not sold yet" in page
        self.see(lines)

    def kill_the_worker(self, command: Command) -> None:
        self.worker.kill()
        page = self.browser.get(self.order)
        assert "Your order: RUNNING" in page
        assert "reserve_ticket: SUCCEEDED" in page
        assert "charge_card: SUCCEEDED" in page
        assert "print_ticket" not in page

    def see_it_go_on(self, lines: list[str]) -> None:
        self.see(lines)
        # What was done before the crash is not done again.
        assert "reserve_ticket" not in self.worker.printed
        assert "charge_card" not in self.worker.printed
        page = self.browser.get(self.order)
        assert "Your order: SUCCEEDED" in page
        assert "Seat A1: sold to ada@example.com" in page
        ledger = (self.project.folder / "payments.log").read_text()
        assert ledger == f"charged 4900 to ada@example.com, key {self.run_id}:2\n"

    def see(self, lines: list[str]) -> None:
        """The worker prints these lines about this order, in this order, maybe others between them."""

        def printed_all() -> bool:
            printed = iter(normalized(self.worker.printed))
            return all(line in printed for line in lines)

        wait_for(lambda: "\n".join([*lines, "in", self.worker.printed]), printed_all)
        assert self.run_id in self.worker.printed

    def become_an_admin(self, command: Command) -> None:
        user = {"USERNAME": "ada", "EMAIL": "ada@example.com", "PASSWORD": PASSWORD}
        answers = {f"DJANGO_SUPERUSER_{name}": value for name, value in user.items()}
        self.project.type(Command(f"{command.line} --noinput", ""), **answers)


def test_a_checkout_in_ones_own_project_survives_kill_9(reader: Reader) -> None:
    actor = Actor(reader)
    reader.read_on()

    with pytest.raises(HTTPError, match="404"):
        actor.browser.get("/orders/no-such-order/")

    # "Open /admin/": the runs, and a run's page with its steps in their order.
    login = actor.browser.get("/admin/login/")
    actor.browser.post("/admin/login/?next=/admin/", login, username="ada", password=PASSWORD)
    assert "Durable workflows" in actor.browser.get("/admin/")
    assert actor.run_id in actor.browser.get("/admin/django_durable/workflowrun/")
    shown = actor.browser.get(f"/admin/django_durable/workflowrun/{actor.run_id}/change/")
    places = [shown.find(step) for step in ("reserve_ticket", "charge_card", "print_ticket", "mark_sold")]
    assert -1 not in places
    assert places == sorted(places)

    assert actor.worker.stop() == 0
