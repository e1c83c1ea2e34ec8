"""The shop, beside a payment service that really runs, in a thread: an example of tests with durable runs."""

from __future__ import annotations

import tempfile
import threading
import uuid
from io import StringIO
from pathlib import Path

from django.contrib.auth import get_user_model
from django.core import mail
from django.core.management import call_command
from django.test import Client, TestCase, override_settings
from django.urls import reverse
from payments.faults import Fault, Faults
from payments.ledger import Ledger
from payments.server import PaymentService

import django_durable as durable
from django_durable.models import WorkflowRun
from django_durable.testing import DurableTestMixin, advance, crash_after, crash_before, run_until_idle
from shop import payment_client, workflows
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
        filled = {"seat": self.ticket.pk, "email": "ada@example.com", "card": "tok_4242", "form_id": uuid.uuid4()}
        return {**filled, **changes}

    def post(self, **changes: str) -> Order:
        """Post the form, and return its order."""
        response = self.client.post(reverse("buy", args=[self.event.pk]), self.form(**changes))
        assert response.status_code == 302, response.content
        return Order.objects.get(public_id=response["Location"].strip("/").split("/")[-1])

    def assertSold(self, order: Order) -> None:
        """The order is paid, its ticket sold to it, its card charged once, its mail sent once."""
        order.refresh_from_db()
        assert order.status == Order.Status.PAID
        assert order.ticket.status == Ticket.Status.SOLD
        assert order.ticket.holder == order
        assert [charge["id"] for charge in self.charges()] == [order.payment]
        assert [message.to for message in mail.outbox] == [[order.email]]

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
        assert order.ticket.is_available
        assert order.ticket.holder is None
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
        assert order.ticket.status == Ticket.Status.RESERVED
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
        for name in ("reserve_ticket", "charge_card", "fulfil", "send_confirmation"):
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
                    assert order.ticket.holder == order
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
        assert workflows.reserve_ticket(order.pk)
        assert not workflows.reserve_ticket(order.pk)


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
