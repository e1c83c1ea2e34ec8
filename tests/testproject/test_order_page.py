"""An order's page in a real browser: it follows its run while the visitor looks at it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.admin.conftest import CHROMIUM
from tests.testproject.shop import DEADLINE, Shop, opened

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, database: str) -> Iterator[Shop]:
    with opened(tmp_path_factory.mktemp("shop"), database) as shop, shop.worker():
        yield shop


@pytest.fixture
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    assert CHROMIUM, "DURABLE_REQUIRE_BROWSER=1, and there is no chromium on the PATH. Install it."
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=flags)


def visit(browser: Any, address: str, **options: Any) -> Any:
    """Open a page in a window of its own; what goes wrong in it is in `complaints`."""
    page = browser.new_context(**options).new_page()
    page.set_default_timeout(DEADLINE * 1000)
    page.complaints = []
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on("console", lambda said: page.complaints.append(said.text) if said.type in ("error", "warning") else None)
    page.goto(address)
    return page


def test_a_page_that_is_left_open_follows_its_order_through_the_approval(shop: Shop, browser: Any):
    page = visit(browser, f"{shop.url}/events/1/")
    for seat in ("B1", "B2", "B3", "B4", "B5"):
        page.get_by_label(seat).check()
    page.fill("[name=email]", "ada@example.com")
    page.click("text=Buy")
    page.wait_for_selector("[data-status=approval]")
    page.click("text=What is recorded")
    page.wait_for_selector("text=Waits for a decision")
    page.evaluate("window.isStillTheSamePage = true")

    clerk = visit(browser, f"{shop.url}/approvals/")
    clerk.fill("[name=username]", "admin")
    clerk.fill("[name=password]", "admin")
    clerk.click("[type=submit]")
    clerk.fill("[name=note]", "Enjoy the evening.")
    clerk.click("text=Approve")
    clerk.wait_for_selector("text=is approved.")
    clerk.wait_for_selector("text=None waits for you.")

    page.wait_for_selector("[data-status=paid][data-finished=yes]")
    page.wait_for_selector(".durable-progress[data-status=SUCCEEDED]")
    page.wait_for_selector("text=Enjoy the evening.")
    assert page.locator("text=Cancel this order").count() == 0
    assert page.evaluate("window.isStillTheSamePage")
    assert page.complaints == []


def test_without_javascript_one_can_wait_for_a_seat_and_cancel(shop: Shop, browser: Any):
    page = visit(browser, f"{shop.url}/events/2/", java_script_enabled=False)
    for seat in page.locator("[name=seat]").all():
        seat.check()
    page.fill("[name=email]", "ada@example.com")
    page.click("text=Buy")
    page.wait_for_selector("[data-status=approval]")  # the page comes anew by itself
    page.goto(f"{shop.url}/events/2/")
    page.fill("[name=email]", "grace@example.com")
    page.click("text=Put me on the waiting list")
    page.wait_for_selector("text=You are on the waiting list")
    page.click("text=Cancel this order")
    page.wait_for_selector("text=You cancelled this order")
    assert page.locator("text=Cancel this order").count() == 0
