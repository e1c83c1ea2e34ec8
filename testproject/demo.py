"""make demo: three tickets are bought, and the process that sells them is killed in the middle of a checkout.

Real processes on this machine: the shop, a payment service, a worker. All they write is in a new folder under
testproject/var/demo/. Ends by itself; exit status 0 if nothing was lost and nothing happened twice.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from queue import Empty
from types import FrameType
from typing import Any

from backstage import buyer, proof
from backstage.children import TESTPROJECT, Child, ChildFailed, Children, children, environment
from backstage.opening import open_shop
from backstage.screen import BOLD, GREEN, RED, headline, line, paint, say

# Beside the pauses before each of the acts.
WATCHDOG_SECONDS = 120
ACTS = 6
KEPT_FOLDERS = 3
# With this seed the service answers: 503 (nothing charged), charged / 503 (but charged!), the same charge / charged.
SEED = "19"


class Demo:
    def __init__(self, processes: Children, *, pause: float, forget_keys: bool) -> None:
        self.processes = processes
        self.pause = pause
        self.forget_keys = forget_keys
        self.folder = processes.folder
        self.hold = self.folder / "hold"
        self.hold.mkdir()
        self.seen: list[dict[str, Any]] = []  # all events so far, in the order of time
        self.workers = 0

    def play(self) -> bool:
        self.open_the_shop()
        first = self.buy_undisturbed()
        second = self.kill_the_worker_after_a_charge()
        third = self.buy_without_a_worker()
        self.start_another_worker(second, third)
        return self.prove([first, second, third])

    # The acts.

    def open_the_shop(self) -> None:
        self.act(
            1,
            "The shop opens",
            "A shop (Django, SQLite), a payment service that answers 503 to 3 in 10 requests, and a worker: "
            "three processes. A checkout has four steps: reserve_tickets, charge_card, fulfil, send_confirmation.",
        )
        opened = open_shop(self.processes, 0, "--seed", SEED, *(["--forget-keys"] if self.forget_keys else []))
        self.shop, self.payments = opened.url, opened.payments_url
        self.worker = self.start_worker()
        proof.connect_to_the_shop(self.processes.env)
        self.note(f"listens on {self.payments}, process {opened.payments.pid}", by="payments")
        self.note(f"listens on {self.shop}, process {opened.web.pid}", by="shop")
        self.note("started", by=f"worker {self.worker.pid}")

    def buy_undisturbed(self) -> str:
        self.act(2, "The first ticket", "Somebody posts the form. Nothing goes wrong, except what always may: a 503.")
        order = self.buy("ada@example.com", "tok_4242")
        self.wait_until_finished(order)
        return order

    def kill_the_worker_after_a_charge(self) -> str:
        self.act(
            3,
            "The second ticket, and the worker is killed",
            "The payment service charges the card, but its answer is lost; the step asks again, with the same "
            "idempotency key. Then the worker gets SIGKILL, while step 3 is about to commit.",
        )
        # SIGKILL has to hit while the charge is recorded and fulfil is not. To be sure of that, fulfil is held at the
        # end of its function: its writes are done, in a transaction that is open. See _hold_back in shop/story.py.
        os.mkfifo(self.hold / "fulfil")
        order = self.buy("grace@example.com", "tok_5556")
        self.wait("fulfil to be under way", lambda event: event.get("what") == "held")
        self.worker.kill()
        self.tell("killed", run=f"order-{order}", victim=self.worker.pid)
        (self.hold / "fulfil").unlink()
        status, ticket, _, steps = proof.look_at_order(order)
        charges = [charge for charge in proof.read_ledger(self.payments)["charges"] if charge["order"] == order]
        self.note(f"the ledger has {len(charges)} charge for this order", run=f"order-{order}")
        self.note(f"recorded: {', '.join(steps)}", run=f"order-{order}")
        self.note(f"order {status}, ticket {ticket}: fulfil's writes died with the worker", run=f"order-{order}")
        return order

    def buy_without_a_worker(self) -> str:
        self.act(4, "The third ticket, while no worker is alive", "The shop takes the order all the same.")
        order = self.buy("mary@example.com", "tok_4242")
        _, _, run, _ = proof.look_at_order(order)
        self.note(f"the run is stored: {run}", run=f"order-{order}")
        return order

    def start_another_worker(self, second: str, third: str) -> None:
        self.act(
            5,
            "Another worker starts",
            "It does what is due, and takes over what the dead one left: "
            "the steps that were recorded are answered, not executed; the rest goes on.",
        )
        self.worker = self.start_worker()
        self.wait_until_finished(second)
        self.wait_until_finished(third)

    def prove(self, orders: list[str]) -> bool:
        self.act(
            6,
            "The proof",
            "From the shop's database, from the payment service's own ledger, and from the mail folder.",
        )
        found = proof.collect(orders, self.payments, self.folder / "mail", self.seen)
        for text in proof.table(found):
            say(f"   {text}")
        say()
        answered = [event["position"] for event in self.seen if event.get("what") == "answered"]
        say(f"   {found.requests} requests reached the payment service, whose ledger has {len(found.charges)} charges.")
        say(f"   {len(answered)} steps were answered from their checkpoints, {len(found.repeated)} executed again.")
        for what in found.strays + found.repeated:
            say(paint(f"   {what}", RED))
        is_right = found.lost == 0 and found.double == 0 and answered == [1, 2]
        say(paint(f"   {found.lost} lost, {found.double} double.", f"{GREEN if is_right else RED};{BOLD}"))
        return is_right

    # What they are made of.

    def act(self, number: int, title: str, text: str) -> None:
        self.show_what_came()
        headline(number, title, text)
        time.sleep(self.pause)  # for the reader

    def start_worker(self) -> Child:
        self.workers += 1
        command = ("manage.py", "durable_worker")
        told = {"SHOP_STORY": "1", "SHOP_STORY_HOLD": str(self.hold)}
        return self.processes.start(f"worker-{self.workers}", *command, **told)

    def buy(self, email: str, card: str) -> str:
        posted = time.time()
        order, seat = buyer.buy(self.shop, email, card)
        self.tell("bought", by="shop", run=f"order-{order}", seat=seat, at=posted)
        return order

    def wait_until_finished(self, order: str) -> None:
        self.wait(
            f"order-{order} to end",
            lambda event: event.get("what") == "finished" and event["run"] == f"order-{order}",
        )
        self.see_the_page(order)

    def see_the_page(self, order: str) -> None:
        status = buyer.look(self.shop, order)
        self.tell("page", by="shop", run=f"order-{order}", status=status)

    def note(self, text: str, by: str = "demo", **facts: Any) -> None:
        self.tell("note", by=by, text=text, **facts)

    def tell(self, what: str, by: str = "demo", **facts: Any) -> None:
        """Add an event of our own to those of the processes, and show what has come so far."""
        self.processes.events.put({"at": time.time(), "by": by, "what": what} | facts)
        self.show_what_came()

    def wait(self, what: str, until: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Show what the processes tell, until one of them has told this."""
        looked_at = 0
        try:
            while True:
                for event in self.seen[looked_at:]:
                    if until(event):
                        return event
                looked_at = len(self.seen)
                self.show_next_events()
        except TimeoutError as error:
            raise TimeoutError(f"{error}; it was waiting for {what}") from None

    def show_what_came(self) -> None:
        self.show_next_events(timeout=0.05)

    def show_next_events(self, timeout: float | None = None) -> None:
        # They come through several pipes: take what comes together, and put it in the order of time.
        came = []
        with suppress(Empty):
            came.append(self.processes.events.get(timeout=timeout))
            while True:
                came.append(self.processes.events.get(timeout=0.03))
        came.sort(key=lambda event: event["at"])
        for event in came:
            self.seen.append(event)
            text = line(event)
            if text is not None:
                say(text)
            if event.get("what") == "ended" and not event["child"].ending:
                raise ChildFailed.ended(event["child"], event["code"])
            if event.get("what") == "finished" and event["status"] != "SUCCEEDED":
                raise RuntimeError(f"{event['run']} ended {event['status']}.")


def main() -> int:
    parser = argparse.ArgumentParser(description="A checkout that survives kill -9, in the terminal.")
    parser.add_argument("--folder", type=Path, help="where to write everything; default: a new one in var/demo/")
    parser.add_argument("--pause", type=float, metavar="SECONDS", help="to read what each act is about")
    parser.add_argument(
        "--forget-keys", action="store_true", help="a payment service without idempotency keys: the proof must fail"
    )
    options = parser.parse_args()
    if options.pause is None:
        options.pause = 5.0 if sys.stdout.isatty() else 0.0
    folder = options.folder or new_folder()
    if folder.exists() and any(folder.iterdir()):
        parser.error(f"--folder takes one that is new or empty, found {folder}.")
    folder.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGALRM, give_up)
    signal.signal(signal.SIGTERM, give_up)
    signal.alarm(math.ceil(WATCHDOG_SECONDS + ACTS * options.pause))
    started = time.monotonic()
    say(paint("A checkout that survives kill -9", BOLD))
    with children(folder, environment(folder)) as processes:
        try:
            is_right = Demo(processes, pause=options.pause, forget_keys=options.forget_keys).play()
        except Exception as error:
            say(paint(f"\nThe demo failed: {type(error).__name__}: {error}", RED))
            for child in processes.all:
                say(f"\n{child.log}:\n{child.tail()}")
            return 1
    say()
    if not is_right:
        say(paint(f"This is not what was promised. The logs are in {folder / 'log'}.", RED))
        return 1
    say(f"That took {time.monotonic() - started:.0f} s. To look around in the same shop:")
    say()
    # Without a folder, it opens the newest in var/demo/: this one, if it is there.
    say(f'   make serve ARGS="--folder {shlex.quote(str(folder.resolve()))}"' if options.folder else "   make serve")
    say("   the shop    http://127.0.0.1:8000/")
    say("   the admin   http://127.0.0.1:8000/admin/   user admin, password admin")
    return 0


def new_folder() -> Path:
    """Return a new folder in var/demo/, and forget the oldest. A new one: the last may be open in `make serve`."""
    demos = TESTPROJECT / "var" / "demo"
    demos.mkdir(parents=True, exist_ok=True)
    for old in sorted(demos.iterdir())[:-KEPT_FOLDERS]:
        shutil.rmtree(old, ignore_errors=True)
    return demos / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"


def give_up(signum: int, frame: FrameType | None) -> None:
    """Leave by an exception, so that no process stays behind."""
    raise TimeoutError(f"{signal.Signals(signum).name}; the demo may take {WATCHDOG_SECONDS} s and its pauses")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
