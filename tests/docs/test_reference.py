"""The reference: every name, option, argument and default is there, is right, and its examples run."""

from __future__ import annotations

import inspect
import logging
import logging.config
import re
from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from django.apps import apps
from django.db.utils import ConnectionHandler
from django.dispatch import Signal

import django_durable as durable
from django_durable import conf, signals, testing
from django_durable.checks import WORKER_CONNECTIONS
from django_durable.engine import registry
from django_durable.engine.starting import StartOptions
from django_durable.handles import RunHandle
from django_durable.management.commands.durable_worker import Command
from django_durable.querysets import RunQuerySet
from django_durable.workflows import Workflow
from tests.app.models import Ledger
from tests.docs.pages import blocks, code, read, section, table

API, SETTINGS, ERRORS = (f"docs/reference/{name}.md" for name in ("api", "settings", "errors"))


@durable.step
def written(key: str) -> None:
    Ledger.objects.create(key=key)
    durable.current().logger.info("written")


@durable.workflow
def two_lines(key: str) -> None:
    written(key)
    durable.run_step("outside", str, key)


def run_examples(page: str, **names: Any) -> dict[str, Any]:
    """Execute a page's Python blocks, one after the other, in one namespace; return it."""
    namespace = {"__name__": "an_example", **names}
    for block in blocks(page):
        if block.language == "python":
            exec(compile(block.text, f"{page}, {block.section}", "exec"), namespace)
    return namespace


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """The examples' workflows are forgotten after the test."""
    monkeypatch.setattr(registry, "_workflows", dict(registry._workflows))
    monkeypatch.setattr(registry, "duplicates", list(registry.duplicates))


# -- Names ------------------------------------------------------------------------------------------------------


@pytest.mark.django_db
@pytest.mark.usefixtures("own_registry")
def test_the_examples_of_the_names_do_what_they_say() -> None:
    run_examples(API)


def test_every_public_name_is_described() -> None:
    described = set(re.findall(r"\b\w+\b", read(API)))
    assert set(durable.__all__) <= described
    assert set(testing.__all__) <= described


SIGNATURES = {
    "durable.workflow": durable.workflow,
    "checkout.using": StartOptions,  # what it hands its keyword arguments to
    "durable.step": durable.step,
    "durable.run_step": durable.run_step,
    "durable.current": durable.current,
    "durable.get_run": durable.get_run,
    "durable.register_type": durable.register_type,
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_signature_is_the_real_one(name: str) -> None:
    (shown,) = [block.text for block in blocks(API) if block.caption == f"signature of {name}"]
    namespace: dict[str, Any] = {}
    exec(f"def {' '.join(shown.split())}: ...", namespace)
    (described,) = [made for key, made in namespace.items() if key != "__builtins__"]
    # `self`, and the function that a decorator may be given at once, are not for the reader to pass.
    real = [p for p in inspect.signature(SIGNATURES[name]).parameters.values() if p.name not in ("self", "func")]
    shown_ones = inspect.signature(described).parameters.values()
    assert [(p.name, p.kind, p.default) for p in shown_ones] == [(p.name, p.kind, p.default) for p in real]


def test_every_public_method_of_a_handle_is_described() -> None:
    names = {name for name in dir(RunHandle) if not name.startswith("_")}
    assert set(re.findall(r"`\.(\w+)", section(API, "durable.RunHandle"))) == names


def test_every_way_to_call_a_workflow_is_described() -> None:
    text = section(API, "Calling a workflow")
    ways = {name for name in vars(Workflow) if not name.startswith("_") and callable(getattr(Workflow, name))}
    assert set(re.findall(r"checkout\.(\w+)\(", text)) == ways


def test_the_fields_of_the_models_are_there() -> None:
    rows = table(section(API, "django_durable.models"))
    described = {code(model): re.findall(r"`(\w+)`", fields) for model, _, fields in rows}
    real = {model.__name__: model for model in apps.get_app_config("django_durable").get_models()}
    assert set(described) == set(real)
    for model, fields in described.items():
        missing = [field for field in fields if not hasattr(real[model], field)]
        assert not missing, f"{model} has no {missing}"


def test_every_selection_of_runs_is_described() -> None:
    ours = {name for name, member in vars(RunQuerySet).items() if inspect.isfunction(member)}
    text = section(API, "django_durable.models")
    # What the engine alone uses: a fence, and the one statement that changes a status.
    assert ours - set(re.findall(r"`(\w+)\(\w*\)`", text)) == {"held", "move", "move_held", "orphaned"}


# -- Errors -----------------------------------------------------------------------------------------------------


def test_the_page_of_errors_has_every_public_error_and_no_other() -> None:
    public = {name for name in durable.__all__ if isinstance(getattr(durable, name), type)}
    errors = {name for name in public if issubclass(getattr(durable, name), BaseException)}
    assert set(re.findall(r"^### (\w+)$", read(ERRORS), re.MULTILINE)) == errors
    assert errors <= set(re.findall(r"\w+", section(API, "Errors")))


def test_every_error_says_when_what_and_what_to_do() -> None:
    for name in set(re.findall(r"^### (\w+)$", read(ERRORS), re.MULTILINE)) - {"DurableError"}:
        said = re.findall(r"^- \*\*(\w+):\*\* .", section(ERRORS, name), re.MULTILINE)
        assert said == ["When", "Means", "Do"], name


# -- Settings ---------------------------------------------------------------------------------------------------


def test_every_option_is_described_with_its_default() -> None:
    described = {code(name): code(default) for name, default, *_ in table(section(SETTINGS, "DURABLE"))}
    real = {name: str(getattr(conf.Options(), name)) or '""' for name in conf.OPTION_NAMES}
    assert described == real


def test_every_option_of_the_worker_is_described_with_its_default() -> None:
    # What Django gives to every command stays away.
    parser = ArgumentParser(add_help=False)
    Command().add_arguments(parser)
    described = {}
    for option, default, _ in table(section(SETTINGS, "The worker")):
        flag, _, metavar = code(option).partition(" ")
        described[flag] = (metavar, default.strip("`"))
    assert set(described) == {action.option_strings[0] for action in parser._actions}
    for action in parser._actions:
        metavar, default = described[action.option_strings[0]]
        assert metavar == (action.metavar or "")
        if isinstance(action.default, int | float) and not isinstance(action.default, bool):
            assert default == str(action.default)


@pytest.fixture
def quiet_again() -> Iterator[None]:
    """What an example does to a logger ends with the test."""
    logger = logging.getLogger("django_durable.run")
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = before


@pytest.mark.django_db
@pytest.mark.usefixtures("quiet_again")
def test_the_examples_of_the_settings_are_valid(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    examples = []
    for block in blocks(SETTINGS):
        if block.language == "python":
            exec(block.text, found := {"BASE_DIR": tmp_path})
            examples.append(found)
    for options in (found["DURABLE"] for found in examples if "DURABLE" in found):
        assert set(options) <= set(conf.OPTION_NAMES)
        conf.Options(**options)
    for databases in (found["DATABASES"] for found in examples if "DATABASES" in found):
        # The drivers know the options.
        assert ConnectionHandler(databases)["default"].get_connection_params()
    (logging_example,) = [found["LOGGING"] for found in examples if "LOGGING" in found]
    logging.config.dictConfig(logging_example)
    two_lines.using(run_id="logged")("a key")
    assert re.search(r"DEBUG logged written Run logged, step 1 \(written\): SUCCEEDED", capfd.readouterr().err)


@pytest.mark.django_db
def test_the_records_have_the_attributes_that_the_page_lists(caplog: pytest.LogCaptureFixture) -> None:
    loggers, _, attributes = section(SETTINGS, "Logging").partition("The records of")
    described = {code(name): text for name, text in table(attributes)}
    with caplog.at_level(logging.DEBUG, logger="django_durable.run"):
        two_lines("a key")
    assert {record.name for record in caplog.records} <= {code(name) for name, _ in table(loggers)}
    own = [record for record in caplog.records if record.message == "written"]
    others = [record for record in caplog.records if record not in own]
    assert len(own) == 1
    assert others
    ordinary = set(vars(logging.makeLogRecord({}))) | {"message", "asctime"}
    for record in others:
        assert set(vars(record)) - ordinary == set(described)
    without = {name for name, text in described.items() if "not with `current().logger`" in text}
    assert set(vars(own[0])) - ordinary == set(described) - without


@pytest.mark.django_db
def test_the_signals_have_the_arguments_that_the_page_lists() -> None:
    rows = table(section(SETTINGS, "Signals"))
    described = {code(signal): set(re.findall(r"`(\w+)`", arguments)) for signal, arguments, _ in rows}
    all_signals = {signal: name for name, signal in vars(signals).items() if isinstance(signal, Signal)}
    sent: dict[str, set[str]] = {}

    def receive(signal: Signal, sender: Any, **facts: Any) -> None:
        sent[all_signals[signal]] = set(facts)

    for signal in all_signals:
        signal.connect(receive)
    try:
        two_lines.start("a key")
        with testing.crash_after("outside"):
            testing.run_until_idle()
        testing.run_until_idle()
    finally:
        for signal in all_signals:
            signal.disconnect(receive)
    assert sent == described


def test_the_connections_add_up() -> None:
    text = section(SETTINGS, "Connections")
    beside = len(re.findall(r"^ +\+ 1 ", text, re.MULTILINE))
    # The check counts what a pool gives; the listener's connection comes from elsewhere.
    assert beside == WORKER_CONNECTIONS + 1
    assert f"at least `WORKER_CONCURRENCY + {WORKER_CONNECTIONS}`" in text
    assert f"That is {conf.Options().WORKER_CONCURRENCY + beside} with the default settings" in text
