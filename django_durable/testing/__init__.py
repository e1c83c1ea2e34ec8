"""For users' tests: durable runs inside ``TestCase`` and pytest-django's ``db``, in the test's own transaction.

No thread, no process, no sleeping: `run_until_idle` executes what is due on this connection, `advance` moves the
durable clock, and `crash_after` and `crash_before` let the executor die as by SIGKILL.
"""

from django_durable.testing.clock import DurableTestMixin, advance
from django_durable.testing.crashes import crash_after, crash_before
from django_durable.testing.runner import run_until_idle

__all__ = ["DurableTestMixin", "advance", "crash_after", "crash_before", "run_until_idle"]
