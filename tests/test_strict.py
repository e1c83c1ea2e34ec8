"""STRICT: a query in a workflow's body is an error before a replay can see other rows."""

import pytest

import django_durable as durable
from django_durable.models import WorkflowRun
from django_durable.testing import crash_after, run_until_idle
from tests.app.models import Account, Ledger
from tests.app.workflows import checkout, echo, ledger_of, times

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def strict(settings):
    settings.DURABLE = {"STRICT": True}


@durable.workflow(name="tests.strict.reads")
def reads_in_its_body():
    return Account.objects.count()


@durable.workflow(name="tests.strict.writes")
def writes_in_its_body():
    checkout_step()
    Ledger.objects.create(key="from the body")


@durable.step(name="a_step")
def checkout_step():
    Ledger.objects.create(key="from the step")


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("workflow", [reads_in_its_body, writes_in_its_body], ids=["read", "write"])
def test_a_query_in_the_body_is_an_error_that_shows_it(workflow):
    with pytest.raises(durable.QueryOutsideStep, match=r"queried.*tests_app_.*Move it into a step"):
        workflow()
    run = WorkflowRun.objects.get()
    assert run.status == "FAILED"
    assert times("from the body") == 0
    # Who asked is in the traceback.
    assert "in_its_body" in run.error


def test_without_strict_it_is_allowed(settings):
    settings.DURABLE = {"STRICT": False}
    assert reads_in_its_body() == 0
    writes_in_its_body()
    assert times("from the body") == 1


def test_steps_their_checkpoints_and_their_replay_are_no_queries_of_the_body():
    run = checkout.start("A")
    with crash_after("charge"):
        run_until_idle()
    run_until_idle()
    assert run.result(timeout=0) == {"seat": "seat 1", "paid": 4900}
    assert ledger_of("A") == [1, 1, 1]


@durable.step(name="retried", atomic=False, max_attempts=3, retry_delay=0)
def retried():
    Ledger.objects.create(key="tried")
    if times("tried") < 3:
        raise ConnectionError
    return Account.objects.get()


@durable.workflow(name="tests.strict.account", max_attempts=2, retry_delay=0)
def with_account(account):
    found = retried()
    if durable.current().attempt == 1:
        raise ValueError("once")
    return [account.name, found.name, found]


def test_instances_as_arguments_values_and_results_are_read_by_us_not_by_the_body():
    account = Account.objects.create(name="Ada")
    assert with_account(account) == ["Ada", "Ada", account]


@durable.step(name="call_another", atomic=False)
def call_another():
    return checkout("A")["paid"] + echo(1)


@durable.workflow(name="tests.strict.nested")
def nested():
    return call_another()


def test_a_workflow_called_in_a_step_is_strict_in_its_own_body_only():
    assert nested() == 4901


@durable.step(name="call_reader", atomic=False)
def call_reader():
    return reads_in_its_body()


@durable.workflow(name="tests.strict.nested_reader")
def nested_reader():
    return call_reader()


def test_a_workflow_called_in_a_step_may_not_query_in_its_body_either():
    with pytest.raises(durable.QueryOutsideStep):
        nested_reader()


def test_after_a_run_the_connection_is_the_callers_again():
    with pytest.raises(durable.QueryOutsideStep):
        reads_in_its_body()
    assert Account.objects.count() == 0


@durable.workflow(name="tests.strict.swallow")
def swallows():
    try:
        Account.objects.count()
    except Exception:
        return "swallowed"


def test_a_query_that_was_refused_was_not_made(django_assert_max_num_queries):
    with django_assert_max_num_queries(4):
        assert swallows() == "swallowed"
