"""Times, durations and statuses as people read them."""

from __future__ import annotations

from datetime import datetime

from django.utils import timezone
from django.utils.html import format_html
from django.utils.safestring import SafeString
from django.utils.translation import gettext

from django_durable.states import RunStatus, StepStatus


def duration(seconds: float, *, roughly: bool = False) -> str:
    """``120 ms``, ``2.3 s``, ``34 s``, ``12 min 3 s``, ``3 h 20 min``, ``5 d 3 h``; roughly: ``12 min``, ``3 h``."""
    # Two machines' clocks may differ by a little; nothing took less than no time.
    seconds = max(0.0, seconds)
    if seconds < 0.9995:
        return gettext("%(ms)d ms") % {"ms": round(seconds * 1000)}
    if seconds < 9.95:
        return gettext("%(s).1f s") % {"s": seconds}
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        words = gettext("%(d)d d") if roughly else gettext("%(d)d d %(h)d h")
    elif hours:
        words = gettext("%(h)d h") if roughly else gettext("%(h)d h %(m)d min")
    elif minutes:
        words = gettext("%(m)d min") if roughly else gettext("%(m)d min %(s)d s")
    else:
        words = gettext("%(s)d s")
    return words % {"d": days, "h": h, "m": m, "s": s}


def between(start: datetime | None, end: datetime | None, *, roughly: bool = False) -> str:
    """The time from one to the other; "" if either is not known."""
    return "" if start is None or end is None else duration((end - start).total_seconds(), roughly=roughly)


def clock(moment: datetime, now: datetime | None = None) -> str:
    """The moment in the current time zone; of today only the time."""
    local = timezone.localtime(moment)
    today = now is not None and timezone.localtime(now).date() == local.date()
    return f"{local:%H:%M:%S}" if today else f"{local:%Y-%m-%d %H:%M:%S}"


def exactly(moment: datetime) -> str:
    return f"{timezone.localtime(moment):%Y-%m-%d %H:%M:%S.%f %Z}"


def moment(at: datetime | None, shown: str | None = None) -> str:
    """A ``<time>`` that says exactly when on hover."""
    if at is None:
        return ""
    return format_html(
        '<time datetime="{}" title="{}">{}</time>', at.isoformat(), exactly(at), clock(at) if shown is None else shown
    )


def status_class(status: str) -> str:
    """The CSS class of a status; whatever else the column holds stays out of the attribute."""
    return f"durable-{status.lower()}" if status in RunStatus or status in StepStatus else "durable-unknown"


def badge(status: str, label: str) -> SafeString:
    return format_html('<span class="durable-badge {}">{}</span>', status_class(status), label)


def short_name(name: str) -> tuple[str, str]:
    """A workflow's own name, and the module before it: ``("checkout", "shop.workflows")``."""
    module, _dot, own = name.rpartition(".")
    return (own, module) if own and module else (name, "")


def short_id(run_id: str) -> str:
    """Of a long id the start, which differs between minutes, and the end, which differs between runs."""
    return run_id if len(run_id) <= 24 else f"{run_id[:8]}…{run_id[-6:]}"
