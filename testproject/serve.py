"""make serve: the shop with its admin, a payment service and a worker, until Ctrl-C.

It opens the shop as the last demo left it, or, before any demo, a new one under testproject/var/.
"""

from __future__ import annotations

import argparse
import signal
import socket
import sys
from pathlib import Path

from backstage.children import TESTPROJECT, ChildFailed, Children, children, environment
from backstage.opening import open_shop


def main() -> int:
    parser = argparse.ArgumentParser(description="The ticket shop, its admin, a payment service and a worker.")
    parser.add_argument("--port", type=int, default=8000, help="of the shop (default 8000; 0: any free one)")
    parser.add_argument("--folder", type=Path, help="where its data are; default: the last demo's")
    options = parser.parse_args()
    folder = options.folder or last_folder()
    folder.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, stop)
    try:
        with children(folder, environment(folder)) as processes:
            serve(processes, options.port)
    except KeyboardInterrupt:
        print("\nEnded.")
    except ChildFailed as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def serve(processes: Children, port: int) -> None:
    """Start everything, say where it is, and wait for the first process that ends."""
    print(f"Opening the shop in {processes.folder} ...", flush=True)
    if port and not is_free(port):
        print(f"Port {port} is taken, so the shop gets another. --port chooses one.")
        port = 0
    shop = open_shop(processes, port)
    processes.start("worker", "manage.py", "durable_worker")
    print(
        f"""
   the shop      {shop.url}/
   the admin     {shop.url}/admin/   user admin, password admin
   the ledger    {shop.payments_url}/charges
   the mails     {processes.folder / "mail"}
   the logs      {processes.folder / "log"}

The payment service answers 503 to 3 in 10 requests, and the form offers a card that is declined.
Ctrl-C ends everything.""",
        flush=True,
    )
    while True:
        processes.next_event()


def last_folder() -> Path:
    demos = TESTPROJECT / "var" / "demo"
    folders = sorted(demos.iterdir()) if demos.is_dir() else []
    return folders[-1] if folders else TESTPROJECT / "var"


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        # As the server itself: a port whose last connections are still fading away counts as free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def stop(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
