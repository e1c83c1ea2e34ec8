"""A page that follows a run while it goes on, in a real browser, under a strict content security policy."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

import django_durable as durable
from django_durable import views
from django_durable.models import StepCheckpoint
from django_durable.testing import run_until_idle
from tests.admin.csp import strict
from tests.admin.test_hostile import EVIL
from tests.threads import elsewhere

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.urls("tests.progress_site")]


@durable.workflow(name="tests.browser.parcel")
def parcel() -> None:
    stream = durable.stream("progress")
    durable.run_step("pack", int)
    durable.receive("go")
    stream.write({"percent": 50})
    durable.run_step(EVIL_NAME, int)
    durable.receive("go")
    stream.write({"percent": 100})
    stream.close()


EVIL_NAME = EVIL.strip()


@pytest.fixture(autouse=True)
def strict_policy(live_server):
    server = live_server.thread.httpd
    application = server.get_app()
    server.set_app(strict(application))
    yield
    server.set_app(application)


@pytest.fixture
def run(live_server) -> durable.RunHandle:
    """Made before the browser starts: Playwright's event loop keeps the test's thread from the database."""
    started = parcel.using(run_id="parcel-1").start()
    run_until_idle()
    return started


def go_on(run: durable.RunHandle) -> None:
    def do() -> None:
        run.send("go", "go")
        run_until_idle()

    elsewhere(do)


LISTEN = """
window.told = [];
for (const name of ["value", "closed", "end"]) {
  document.addEventListener("durable:" + name, (event) => told.push([name, event.detail]));
}
"""


def names(page):
    return page.locator(".durable-progress-steps .durable-progress-name")


def follows(page, live_server, run):
    """The page shows each thing that the run does, without being loaded again."""
    from playwright.sync_api import expect

    page.add_init_script(LISTEN)
    page.goto(f"{live_server.url}/orders/{run.id}/")
    page.evaluate("window.sameDocument = true")
    status = page.locator(".durable-progress-status")
    expect(status).to_contain_text("waiting Waits for a message")
    expect(names(page)).to_have_text(["pack", "receive go"])
    assert page.locator("noscript a").count() == 0 or not page.locator("noscript a").is_visible()

    go_on(run)
    expect(names(page)).to_have_count(5)
    expect(names(page).nth(3)).to_have_text(EVIL_NAME)
    go_on(run)
    expect(status).to_contain_text("succeeded")
    expect(names(page)).to_have_count(7)
    page.wait_for_function("told.some((item) => item[0] === 'end')")
    assert page.evaluate("told") == [
        ["value", {"key": "progress", "position": 1, "value": {"percent": 50}}],
        ["value", {"key": "progress", "position": 2, "value": {"percent": 100}}],
        ["closed", {"key": "progress"}],
        ["end", {}],
    ]
    assert page.evaluate("window.sameDocument")
    assert page.evaluate("document.querySelectorAll('.durable-progress b, .durable-progress img').length") == 0


def test_a_page_follows_its_run(run, live_server, page):
    answers = []
    page.on("response", lambda answer: answers.append((answer.url.split("/")[4], answer.status)))
    follows(page, live_server, run)
    asked = [answer for answer in answers if answer[0] in ("progress", "status")]
    assert ("progress", 200) in asked
    assert not [answer for answer in asked if answer[0] == "status"], "events came, and it asked all the same"
    assert page.complaints == []


def test_a_page_follows_its_run_where_the_server_has_one_thread(run, live_server, page, monkeypatch):
    """Each answer is what there is; the browser asks again, and nothing comes twice."""
    monkeypatch.setattr(views, "_open", views.threading.Semaphore(0))
    monkeypatch.setattr(views, "RETRY_POLLING", 100)
    follows(page, live_server, run)
    assert page.complaints == []


def test_a_page_follows_its_run_where_events_do_not_come_through(run, live_server, page):
    page.route("**/durable/progress/**", lambda route: route.fulfill(status=502, body="bad gateway"))
    follows(page, live_server, run)
    assert [said for said in page.complaints if "502" not in said] == []


def test_a_browser_without_events_asks(run, live_server, page):
    page.add_init_script("delete window.EventSource")
    follows(page, live_server, run)
    assert page.complaints == []


def test_when_the_run_has_ended_nobody_asks_any_more(run, live_server, page):
    from playwright.sync_api import expect

    page.goto(f"{live_server.url}/orders/{run.id}/")
    go_on(run)
    go_on(run)
    expect(page.locator(".durable-progress-status")).to_contain_text("succeeded")
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.wait_for_timeout(3 * views.RETRY)
    assert asked == []


def test_an_answer_that_ends_is_followed_by_another(run, live_server, page, monkeypatch):
    """As a proxy, a deployment or our own limit ends it."""
    monkeypatch.setattr(views, "DURATION", 0.2)
    monkeypatch.setattr(views, "RETRY", 50)
    follows(page, live_server, run)
    assert page.complaints == []


def test_a_page_that_nobody_looks_at_asks_for_nothing_and_catches_up_later(run, live_server, page):
    from playwright.sync_api import expect

    hide = "Object.defineProperty(document, 'hidden', {value: %s, configurable: true});"
    page.add_init_script(LISTEN)
    page.goto(f"{live_server.url}/orders/{run.id}/")
    status = page.locator(".durable-progress-status")
    expect(status).to_contain_text("waiting")
    page.evaluate(hide % "true" + "document.dispatchEvent(new Event('visibilitychange'))")
    go_on(run)
    go_on(run)
    page.wait_for_timeout(500)
    expect(status).to_contain_text("waiting")
    page.evaluate(hide % "false" + "document.dispatchEvent(new Event('visibilitychange'))")
    expect(status).to_contain_text("succeeded")
    page.wait_for_function("told.length === 4")


@pytest.mark.parametrize(
    ("wants", "query", "background"),
    [("light", "?dark=1", (255, 255, 255)), ("dark", "?dark=1", (18, 18, 18)), ("dark", "", (255, 255, 255))],
    ids=["light", "dark", "dark on a page that is always light"],
)
def test_the_words_can_be_read(run, live_server, page, wants, query, background):
    page.emulate_media(color_scheme=wants)
    page.set_viewport_size({"width": 360, "height": 600})
    page.goto(f"{live_server.url}/orders/{run.id}/{query}")
    page.wait_for_selector(".durable-progress-steps li")
    for selector in ("p .durable-progress-label", "p .durable-progress-note", "li .durable-progress-name"):
        colour = page.evaluate("(which) => getComputedStyle(document.querySelector(which)).color", selector)
        assert contrast([int(part) for part in colour[4:-1].split(",")], background) >= 4.5, (selector, colour)
    for item in range(2):
        colour = page.evaluate(
            "(at) => getComputedStyle(document.querySelectorAll('li .durable-progress-label')[at]).color", item
        )
        assert contrast([int(part) for part in colour[4:-1].split(",")], background) >= 4.5, colour
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def contrast(one: Sequence[int], other: Sequence[int]) -> float:
    """As WCAG 2 counts it."""

    def luminance(colour: Sequence[int]) -> float:
        parts = [part / 255 for part in colour]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def test_without_javascript_the_page_shows_where_the_run_is(run, live_server, page):
    context = page.context.browser.new_context(java_script_enabled=False)
    quiet = context.new_page()
    quiet.goto(f"{live_server.url}/orders/{run.id}/")
    assert quiet.locator(".durable-progress-name").all_inner_texts() == ["pack", "receive go"]
    go_on(run)
    quiet.get_by_role("link", name="Refresh").click()
    quiet.locator(".durable-progress-name").nth(4).wait_for()
    context.close()
    assert elsewhere(StepCheckpoint.objects.count) == 5
