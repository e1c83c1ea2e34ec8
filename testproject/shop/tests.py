"""The shop, beside a payment service that really runs, in a thread: an example of tests with durable runs."""

from __future__ import annotations

import itertools
import re
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from io import StringIO
from pathlib import Path
from typing import Any

from django.contrib.auth import get_user_model
from django.contrib.auth.models import Permission
from django.core import mail
from django.core.management import call_command
from django.db import connection, transaction
from django.test import Client, TestCase, TransactionTestCase, override_settings
from django.urls import reverse
from django.utils import timezone
from payments.faults import Fault, Faults
from payments.ledger import Ledger
from payments.server import PaymentService

import django_durable as durable
from django_durable.models import Message, WorkflowRun
from django_durable.testing import DurableTestMixin, advance, crash_after, crash_before, run_until_idle
from shop import payment_client, seats, workflows
from shop.models import Event, Order, Ticket


class Scripted(Faults):
    """Faults in a given order; none after the last."""

    def __init__(self, *faults: Fault) -> None:
        self.left = list(faults)

    def draw(self) -> Fault:
        return self.left.pop(0) if self.left else Fault.NONE


class QuietPaymentService(PaymentService):
    def tell(self, **facts: object) -> None:
        pass


class ShopTestCase(DurableTestMixin, TestCase):
    @classmethod
    def setUpTestData(cls) -> None:
        with override_settings(DEBUG=True):  # it refuses to make its administrator anywhere else
            call_command("seed_shop", stdout=StringIO())
        cls.event = Event.objects.first()
        cls.ticket = cls.event.tickets.get(seat="A1")

    def setUp(self) -> None:
        super().setUp()
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        ledger = Ledger(Path(folder.name) / "ledger.sqlite3")
        self.payments = QuietPaymentService(("127.0.0.1", 0), ledger, Scripted())
        self.addCleanup(self.payments.server_close)
        threading.Thread(target=self.payments.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        self.addCleanup(self.payments.shutdown)
        self.enterContext(override_settings(PAYMENTS_URL=self.payments.url))
        self.addCleanup(lambda: (payment_client.client().close(), payment_client.client.cache_clear()))

    def form(self, **changes: str) -> dict[str, str]:
        filled = {"seat": [self.ticket.pk], "email": "ada@example.com", "card": "tok_4242", "form_id": uuid.uuid4()}
        return {**filled, **changes}

    def post(self, **changes: str) -> Order:
        """Post the form, and return its order."""
        response = self.client.post(reverse("buy", args=[self.event.pk]), self.form(**changes))
        assert response.status_code == 302, response.content
        return Order.objects.get(public_id=response["Location"].strip("/").split("/")[-1])

    def assertSold(self, order: Order, mails: int = 1) -> None:
        """The order is paid, its tickets sold to it, its card charged once, each of its mails sent once."""
        order.refresh_from_db()
        assert order.status == Order.Status.PAID
        self.assertTickets(order, Ticket.Status.SOLD, holder=order)
        assert [charge["id"] for charge in self.charges() if charge["order"] == str(order)] == [order.payment]
        assert [message.to for message in mail.outbox] == [[order.email]] * mails

    def assertTickets(self, order: Order, status: str, holder: Order | None) -> None:
        assert {(ticket.status, ticket.holder) for ticket in order.tickets.all()} == {(status, holder)}

    def charges(self) -> list[dict[str, object]]:
        return [charge for charge in self.payments.ledger.charges() if charge["status"] == "succeeded"]


class CheckoutTests(ShopTestCase):
    def test_a_ticket_is_bought(self):
        order = self.post()
        run_until_idle()
        self.assertSold(order)
        assert durable.get_run(order.run_id).result(timeout=0) == {"ok": True, "payment": order.payment}

    def test_a_declined_card_frees_the_ticket(self):
        order = self.post(card="tok_0002")
        run_until_idle()
        order.refresh_from_db()
        assert order.status == Order.Status.DECLINED
        self.assertTickets(order, Ticket.Status.AVAILABLE, holder=None)
        assert (self.charges(), mail.outbox) == ([], [])
        assert len(self.payments.ledger.requests()) == 1, "a declined card was asked again"

    def test_a_busy_payment_service_is_asked_again(self):
        self.payments.faults = Scripted(Fault.BEFORE, Fault.BEFORE)
        order = self.post()
        run_until_idle()
        self.assertSold(order)

    def test_a_charge_whose_answer_was_lost_is_not_made_twice(self):
        self.payments.faults = Scripted(Fault.AFTER, Fault.AFTER)
        order = self.post()
        run_until_idle()
        self.assertSold(order)
        assert len(self.payments.ledger.requests()) == 3

    def test_a_payment_service_that_never_answers_leaves_the_ticket_reserved_until_somebody_resumes(self):
        self.payments.faults = Scripted(*[Fault.AFTER] * 8)
        order = self.post()
        while run_until_idle():
            advance("1 minute")  # the later attempts are seconds apart
        run = durable.get_run(order.run_id)
        assert run.status == "FAILED"
        order.refresh_from_db()
        self.assertTickets(order, Ticket.Status.RESERVED, holder=order)
        assert run.resume()
        run_until_idle()
        self.assertSold(order)

    def test_of_two_buyers_of_one_seat_one_gets_it(self):
        first, second = self.post(), self.post(email="grace@example.com")
        run_until_idle()
        first.refresh_from_db()
        second.refresh_from_db()
        assert {first.status, second.status} == {Order.Status.PAID, Order.Status.SOLD_OUT}
        self.assertSold(first if first.status == Order.Status.PAID else second)

    def test_a_crash_before_or_after_any_step_changes_nothing(self):
        for name in ("reserve_tickets", "charge_card", "fulfil", "send_confirmation"):
            for crash in (crash_before, crash_after):
                with self.subTest(crash=crash.__name__, step=name):
                    mail.outbox.clear()
                    self.ticket = self.event.tickets.filter(status=Ticket.Status.AVAILABLE).first()
                    before = len(self.charges())
                    order = self.post()
                    with crash(name):
                        run_until_idle()
                    run_until_idle()
                    order.refresh_from_db()
                    assert order.status == Order.Status.PAID
                    self.assertTickets(order, Ticket.Status.SOLD, holder=order)
                    assert len(self.charges()) == before + 1
                    assert len(mail.outbox) == 1
                    assert durable.get_run(order.run_id).model.recoveries == 1

    def test_the_mail_names_the_order(self):
        order = self.post()
        run_until_idle()
        [message] = mail.outbox
        assert order.public_id in message.subject
        assert message.extra_headers["Message-ID"] == f"<order-{order.public_id}@shop.example>"
        assert "seat A1" in message.body

    def test_steps_are_plain_functions_outside_a_workflow(self):
        order = self.post()
        assert workflows.reserve_tickets(order.pk, is_large=False)
        assert not workflows.reserve_tickets(order.pk, is_large=False)


class WaitingListTests(ShopTestCase):
    def setUp(self) -> None:
        """All seats are sold but A1, which an order holds that does not come about."""
        super().setUp()
        self.event.tickets.update(status=Ticket.Status.SOLD)
        self.hold("A1")

    def hold(self, *seats: str) -> None:
        self.holding = Order.objects.create(event=self.event, email="eve@example.com", amount=self.event.price)
        self.holding.tickets.set(self.event.tickets.filter(seat__in=seats))
        self.holding.tickets.update(status=Ticket.Status.RESERVED, holder=self.holding)

    def wait(self, email: str = "ada@example.com", **changes: str) -> Order:
        """Post the form of the waiting list, and return its order."""
        response = self.client.post(reverse("wait", args=[self.event.pk]), self.form(email=email, **changes))
        assert response.status_code == 302, response.content
        return Order.objects.get(public_id=response["Location"].strip("/").split("/")[-1])

    def give_the_seat_back(self) -> None:
        workflows.release_tickets(self.holding.pk)  # outside a workflow: the plain function

    def statuses(self, *orders: Order) -> list[str]:
        return [Order.objects.get(pk=order.pk).status for order in orders]

    def subjects(self, order: Order) -> list[str]:
        return [message.subject.partition(":")[0] for message in mail.outbox if message.to == [order.email]]

    def test_a_sold_out_event_has_a_waiting_list(self):
        page = self.client.get(self.event.get_absolute_url())
        self.assertContains(page, "Put me on the waiting list")
        self.assertContains(page, "within 24 hours")
        self.assertContains(self.client.get("/"), "sold out")

    def test_a_seat_that_is_given_back_goes_to_who_is_first_in_line(self):
        first, second = self.wait(), self.wait("grace@example.com")
        run_until_idle()
        assert (self.statuses(first, second), self.charges(), mail.outbox) == (["waiting", "waiting"], [], [])
        self.give_the_seat_back()
        run_until_idle()
        assert self.statuses(first, second) == ["paid", "waiting"]
        self.assertTickets(first, Ticket.Status.SOLD, holder=first)
        assert len(self.charges()) == 1
        assert self.subjects(first) == ["A seat for you", "Your ticket"]
        assert self.subjects(second) == []

    def test_one_seat_is_never_promised_to_two(self):
        line = [self.wait(f"{number}@example.com") for number in range(3)]
        run_until_idle()
        self.give_the_seat_back()
        self.give_the_seat_back()
        assert [durable.get_run(order.run_id).status for order in line] == ["PENDING", "WAITING", "WAITING"]
        assert Message.objects.count() == 1

    def test_if_the_payment_fails_the_seat_goes_to_the_next_in_line(self):
        first, second = self.wait(card="tok_0002"), self.wait("grace@example.com")
        run_until_idle()
        self.give_the_seat_back()
        run_until_idle()
        assert self.statuses(first, second) == ["declined", "paid"]
        self.assertTickets(second, Ticket.Status.SOLD, holder=second)
        assert self.subjects(first) == ["A seat for you", "No ticket"]
        assert self.subjects(second) == ["A seat for you", "Your ticket"]

    def test_a_declined_checkout_serves_the_line_too(self):
        """From the form to the line: nobody calls anything by hand."""
        Ticket.objects.filter(pk=self.ticket.pk).update(status=Ticket.Status.AVAILABLE, holder=None)
        buyer = self.post(card="tok_0002")
        with crash_after("reserve_tickets"):
            run_until_idle()
        waiting = self.wait("grace@example.com")
        assert self.statuses(buyer, waiting) == ["open", "waiting"]
        run_until_idle()
        assert self.statuses(buyer, waiting) == ["declined", "paid"]

    def test_nobody_waits_longer_than_a_day(self):
        order = self.wait()
        run_until_idle()
        advance("23 hours 59 minutes")
        run_until_idle()
        assert self.statuses(order) == ["waiting"]
        advance("1 minute")
        run_until_idle()
        assert self.statuses(order) == ["expired"]
        assert self.subjects(order) == ["No ticket"]
        self.give_the_seat_back()
        run_until_idle()
        self.assertTickets(self.holding, Ticket.Status.AVAILABLE, holder=None)

    def test_a_seat_that_comes_at_the_last_moment_is_taken(self):
        order = self.wait()
        run_until_idle()
        advance("24 hours")
        with crash_before("leave_the_line"):
            run_until_idle()
        self.give_the_seat_back()
        run_until_idle()
        self.assertSold(order, mails=2)

    def test_a_seat_that_came_back_while_the_form_was_filled_in_is_taken(self):
        self.give_the_seat_back()
        order = self.wait()
        run_until_idle()
        self.assertSold(order, mails=2)

    def test_two_seats_that_come_back_together_go_to_two(self):
        self.hold("A1", "A2")
        line = [self.wait(f"{number}@example.com") for number in range(3)]
        run_until_idle()
        self.give_the_seat_back()
        run_until_idle()
        assert self.statuses(*line) == ["paid", "paid", "waiting"]
        assert [order.seats for order in line] == ["A1", "A2", ""]

    def test_the_form_posted_twice_is_one_place_in_line(self):
        filled = self.form()
        for _ in range(2):
            self.client.post(reverse("wait", args=[self.event.pk]), filled)
        assert Order.objects.filter(status=Order.Status.WAITING).count() == 1
        assert WorkflowRun.objects.count() == 1

    def test_who_cancels_leaves_the_line(self):
        first, second = self.wait(), self.wait("grace@example.com")
        run_until_idle()
        self.assertContains(self.client.get(first.get_absolute_url()), "Cancel this order")
        self.client.post(reverse("cancel", args=[first.public_id]))
        run = durable.get_run(first.run_id).model
        assert (run.status, run.cancel_reason) == ("CANCELLED", "by the buyer")
        self.give_the_seat_back()
        run_until_idle()
        assert self.statuses(first, second) == ["cancelled", "paid"]

    def test_who_has_been_promised_a_seat_cannot_cancel_any_more(self):
        order = self.wait()
        run_until_idle()
        self.give_the_seat_back()
        answer = self.client.post(reverse("cancel", args=[order.public_id]), follow=True)
        self.assertContains(answer, "It is too late to cancel this order.")
        run_until_idle()
        self.assertSold(order, mails=2)

    def test_a_crash_before_or_after_any_step_changes_nothing(self):
        names = ("receive ticket released", "send_offer", "charge_card", "fulfil", "send_confirmation")
        for name, crash in itertools.product(names, (crash_before, crash_after)):
            with self.subTest(crash=crash.__name__, step=name):
                mail.outbox.clear()
                self.hold("A1")
                order = self.wait()
                self.give_the_seat_back()
                with crash(name):
                    run_until_idle()
                run_until_idle()
                self.assertSold(order, mails=2)
                assert durable.get_run(order.run_id).model.recoveries == 1

    def test_a_crash_at_the_deadline_sends_one_mail_and_gives_up_the_place(self):
        for name, crash in itertools.product(("leave_the_line", "send_regrets"), (crash_before, crash_after)):
            with self.subTest(crash=crash.__name__, step=name):
                mail.outbox.clear()
                order = self.wait()
                run_until_idle()
                advance("24 hours")
                with crash(name):
                    run_until_idle()
                run_until_idle()
                assert self.statuses(order) == ["expired"]
                assert self.subjects(order) == ["No ticket"]

    def test_the_page_tells_how_it_stands(self):
        order = self.wait()
        run_until_idle()
        page = self.client.get(order.get_absolute_url())
        self.assertContains(page, "You are on the waiting list")
        self.assertContains(page, 'class="now">Wait for a seat')
        self.give_the_seat_back()
        run_until_idle()
        page = self.client.get(order.get_absolute_url())
        self.assertContains(page, "The seat is yours")
        self.assertContains(page, "Seat A1")


class ApprovalTests(ShopTestCase):
    def setUp(self) -> None:
        """Somebody has ordered five seats, and the box office has a clerk."""
        super().setUp()
        self.clerk = get_user_model().objects.create_user("clerk")
        self.clerk.user_permissions.add(Permission.objects.get(codename="approve_order"))
        self.box_office = Client()
        self.box_office.force_login(self.clerk)
        self.order = self.post_large()

    def post_large(self, **changes: str) -> Order:
        free = self.event.tickets.filter(status=Ticket.Status.AVAILABLE).order_by("seat")[:5]
        return self.post(seat=[ticket.pk for ticket in free], **changes)

    def decide(self, what: str, note: str = "", order: Order | None = None, client: Client | None = None) -> str:
        """Press a button on the box office's page; return what it says then."""
        address = reverse("decide", args=[(order or self.order).public_id])
        answer = (client or self.box_office).post(address, {what: "", "note": note}, follow=True)
        return answer.content.decode()

    def assertRejected(self, note: str) -> None:
        """The seats are free, nothing is charged, and the buyer knows."""
        self.order.refresh_from_db()
        assert (self.order.status, self.order.note) == (Order.Status.REJECTED, note)
        self.assertTickets(self.order, Ticket.Status.AVAILABLE, holder=None)
        assert self.charges() == []
        [message] = mail.outbox
        assert message.subject.startswith("No ticket")
        assert note in message.body

    def test_a_large_order_waits_for_the_box_office_and_holds_its_seats(self):
        run_until_idle()
        self.order.refresh_from_db()
        assert self.order.status == Order.Status.APPROVAL
        self.assertTickets(self.order, Ticket.Status.RESERVED, holder=self.order)
        assert (self.charges(), mail.outbox) == ([], [])
        page = self.box_office.get(reverse("approvals"))
        self.assertContains(page, self.order.public_id)
        self.assertContains(page, "A1, A2, A3, A4, A5")

    def test_an_approved_order_is_charged_and_sold(self):
        run_until_idle()
        page = self.decide("approve", "Enjoy the evening.")
        assert f"Order {self.order} is approved." in page
        assert self.order.get_absolute_url() not in page
        run_until_idle()
        self.assertSold(self.order)
        [charge] = self.charges()
        assert charge["amount"] == 5 * self.event.price
        self.assertContains(self.client.get(self.order.get_absolute_url()), "Our box office says: Enjoy the evening.")

    def test_a_rejected_order_frees_its_seats(self):
        run_until_idle()
        assert f"Order {self.order} is rejected." in self.decide("reject", "Four at most, please.")
        run_until_idle()
        self.assertRejected("Four at most, please.")
        self.assertContains(self.client.get(self.order.get_absolute_url()), "Four at most, please.")

    def test_without_an_answer_the_order_is_rejected_after_two_days(self):
        run_until_idle()
        advance("47 hours")
        run_until_idle()
        self.assertTickets(self.order, Ticket.Status.RESERVED, holder=self.order)
        advance("1 hour")
        assert "does not wait for a decision" in self.decide("approve"), "it was approved after its deadline"
        run_until_idle()
        self.assertRejected("")

    def test_the_seats_of_a_rejected_order_go_to_the_waiting_list(self):
        run_until_idle()
        self.event.tickets.filter(status=Ticket.Status.AVAILABLE).update(status=Ticket.Status.SOLD)
        self.client.post(reverse("wait", args=[self.event.pk]), self.form(email="grace@example.com"))
        self.decide("reject")
        run_until_idle()
        assert Order.objects.get(email="grace@example.com").status == Order.Status.PAID
        assert self.order.tickets.filter(status=Ticket.Status.AVAILABLE).count() == 4

    def test_the_first_decision_stands(self):
        run_until_idle()
        self.decide("reject")
        assert "does not wait for a decision" in self.decide("approve")
        run_until_idle()
        self.assertRejected("")

    def test_a_buyer_who_cancels_before_the_decision_gets_no_ticket(self):
        run_until_idle()
        self.client.post(reverse("cancel", args=[self.order.public_id]))
        assert "does not wait for a decision" in self.decide("approve")
        run_until_idle()
        self.order.refresh_from_db()
        assert self.order.status == Order.Status.CANCELLED
        self.assertTickets(self.order, Ticket.Status.AVAILABLE, holder=None)
        assert self.charges() == []

    def test_a_buyer_who_cancels_after_the_decision_but_before_the_charge_gets_no_ticket(self):
        run_until_idle()
        self.decide("approve")
        self.client.post(reverse("cancel", args=[self.order.public_id]))
        run_until_idle()
        assert (self.charges(), durable.get_run(self.order.run_id).status) == ([], "CANCELLED")
        self.assertTickets(self.order, Ticket.Status.AVAILABLE, holder=None)

    def test_who_is_being_charged_cannot_cancel_any_more(self):
        run_until_idle()
        self.decide("approve")
        with crash_before("charge_card"):
            run_until_idle()
        self.client.post(reverse("cancel", args=[self.order.public_id]))
        run_until_idle()
        self.assertSold(self.order)

    def test_only_the_box_office_decides(self):
        run_until_idle()
        self.client.force_login(get_user_model().objects.create_user("buyer"))
        assert self.client.get(reverse("approvals")).status_code == 403
        assert "403" in self.decide("approve", client=self.client)
        assert "/admin/login/" in Client().get(reverse("approvals"))["Location"]
        csrf = Client(enforce_csrf_checks=True)
        csrf.force_login(self.clerk)
        assert csrf.post(reverse("decide", args=[self.order.public_id]), {"approve": ""}).status_code == 403
        assert durable.get_run(self.order.run_id).status == "WAITING"

    def test_a_note_that_is_too_long_is_refused_and_nothing_decided(self):
        run_until_idle()
        assert "at most 200 characters" in self.decide("approve", "x" * 201)
        assert durable.get_run(self.order.run_id).status == "WAITING"

    def test_four_seats_need_no_approval(self):
        four = self.event.tickets.order_by("-seat")[:4]
        order = self.post(seat=[ticket.pk for ticket in four])
        run_until_idle()
        self.assertSold(order)

    def test_of_two_orders_that_share_a_seat_one_gets_all_and_the_other_none(self):
        a4, a5, a6 = self.event.tickets.filter(seat__in=("A4", "A5", "A6")).order_by("seat")
        Order.objects.all().delete()
        first, second = self.post(seat=[a4.pk, a5.pk]), self.post(seat=[a5.pk, a6.pk])
        run_until_idle()
        first.refresh_from_db()
        second.refresh_from_db()
        assert sorted((first.status, second.status)) == [Order.Status.PAID, Order.Status.SOLD_OUT]
        assert self.event.tickets.filter(status=Ticket.Status.SOLD).count() == 2

    def test_a_crash_before_or_after_any_step_changes_nothing(self):
        durable.get_run(self.order.run_id).cancel()
        undecided = [
            crash_before("reserve_tickets"),
            crash_after("reserve_tickets"),
            crash_before("approval large order"),
        ]
        decided = [
            crash(name)
            for name in ("approve", "charge_card", "fulfil", "send_confirmation")
            for crash in (crash_before, crash_after)
        ]
        crashes = [(crash, nullcontext()) for crash in undecided] + [(nullcontext(), crash) for crash in decided]
        for number, (until_the_decision, after_it) in enumerate(crashes):
            with self.subTest(number):
                Ticket.objects.update(status=Ticket.Status.AVAILABLE, holder=None)
                mail.outbox.clear()
                order = self.post_large()
                with until_the_decision:
                    run_until_idle()
                run_until_idle()
                self.decide("approve", order=order)
                with after_it:
                    run_until_idle()
                run_until_idle()
                self.assertSold(order)
                assert durable.get_run(order.run_id).model.recoveries == 1

    def test_a_crash_while_the_order_is_rejected_changes_nothing(self):
        for name, crash in itertools.product(("reject", "send_regrets"), (crash_before, crash_after)):
            with self.subTest(crash=crash.__name__, step=name):
                mail.outbox.clear()
                run_until_idle()
                advance("2 days")
                with crash(name):
                    run_until_idle()
                run_until_idle()
                self.assertRejected("")
                self.order = self.post_large()


class RaceTests(DurableTestMixin, TransactionTestCase):
    """One is in the middle of a transaction when the other comes: a thread with a connection of its own."""

    def setUp(self) -> None:
        super().setUp()
        self.event = Event.objects.create(name="A play", venue="Here", starts_at=timezone.now(), price=900)
        self.ticket = Ticket.objects.create(event=self.event, seat="A1", status=Ticket.Status.RESERVED)
        self.holding = Order.objects.create(event=self.event, email="eve@example.com", amount=900)
        self.holding.tickets.add(self.ticket)
        Ticket.objects.update(holder=self.holding)

    def wait(self, email: str) -> Order:
        form = {"email": email, "card": "tok_4242", "form_id": uuid.uuid4()}
        self.client.post(reverse("wait", args=[self.event.pk]), form)
        return Order.objects.get(email=email)

    @contextmanager
    def meanwhile(self, act: Callable[..., Any], *args: Any) -> Iterator[Future[Any]]:
        """A transaction in which another begins, before this one commits; yields what that comes to."""

        def act_elsewhere() -> Any:
            try:
                with transaction.atomic():
                    return act(*args)
            finally:
                connection.close()

        with ThreadPoolExecutor(1) as pool:
            with transaction.atomic():
                future: Future[Any] = Future()
                yield future
                other = pool.submit(act_elsewhere)
                with suppress(TimeoutError):
                    other.result(timeout=0.5)  # it waits for our commit, if it should
            future.set_result(other.result())

    def assertPromisedTo(self, order: Order) -> None:
        assert Ticket.objects.get() == self.ticket
        assert Ticket.objects.get().holder == order
        assert [message.run_id for message in Message.objects.all()] == [order.run_id]

    def test_who_joins_the_line_while_a_seat_comes_back_gets_it(self):
        with self.meanwhile(workflows.release_tickets, self.holding.pk):
            order = self.wait("ada@example.com")
        self.assertPromisedTo(order)

    def test_a_seat_that_comes_back_while_the_first_in_line_leaves_goes_to_the_second(self):
        first, second = self.wait("ada@example.com"), self.wait("grace@example.com")
        with self.meanwhile(workflows.release_tickets, self.holding.pk):
            assert seats.cancel(first)
        self.assertPromisedTo(second)

    def test_who_leaves_while_a_seat_is_promised_to_them_is_too_late(self):
        order = self.wait("ada@example.com")
        with self.meanwhile(seats.cancel, order) as is_cancelled:
            workflows.release_tickets(self.holding.pk)
        assert is_cancelled.result() is False
        self.assertPromisedTo(order)

    def test_one_seat_that_two_want_is_reserved_for_one(self):
        Ticket.objects.update(status=Ticket.Status.AVAILABLE, holder=None)
        first, second = (Order.objects.create(event=self.event, email="x@example.com", amount=900) for _ in range(2))
        for order in (first, second):
            order.tickets.add(self.ticket)
        with self.meanwhile(workflows.reserve_tickets, second.pk, False) as is_second:
            assert workflows.reserve_tickets(first.pk, is_large=False)
        assert is_second.result() is False
        assert Ticket.objects.get().holder == first


class FormTests(ShopTestCase):
    def test_the_form_posted_twice_is_one_order_and_one_run(self):
        filled = self.form()
        url = reverse("buy", args=[self.event.pk])
        first = self.client.post(url, filled)
        run_until_idle()
        second = self.client.post(url, filled)
        run_until_idle()
        assert first["Location"] == second["Location"]
        self.assertSold(Order.objects.get())
        assert WorkflowRun.objects.count() == 1

    def test_the_run_belongs_to_its_order(self):
        order = self.post()
        run = WorkflowRun.objects.get()
        assert (run.pk, run.related, run.attributes) == (order.run_id, order, {"order": order.public_id})
        assert list(WorkflowRun.objects.for_object(order)) == [run]

    def test_without_a_csrf_token_nothing_is_bought(self):
        response = Client(enforce_csrf_checks=True).post(reverse("buy", args=[self.event.pk]), self.form())
        assert response.status_code == 403
        assert (Order.objects.count(), WorkflowRun.objects.count()) == (0, 0)

    def test_a_form_with_mistakes_is_shown_again(self):
        other = Event.objects.last().tickets.first()
        for mistake in ({"email": "ada"}, {"seat": other.pk}, {"card": "4242424242424242"}, {"form_id": "1"}):
            with self.subTest(mistake):
                response = self.client.post(reverse("buy", args=[self.event.pk]), self.form(**mistake))
                self.assertContains(response, "errorlist", status_code=422)
        assert Order.objects.count() == 0

    def test_a_taken_seat_cannot_be_chosen(self):
        self.post()
        run_until_idle()
        page = self.client.get(self.event.get_absolute_url()).content.decode()
        assert page.count(" disabled") == 1
        self.assertContains(self.client.get("/"), "23 seats left")


class OrderPageTests(ShopTestCase):
    def progress(self, order: Order) -> str:
        return self.client.get(reverse("order-progress", args=[order.public_id])).content.decode()

    def test_the_page_follows_the_run(self):
        order = self.post()
        page = self.client.get(order.get_absolute_url())
        self.assertContains(page, "order.js")
        self.assertContains(page, '<noscript><meta http-equiv="refresh"')
        assert 'data-finished="no"' in self.progress(order)
        assert 'class="now">Reserve your seat' in self.progress(order)
        with crash_after("charge_card"):
            run_until_idle()
        assert 'class="done">Charge your card' in self.progress(order)
        assert 'class="now">Issue your ticket' in self.progress(order)
        run_until_idle()
        assert 'data-finished="yes"' in self.progress(order)
        assert self.progress(order).count('class="done"') == 4
        self.assertNotContains(self.client.get(order.get_absolute_url()), "order.js")

    def test_the_page_may_follow_its_own_run_and_no_other(self):
        order, other = self.post(), self.post(seat=[self.event.tickets.get(seat="A2").pk])
        run_until_idle()
        page = self.client.get(order.get_absolute_url()).content.decode()
        address = re.search(r'data-progress-url="([^"]+)"', page)[1]
        events = b"".join(self.client.get(address).streaming_content).decode()
        assert "event: status" in events
        assert "event: end" in events
        assert "send_confirmation" in events
        assert order.run_id in events
        assert other.run_id not in events
        assert order.email not in events, "what the run works with is not told"
        assert self.client.get(address.replace("/progress/", "/progress/x")).status_code == 403

    def test_a_declined_card_is_told(self):
        order = self.post(card="tok_0002")
        run_until_idle()
        assert "Your card was declined" in self.progress(order)
        assert 'class="failed">Charge your card' in self.progress(order)

    def test_a_taken_seat_is_told(self):
        self.post()
        order = self.post(email="grace@example.com")
        Ticket.objects.filter(pk=self.ticket.pk).update(status=Ticket.Status.SOLD)
        run_until_idle()
        assert "Somebody else was faster" in self.progress(order)
        assert "Nothing was charged" in self.progress(order)

    def test_a_charge_that_fails_is_told_and_the_seat_kept(self):
        self.payments.faults = Scripted(*[Fault.BEFORE] * 8)
        order = self.post()
        run_until_idle()
        assert 'class="now">Charge your card <small>It did not work at once; attempt 5' in self.progress(order)
        advance("1 minute")
        while run_until_idle():
            advance("1 minute")
        assert 'class="failed">Charge your card' in self.progress(order)
        assert "Your seat stays reserved" in self.progress(order)

    def test_a_checkout_that_ended_before_it_began_has_reserved_nothing(self):
        order = self.post()
        assert durable.get_run(order.run_id).cancel()
        assert "Your seat is not reserved" in self.progress(order)

    def test_a_mail_that_did_not_go_out_is_not_said_to_have_been_sent(self):
        order = self.post()
        with crash_after("fulfil"):
            run_until_idle()
        assert durable.get_run(order.run_id).cancel()
        assert "The seat is yours" in self.progress(order)
        assert "We wrote to" not in self.progress(order)

    def test_the_page_outlives_its_run(self):
        order = self.post()
        run_until_idle()
        WorkflowRun.objects.all().delete()
        assert "The seat is yours" in self.progress(order)

    def test_an_unknown_order_is_not_found(self):
        assert self.client.get("/orders/NOBODYS/").status_code == 404


class AdminTests(ShopTestCase):
    def test_the_administrator_finds_the_orders_run(self):
        order = self.post()
        self.client.force_login(get_user_model().objects.get(username="admin"))
        run_page = reverse("admin:django_durable_workflowrun_change", args=[order.run_id])
        self.assertContains(self.client.get(reverse("admin:shop_order_changelist")), run_page)
        self.assertContains(self.client.get(order.get_absolute_url()), run_page)
        assert self.client.get(run_page).status_code == 200
