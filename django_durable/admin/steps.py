"""A run's steps in order: what each came to, and when."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from django.core.paginator import Page, Paginator
from django.db.models import Count, F, Min, Value
from django.db.models.functions import Left, Length

from django_durable.admin import values, words
from django_durable.admin.values import HIDDEN, SHOWN, Shown
from django_durable.models import StepCheckpoint, WorkflowRun
from django_durable.states import StepKind, StepStatus

PER_PAGE = 100
# A bar's whole track in its own units, and the shortest bar that can still be seen.
TRACK, SHORTEST = 1000, 6
# The start of an error that its type's name is in.
FIRST_LINE = 300
# An error's longest description, with its traceback, as the engine stores it.
ERROR = 40_000


@dataclass(frozen=True)
class Span:
    """The time that the bars are drawn over: from the run's first execution to its end, or to now."""

    start: datetime
    end: datetime

    @property
    def seconds(self) -> float:
        return (self.end - self.start).total_seconds()

    def bar(self, start: datetime, end: datetime) -> tuple[int, int]:
        """Where a bar begins and how wide it is."""
        scale = TRACK / self.seconds if self.seconds > 0 else 0.0
        x = min(max((start - self.start).total_seconds() * scale, 0.0), TRACK - SHORTEST)
        width = max((end - start).total_seconds() * scale, SHORTEST)
        return round(x), round(min(width, TRACK - x))


class Step:
    """One step as the page shows it."""

    def __init__(self, row: StepCheckpoint, span: Span, *, payloads: bool) -> None:
        stored: Any = row  # with what `load` has added to it
        self.row = row
        self.kind = _label(StepKind, row.kind)
        self.status = _label(StepStatus, row.status)
        self.status_class = words.status_class(row.status)
        self.started = words.moment(row.started_at, words.clock(row.started_at))
        self.offset = words.between(span.start, row.started_at)
        # One that waits has its deadline there, and a pause its end, which may be to come.
        waiting = row.status == StepStatus.WAITING
        self.duration = words.between(row.started_at, span.end if waiting else row.finished_at)
        self.x, self.width = span.bar(row.started_at, span.end if waiting else min(row.finished_at, span.end))
        self.error_type = values.error_type(stored.error_start)
        self.failed = bool(self.error_type)
        if payloads:
            self.headline = values.headline(stored.error_start)
            self.traceback = values.traceback(stored.error_start, stored.error_size)
            self.output = values.value(stored.output_start, stored.output_size) if stored.output_size else Shown()
        else:
            self.headline = self.error_type
            self.traceback = self.output = HIDDEN


@dataclass(frozen=True)
class Steps:
    """One page of a run's steps."""

    page: Page[Any]
    span: Span
    rows: list[Step]

    @property
    def took(self) -> str:
        return words.duration(self.span.seconds)


def load(run: WorkflowRun, alias: str, now: datetime, number: Any, *, payloads: bool) -> Steps:
    """Read one page of the run's steps; of values and errors only the start, and without `payloads` none."""
    steps = StepCheckpoint.objects.using(alias).filter(run=run.pk)
    times = steps.aggregate(count=Count("position"), first=Min("started_at"))
    start = min(time for time in (run.started_at, times["first"], now) if time)
    end = run.finished_at or max(now, start)
    span = Span(start, end)
    # A page of numbers, since they have been counted: each page of rows is one query.
    page = Paginator(range(times["count"]), PER_PAGE).get_page(number)
    shown = steps.order_by("position").defer("output", "error", "exception")
    shown = shown.annotate(**starts("error", ERROR if payloads else FIRST_LINE))
    if payloads:
        shown = shown.annotate(**starts("output", SHOWN))
    rows = shown[max(page.start_index() - 1, 0) : page.end_index()]
    return Steps(page, span, [Step(row, span, payloads=payloads) for row in rows])


def page_of(position: int) -> int:
    """The page that a step is on, if no position before it was left out."""
    return (position - 1) // PER_PAGE + 1


def starts(column: str, length: int) -> dict[str, Any]:
    """Annotations: a text column's start, cut by the database, and its whole length."""
    return {f"{column}_start": Left(F(column), Value(length)), f"{column}_size": Length(column)}


def _label(choices: type[StepKind] | type[StepStatus], stored: str) -> str:
    return str(choices(stored).label) if stored in choices.values else stored
