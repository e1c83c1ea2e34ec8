"""The shop's side of the payment service: one HTTP client for the process, and errors that mean something."""

from __future__ import annotations

import atexit
import functools
from typing import Any

import httpx
from django.conf import settings


class PaymentUnavailable(Exception):
    """No answer, or none that says whether the card was charged. Ask again with the same key."""


class CardDeclined(Exception):
    """The bank said no. Asking again does not help."""


class PaymentRefused(Exception):
    """The service does not accept this request at all: a bug in the shop, not the buyer's fault."""


def charge(*, key: str, order: str, amount: int, card: str) -> str:
    """Charge the card and return the payment's reference. With the same key, again and again: one charge."""
    try:
        response = client().post(
            "/charges",
            json={"order": order, "amount": amount, "card": card},
            headers={"Idempotency-Key": key},
        )
    except httpx.TransportError as error:
        raise PaymentUnavailable(f"the payment service did not answer: {error}") from error
    if response.is_success:
        reference: str = _json(response)["charge"]["id"]
        return reference
    if response.status_code == httpx.codes.PAYMENT_REQUIRED:
        raise CardDeclined("the card was declined")
    if response.is_server_error or response.status_code == httpx.codes.TOO_MANY_REQUESTS:
        raise PaymentUnavailable(f"the payment service answered {response.status_code}")
    raise PaymentRefused(f"the payment service answered {response.status_code}: {response.text}")


@functools.cache
def client() -> httpx.Client:
    """One client for all threads, which keeps its connections. Made at the first charge, not on import."""
    made = httpx.Client(
        base_url=settings.PAYMENTS_URL,
        # Nobody may wait without end. A charge that timed out has an unknown outcome, as has a 503.
        timeout=httpx.Timeout(5.0, connect=2.0),
        limits=httpx.Limits(max_connections=20, max_keepalive_connections=10),
        headers={"User-Agent": "ticket-shop"},
        # It runs on this machine: a proxy from the environment would only stand in between.
        trust_env=False,
    )
    atexit.register(made.close)
    return made


def _json(response: httpx.Response) -> dict[str, Any]:
    try:
        body: dict[str, Any] = response.json()
    except ValueError as error:
        raise PaymentUnavailable("the payment service's answer is not readable") from error
    return body
