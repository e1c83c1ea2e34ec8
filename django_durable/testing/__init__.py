"""For users' tests: durable runs inside ``TestCase`` and pytest-django's ``db``, in the test's own transaction.

No thread, no process, no sleeping: `run_until_idle` executes what is due on this connection, `advance` moves the
durable clock, and `crash_after` and `crash_before` let the executor die as by SIGKILL.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from django_durable.testing.clock import DurableTestMixin, advance
    from django_durable.testing.crashes import crash_after, crash_before
    from django_durable.testing.runner import run_until_idle

__all__ = ["DurableTestMixin", "advance", "crash_after", "crash_before", "run_until_idle"]

_HOMES = {
    "DurableTestMixin": "clock",
    "advance": "clock",
    "crash_after": "crashes",
    "crash_before": "crashes",
    "run_until_idle": "runner",
}


def __getattr__(name: str) -> Any:
    # At first use: pytest loads `plugin`, and this package with it, in every project, also where there is no Django.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
