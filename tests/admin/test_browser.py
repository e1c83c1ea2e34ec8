"""What a person does in the admin, in a real browser, under a strict content security policy."""

from __future__ import annotations

import pytest
from django.contrib.auth.models import User

from tests.admin.addresses import LIST, WORKERS, run_page
from tests.admin.csp import POLICY, strict
from tests.admin.workflows import every_status

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture(autouse=True)
def strict_policy(live_server):
    server = live_server.thread.httpd
    application = server.get_app()
    server.set_app(strict(application))
    yield
    server.set_app(application)


@pytest.fixture
def runs(live_server):
    """Made before the browser starts: Playwright's event loop keeps the test's thread from the database."""
    User.objects.create_superuser("root", password="root")
    return {key: handle.id for key, handle in every_status().items()}


@pytest.fixture
def admin(runs, live_server, page):
    """A page on which root has logged in."""
    page.goto(f"{live_server.url}{LIST}")
    page.fill("#id_username", "root")
    page.fill("#id_password", "root")
    page.click("[type=submit]")
    page.wait_for_selector("#result_list")
    return page


def test_from_the_list_to_the_traceback_of_the_step_that_failed(admin, runs):
    from playwright.sync_api import expect

    rows = admin.locator("#result_list tbody tr")
    expect(rows).to_have_count(len(runs))

    admin.locator("#changelist-filter").get_by_role("link", name="failed", exact=True).click()
    expect(rows).to_have_count(1)
    rows.get_by_role("link", name=runs["failed"]).click()
    expect(admin.locator(".durable-headline")).to_contain_text("CardDeclined: the card of order 1002 was declined")

    step = admin.locator("details.durable-step").nth(1)
    traceback = step.locator("pre.durable-traceback")
    expect(traceback).not_to_be_visible()
    step.locator("summary").click()
    expect(traceback).to_be_visible()
    expect(traceback).to_contain_text("in charge_card")
    expect(traceback).to_contain_text("insufficient funds")
    assert admin.complaints == []


def test_no_page_breaks_a_strict_content_security_policy(admin, live_server, runs):
    for address in (LIST, f"{LIST}?q=order", WORKERS, *map(run_page, runs.values())):
        answer = admin.goto(f"{live_server.url}{address}")
        assert answer.status == 200
        assert answer.headers["content-security-policy"] == POLICY
    assert admin.complaints == []


def test_the_policy_is_one_that_complains(admin, live_server):
    """Or the test above would prove nothing."""
    with admin.expect_console_message() as said:
        admin.evaluate("document.body.insertAdjacentHTML('beforeend', '<p style=\"color: red\">x</p>')")
    assert "Content Security Policy" in said.value.text
    assert said.value.text in admin.complaints


@pytest.mark.parametrize("width", [360, 768, 1360])
def test_a_page_fits_its_screen(admin, live_server, runs, width):
    """Nothing but a table or a traceback, which scroll by themselves, is wider than the screen."""
    admin.set_viewport_size({"width": width, "height": 800})
    for address in (LIST, run_page(runs["failed"]), run_page(runs["retrying run"])):
        admin.goto(f"{live_server.url}{address}")
        assert admin.evaluate("document.documentElement.scrollWidth") <= width


def test_the_steps_open_without_javascript(runs, live_server, page):
    context = page.context.browser.new_context(java_script_enabled=False)
    quiet = context.new_page()
    quiet.goto(f"{live_server.url}{run_page(runs['failed'])}")
    quiet.fill("#id_username", "root")
    quiet.fill("#id_password", "root")
    quiet.click("[type=submit]")
    step = quiet.locator("details.durable-step").nth(1)
    step.locator("summary").click()
    step.locator("pre.durable-traceback").wait_for(state="visible")
    context.close()
