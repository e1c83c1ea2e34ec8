"""HTTP: POST /charges makes a charge, GET /charges shows the ledger."""

from __future__ import annotations

import json
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from payments.faults import Fault, Faults
from payments.ledger import KeyReused, Ledger

LARGEST_BODY = 10_000


class BadRequest(Exception):
    """The request is not one for a charge; the text says why."""


class PaymentService(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], ledger: Ledger, faults: Faults) -> None:
        super().__init__(address, Handler)
        self.ledger = ledger
        self.faults = faults

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def tell(self, **facts: Any) -> None:
        """Say what happened, in a line of JSON."""
        print(json.dumps({"at": time.time(), **facts}), flush=True)


class Handler(BaseHTTPRequestHandler):
    server: PaymentService
    protocol_version = "HTTP/1.1"  # clients keep their connections
    disable_nagle_algorithm = True  # head and body go out as two writes; do not let the second wait for an ACK
    timeout = 60

    def do_GET(self) -> None:
        if self.path != "/charges":
            return self.answer(HTTPStatus.NOT_FOUND, {"error": "There is only /charges."})
        self.answer(HTTPStatus.OK, {"charges": self.server.ledger.charges(), "requests": self.server.ledger.requests()})

    def do_POST(self) -> None:
        try:
            key, order, amount, card = self.read_charge()
        except BadRequest as error:
            self.close_connection = True  # the body may not have been read
            return self.answer(HTTPStatus.BAD_REQUEST, {"error": str(error)})
        answer, body, note = self.charge(key, order, amount, card)
        self.server.ledger.note(key, order, answer)
        # Told before it is answered: whoever reads both logs sees them in the order of cause and effect.
        self.server.tell(order=order, answer=answer, note=note)
        self.answer(answer, body)

    def charge(self, key: str, order: str, amount: int, card: str) -> tuple[HTTPStatus, dict[str, Any], str]:
        """Return the answer to a request for a charge, and a note on what really happened."""
        busy = {"error": "Too busy, try again."}
        fault = self.server.faults.draw()
        if fault is Fault.BEFORE:
            return HTTPStatus.SERVICE_UNAVAILABLE, busy, "nothing was charged"
        try:
            charge, is_new = self.server.ledger.charge(key, order, amount, card)
        except KeyReused as error:
            return HTTPStatus.UNPROCESSABLE_ENTITY, {"error": str(error)}, "nothing was charged"
        if fault is Fault.AFTER:
            note = "the card was charged, but the answer is lost" if is_new else "charged earlier, answer lost"
            return HTTPStatus.SERVICE_UNAVAILABLE, busy, note
        if charge["status"] == "declined":
            return HTTPStatus.PAYMENT_REQUIRED, {"error": "The card was declined.", "charge": charge}, "declined"
        if is_new:
            return HTTPStatus.CREATED, {"charge": charge}, "the card was charged"
        return HTTPStatus.OK, {"charge": charge}, "the same charge again, no second one"

    def read_charge(self) -> tuple[str, str, int, str]:
        if self.path != "/charges":
            raise BadRequest("There is only /charges.")
        key = self.headers.get("Idempotency-Key", "")
        if not key or len(key) > 255:
            raise BadRequest("Send an Idempotency-Key of 1 to 255 characters.")
        try:
            length = int(self.headers["Content-Length"])
        except (TypeError, ValueError):
            raise BadRequest("Send a Content-Length.") from None
        if not 0 < length <= LARGEST_BODY:
            raise BadRequest(f"Send at most {LARGEST_BODY} bytes.")
        try:
            asked = json.loads(self.rfile.read(length))
            order, amount, card = asked["order"], asked["amount"], asked["card"]
        except (ValueError, TypeError, KeyError):
            raise BadRequest('Send JSON: {"amount": cents, "card": text, "order": text}.') from None
        if not (isinstance(order, str) and isinstance(card, str) and type(amount) is int):
            raise BadRequest("The amount is a whole number of cents, order and card are text.")
        if amount <= 0 or len(card) < 4 or not order:
            raise BadRequest("The amount is positive, a card has at least four characters, an order a name.")
        return key, order, amount, card

    def answer(self, status: HTTPStatus, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        if status == HTTPStatus.SERVICE_UNAVAILABLE:
            self.send_header("Retry-After", "0")
        if self.close_connection:
            # Said, or the client sends its next request into a connection that is being closed.
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """The line that do_POST prints says more than an access log."""
