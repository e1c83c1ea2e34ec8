"""Opening the shop: its data, the payment service, and the web server. The worker comes after."""

from __future__ import annotations

from dataclasses import dataclass

from backstage.children import Child, Children, free_port, wait_until_answers


@dataclass(frozen=True)
class Shop:
    """Where the two servers are, and their processes."""

    url: str
    web: Child
    payments_url: str
    payments: Child


def open_shop(processes: Children, port: int = 0, *payment_options: str) -> Shop:
    """Start the servers on what is in the processes' folder, or on a shop that is new; return when both answer.

    The port is the web server's (0: any free one).
    """
    processes.run("migrate", "--verbosity=0")
    processes.run("seed_shop")
    ledger = str(processes.folder / "ledger.sqlite3")
    payments = processes.start("payments", "-m", "payments", "--ledger", ledger, *payment_options)
    # Its first line. Nobody else is there to tell anything yet.
    payments_url = processes.next_event()["listening"]
    processes.env["PAYMENTS_URL"] = payments_url
    port = port or free_port()
    web = processes.start("shop", "manage.py", "runserver", "--noreload", f"127.0.0.1:{port}")
    url = f"http://127.0.0.1:{port}"
    wait_until_answers(url, web)
    return Shop(url, web, payments_url, payments)
