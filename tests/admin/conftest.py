"""Users with and without permissions, and a real browser.

The browser is the system's Chromium, driven by Playwright, whose own download is not used. Where there is none, the
browser's tests are left out with a loud line, and DURABLE_REQUIRE_BROWSER=1 makes that a failure.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest
from django.contrib.auth.models import Permission, User
from django.test import Client

CHROMIUM = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome", "chrome"])), None)
REQUIRED = os.environ.get("DURABLE_REQUIRE_BROWSER") == "1"

collect_ignore = [] if CHROMIUM or REQUIRED else ["test_browser.py"]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if collect_ignore:
        terminalreporter.section("THE ADMIN IS NOT TESTED IN A BROWSER", sep="!")
        terminalreporter.line("There is no chromium on the PATH. DURABLE_REQUIRE_BROWSER=1 makes that a failure.")


def staff(name: str, *codenames: str) -> User:
    user = User.objects.create_user(name, password=name, is_staff=True)
    user.user_permissions.set(Permission.objects.filter(codename__in=codenames))
    return user


def logged_in(user: User) -> Client:
    client = Client()
    client.force_login(user)
    return client


@pytest.fixture
def root(db: None) -> Client:
    """A superuser's client."""
    return logged_in(User.objects.create_superuser("root", password="root"))


@pytest.fixture
def viewer(db: None) -> Client:
    """May look at runs and workers, and not into payloads."""
    return logged_in(staff("viewer", "view_workflowrun", "view_worker"))


@pytest.fixture
def auditor(db: None) -> Client:
    """May look into payloads, too."""
    return logged_in(staff("auditor", "view_workflowrun", "view_worker", "view_payload"))


@pytest.fixture
def page(live_server) -> Iterator:
    """A page of a real browser, and what went wrong in it as `page.complaints`."""
    from playwright.sync_api import sync_playwright

    assert CHROMIUM, "DURABLE_REQUIRE_BROWSER=1, and there is no chromium on the PATH. Install it."
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        opened = browser.new_page()
        opened.complaints = []
        opened.on("pageerror", lambda error: opened.complaints.append(str(error)))
        # The browser asks for /favicon.ico by itself, and there is none.
        opened.on(
            "console",
            lambda said: (
                opened.complaints.append(said.text)
                if said.type in ("error", "warning") and "favicon" not in said.location.get("url", "")
                else None
            ),
        )
        yield opened
        browser.close()
