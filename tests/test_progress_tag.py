"""{% durable_progress run %}: what the server draws, without a line of JavaScript."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
from django.contrib.staticfiles import finders
from django.template import Context, Template
from django.urls import NoReverseMatch, resolve
from django.utils import translation
from django.utils.safestring import SafeString

import django_durable
import django_durable as durable
from django_durable.engine import tokens
from django_durable.models import StepCheckpoint, WorkflowRun
from django_durable.testing import crash_after, run_until_idle
from tests.admin.test_hostile import EVIL, Markup
from tests.app.workflows import checkout

pytestmark = [pytest.mark.urls("tests.progress_site"), pytest.mark.django_db]


def drawn(run: object, arguments: str = "", **names: object) -> SafeString:
    template = Template("{% load durable %}{% durable_progress run " + arguments + " %}")
    return template.render(Context({"run": run, **names}))


def attributes(html: str, tag: str) -> list[dict[str, str | None]]:
    return [given for name, given in Markup(html).elements if name == tag]


@pytest.fixture
def run() -> durable.RunHandle:
    """A checkout whose executor has died behind its second step."""
    started = checkout.using(run_id="order-7").start("7")
    with crash_after("charge"):
        run_until_idle()
    return started


def test_the_steps_so_far_and_the_status_are_on_the_page(run):
    html = drawn(run)
    assert [item["data-status"] for item in attributes(html, "li")] == ["SUCCEEDED"] * 2
    assert html.index(">reserve<") < html.index(">charge<")
    assert ">running<" in html
    assert "fulfil" not in html
    run_until_idle()
    html = drawn(run)
    assert len(attributes(html, "li")) == 3
    assert ">succeeded<" in html


def test_it_is_read_aloud_as_a_list_and_a_status(run):
    html = drawn(run)
    assert [given["aria-label"] for given in attributes(html, "section")] == ["Progress"]
    assert [given["role"] for given in attributes(html, "p") if "role" in given] == ["status"]
    assert [given["role"] for given in attributes(html, "ol")] == ["list"]


def test_a_handle_a_row_and_an_id_name_a_run(run):
    for same in (run, run.model, "order-7"):
        assert len(attributes(drawn(same), "li")) == 2
    for wrong in (7, None, {"id": "order-7"}):
        with pytest.raises(TypeError, match="durable_progress takes a run's handle"):
            drawn(wrong)


@pytest.mark.django_db(databases=["default", "other"])
def test_a_run_is_looked_for_in_its_own_database():
    run = checkout.using(database="other").start("8")
    run_until_idle(database="other")
    for same in (run, run.model):
        assert len(attributes(drawn(same), "li")) == 3


def test_a_run_that_was_pruned_is_a_sentence_and_no_error():
    html = drawn("pruned long ago")
    assert "There is nothing to show any more." in html
    assert not attributes(html, "script")


def permission(html: str) -> tokens.Permission | None:
    (section,) = attributes(html, "section")
    named = [resolve(section[f"data-{name}-url"]) for name in ("status", "progress")]
    assert [match.view_name for match in named] == ["durable:status", "durable:progress"]
    assert named[0].kwargs == named[1].kwargs
    return tokens.read(named[0].kwargs["token"])


def test_the_page_may_follow_this_run_for_a_day_and_see_what_its_author_names(run, monkeypatch):
    html = drawn(run)
    assert permission(html) == ("default", run.id, (), ())
    assert permission(drawn(run, 'streams="progress" events=keys', keys=["a", "b"])) == (
        "default",
        run.id,
        ("a", "b"),
        ("progress",),
    )
    short = drawn(run, "max_age=age", age=timedelta(minutes=1))
    now = tokens.time.time()
    monkeypatch.setattr(tokens.time, "time", lambda: now + 86400 - 10)
    assert permission(html)
    assert permission(short) is None
    monkeypatch.setattr(tokens.time, "time", lambda: now + 86400 + 10)
    assert permission(html) is None


def test_a_page_that_does_not_follow_has_no_token_and_no_script(run):
    html = drawn(run, "live=False")
    assert len(attributes(html, "li")) == 2
    assert not attributes(html, "script")
    assert "data-progress-url" not in html


@pytest.mark.urls("tests.urls")
def test_without_the_apps_addresses_only_a_page_that_does_not_follow_is_drawn(run):
    assert len(attributes(drawn(run, "live=False"), "li")) == 2
    with pytest.raises(NoReverseMatch, match="durable"):
        drawn(run)


def test_a_run_that_has_ended_needs_no_script(run):
    assert attributes(drawn(run), "script")
    run_until_idle()
    assert not attributes(drawn(run), "script")


def test_without_javascript_there_is_a_link_to_look_again(run):
    html = drawn(run)
    assert html.index("<noscript>") < html.index(">Refresh</a>") < html.index("</noscript>")
    run_until_idle()
    assert "<noscript>" not in drawn(run)


def test_a_strict_content_security_policy_passes(run):
    html = drawn(run)
    assert not Markup(html).inline()
    for given in attributes(html, "script") + attributes(html, "link"):
        assert "nonce" not in given
        assert finders.find((given.get("src") or given.get("href")).removeprefix("/static/"))
    script = Path(finders.find("django_durable/progress.js")).read_text()
    for refused in ("eval(", "innerHTML", "insertAdjacentHTML", "document.write", ".style", "new Function"):
        assert refused not in script


@pytest.mark.parametrize("given", ["context", "request"])
def test_a_policy_that_trusts_by_a_nonce_gets_it(run, given):
    names = {"csp_nonce": "abc"} if given == "context" else {"request": SimpleNamespace(csp_nonce="abc")}
    html = drawn(run, **names)
    assert [item["nonce"] for item in attributes(html, "script") + attributes(html, "link")] == ["abc", "abc"]


def test_whatever_a_row_says_is_text(run):
    StepCheckpoint.objects.filter(run=run.id).update(name=EVIL, status="<b x='")
    WorkflowRun.objects.filter(pk=run.id).update(workflow=EVIL, status="<b x='", waiting_for=EVIL)
    html = drawn(run)
    assert "&lt;script&gt;alert(1)" in html
    assert not Markup(html).of_ours()
    assert not Markup(html).inline()


def test_a_hostile_id_is_quoted():
    for run_id in (EVIL[:200], 'a"/><b>', "a/b?c#d", "ünï"):
        run = checkout.using(run_id=run_id).start("9")
        assert permission(drawn(run)).run_id == run_id
        assert not Markup(drawn(run)).inline()


def test_the_app_trusts_no_text_by_hand():
    package = Path(django_durable.__file__).parent
    sources = [
        package / "views.py",
        package / "templatetags/durable.py",
        package / "templates/django_durable/progress.html",
    ]
    for source in sources:
        for trust in ("mark_safe", "|safe", "autoescape", "SafeString("):
            assert trust not in source.read_text(), source


def test_its_words_can_be_translated(run):
    """Every word on the page that is not a name comes through gettext: here a catalogue of capitals."""

    class Capitals(translation.trans_real.DjangoTranslation):
        def gettext(self, message: str) -> str:
            return message.upper()

    WorkflowRun.objects.filter(pk=run.id).update(status="WAITING", waiting_for="message:paid")
    with translation.override("en"):
        catalogue = translation.trans_real._translations["en"]
        before = catalogue.__class__
        catalogue.__class__ = Capitals
        try:
            html = drawn(run)
        finally:
            catalogue.__class__ = before
    for word in ("PROGRESS", ">WAITING<", "WAITS FOR A MESSAGE", ">SUCCEEDED<", "REFRESH"):
        assert word in html


def test_a_page_costs_two_queries(run, django_assert_num_queries):
    with django_assert_num_queries(2):
        drawn(run)
