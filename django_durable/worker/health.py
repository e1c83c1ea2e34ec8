"""``GET /healthz`` (this process is alive) and ``/readyz`` (its database answers and its lease is good)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@contextmanager
def serve_health(port: int, ready: Callable[[], bool]) -> Iterator[int]:
    """Answer on all interfaces, as the probes of an orchestrator come from outside; yield the port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/healthz":
                self._answer(200, "alive")
            elif self.path == "/readyz":
                good = ready()
                self._answer(200 if good else 503, "ready" if good else "not ready: no fresh heartbeat in the database")
            else:
                self._answer(404, "GET /healthz or /readyz")

        def _answer(self, status: int, text: str) -> None:
            body = f"{text}\n".encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/plain; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """A probe a second is no news."""

    server = ThreadingHTTPServer(("", port), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, name="durable-health", daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
