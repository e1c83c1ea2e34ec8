"""The page about streams and progress: its code runs, and its facts are the code's."""

from __future__ import annotations

import inspect
import re

import pytest
from django.template import Context, Template

from django_durable import views
from django_durable.templatetags.durable import durable_progress
from tests.docs.pages import blocks, read, section, table
from tests.docs.test_reference import own_registry, run_examples  # noqa: F401 (a fixture)

PAGE = "docs/how-to/streams-and-progress.md"
pytestmark = [pytest.mark.django_db, pytest.mark.urls("tests.progress_site"), pytest.mark.usefixtures("own_registry")]


@pytest.fixture
def names() -> dict:
    return run_examples(PAGE)


def test_the_examples_do_what_they_say(names):
    assert [str(pattern.pattern) for pattern in names["urlpatterns"]] == ["durable/"]


def test_the_templates_draw_the_run(names):
    templates = [block.text for block in blocks(PAGE) if block.language == "html"]
    assert len(templates) == 2
    for text in templates:
        html = Template("{% load durable static %}" + text).render(Context({"run": names["run"]}))
        assert "ask_the_model" in html


def test_the_tags_arguments_are_described():
    described = set(
        re.findall(r"`(\w+)=", " ".join(row[0] for row in table(section(PAGE, "A page that follows its run"))))
    )
    assert described == set(inspect.signature(durable_progress).parameters) - {"context", "run"}


def test_the_facts_of_the_status_are_listed(names):
    from django.test import Client

    found = Client().get(names["status_url"]).json()
    text = section(PAGE, "The two addresses, by themselves")
    assert set(found) | set(found["steps"][0]) <= set(re.findall(r"`(\w+)`", text))
    assert f"the latest {views.LATEST}" in text
    assert f"after {views.DURATION:.0f} seconds" in text


def test_the_variables_of_the_colours_are_the_real_ones():
    style = read("django_durable/static/django_durable/progress.css")
    assert set(re.findall(r"--durable-\w+", style)) == set(re.findall(r"--durable-\w+", read(PAGE)))


def test_the_limits_under_wsgi_are_the_real_ones():
    text = section(PAGE, "What an open page costs")
    assert views.MAX_OPEN == 2
    assert "a process holds two open at most" in text
    assert views.RETRY_POLLING == 2000
    assert "every two seconds" in text.replace("\n  ", " ")
    assert views.LONGEST_PAUSE == 1
    assert "at most a second apart" in text
