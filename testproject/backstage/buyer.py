"""A buyer without a browser: reads the shop's pages, fills in the form that is there, and posts it."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import httpx


def buy(shop: str, email: str, card: str) -> tuple[str, str]:
    """Buy the first free seat of the first event; return the order's number and the seat."""
    # The client keeps its cookies, as a browser does: the CSRF token is checked against one.
    with httpx.Client(base_url=shop, timeout=30, trust_env=False) as http:
        event = re.search(r'href="(/events/\d+/)"', http.get("/").raise_for_status().text)
        if event is None:
            raise Unexpected("The shop has no events.")
        form = Form(http.get(event[1]).raise_for_status().text)
        ticket, seat = form.free_seats[0]
        answer = http.post(form.action, data={**form.hidden, "seat": ticket, "email": email, "card": card})
        if answer.status_code != httpx.codes.FOUND:
            raise Unexpected(f"POST {form.action} was answered {answer.status_code}:\n{answer.text}")
        return answer.headers["Location"].strip("/").split("/")[-1], seat


def look(shop: str, order: str) -> str:
    """Return what the order's page says of it: open, paid, declined or sold_out."""
    page = httpx.get(f"{shop}/orders/{order}/", timeout=30, trust_env=False).raise_for_status().text
    status = re.search(r'data-status="(\w+)"', page)
    if status is None:
        raise Unexpected(f"The page of order {order} shows no status:\n{page}")
    return status[1]


class Unexpected(Exception):
    """The shop answered something else than a shop should."""


class Form(HTMLParser):
    """The parts of the page's form that a buyer has to send back."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.action = ""
        self.hidden: dict[str, str] = {}
        self.free_seats: list[tuple[str, str]] = []  # (value, what it says)
        self._seat: str | None = None
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "form":
            self.action = given["action"] or ""
        elif tag == "input" and given.get("type") == "hidden":
            self.hidden[given["name"] or ""] = given["value"] or ""
        elif tag == "input" and given.get("name") == "seat" and "disabled" not in given:
            self._seat = given["value"]

    def handle_data(self, data: str) -> None:
        if self._seat is not None and data.strip():
            self.free_seats.append((self._seat, data.strip()))
            self._seat = None
