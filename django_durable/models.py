"""The tables: runs, their steps' checkpoints, and the processes that execute them.

Payloads are text, written and read by the codec alone: a JSON column would reorder keys and refuse NUL, lone
surrogates and NaN, after a step's effect has happened. Only `attributes`, made for searching, is JSON.
"""

from __future__ import annotations

from django.apps import apps
from django.core.exceptions import ValidationError
from django.db import models
from django.db.models import F, Q
from django.utils.translation import gettext_lazy as _

from django_durable.querysets import RunQuerySet
from django_durable.states import (
    FINISHED,
    RunStatus,
    StepKind,
    StepStatus,
    run_status_choices,
    step_kind_choices,
    step_status_choices,
)


class WorkflowRun(models.Model):
    """One durable execution of a workflow."""

    id = models.CharField(_("id"), primary_key=True, max_length=200)
    workflow = models.CharField(_("workflow"), max_length=255)
    status = models.CharField(_("status"), max_length=12, choices=run_status_choices, default=RunStatus.PENDING)
    queue = models.CharField(_("queue"), max_length=100, default="default")
    priority = models.IntegerField(_("priority"), default=0, help_text=_("Higher goes first."))
    partition_key = models.CharField(_("partition key"), max_length=200, blank=True, default="")
    deduplication_key = models.CharField(_("deduplication key"), max_length=200, blank=True, default="")
    attributes = models.JSONField(_("attributes"), default=dict, blank=True)
    # A label and a key instead of a content type: no look-up when a run is started, and any database will do.
    related_model = models.CharField(_("related model"), max_length=200, blank=True, default="")
    related_id = models.CharField(_("related id"), max_length=200, blank=True, default="")

    input = models.TextField(_("input"))
    output = models.TextField(_("output"), blank=True, default="")
    # For people: type, message, traceback. What is raised again is in `exception`.
    error = models.TextField(_("error"), blank=True, default="")
    exception = models.TextField(_("exception"), blank=True, default="")

    created_at = models.DateTimeField(_("created at"))
    run_after = models.DateTimeField(_("run after"), help_text=_("Due since then; the older go first."))
    started_at = models.DateTimeField(_("started at"), null=True, blank=True)
    finished_at = models.DateTimeField(_("finished at"), null=True, blank=True)
    timeout = models.FloatField(_("timeout"), null=True, blank=True, help_text=_("Seconds, from the first execution."))
    deadline = models.DateTimeField(_("deadline"), null=True, blank=True)
    wake_at = models.DateTimeField(_("wake at"), null=True, blank=True)
    waiting_for = models.CharField(_("waiting for"), max_length=500, blank=True, default="")

    # The fence: goes up with every claim, so an older executor's writes match no row.
    attempt = models.PositiveIntegerField(_("attempt"), default=0)
    failures = models.PositiveIntegerField(_("failures"), default=0)
    recoveries = models.PositiveIntegerField(_("recoveries"), default=0)
    # No foreign key: a process's row goes when it dies, and the run stays.
    worker = models.CharField(_("worker"), max_length=32, blank=True, default="")
    # Where the last failure left the workflow: the step that a retry executes anew, and the last position that
    # had been given when the workflow saw its error. Steps beyond it followed from the error.
    failed_step = models.PositiveIntegerField(_("failed step"), null=True, blank=True)
    failed_horizon = models.PositiveIntegerField(_("failed horizon"), null=True, blank=True)
    parent = models.ForeignKey(
        "self",
        verbose_name=_("parent"),
        null=True,
        blank=True,
        on_delete=models.DO_NOTHING,
        db_constraint=False,
        db_index=False,
        related_name="children",
    )
    # Somebody waits for this run's end, or for an event of it: whoever ends it has to wake them. Without it, an end
    # is one statement.
    awaited = models.BooleanField(_("awaited"), default=False)
    # The run that took over, where this one ended by continue_as_new().
    continued_as = models.CharField(_("continued as"), max_length=200, blank=True, default="")
    forked_from = models.ForeignKey(
        "self",
        verbose_name=_("forked from"),
        null=True,
        blank=True,
        on_delete=models.DO_NOTHING,
        db_constraint=False,
        db_index=False,
        related_name="forks",
    )
    version = models.CharField(_("version"), max_length=200, blank=True, default="")
    cancel_reason = models.TextField(_("cancel reason"), blank=True, default="")

    objects = RunQuerySet.as_manager()

    class Meta:
        verbose_name = _("workflow run")
        verbose_name_plural = _("workflow runs")
        ordering = ("-created_at",)
        permissions = (
            ("view_payload", _("Can see inputs, outputs and errors' values")),
            ("start_run", _("Can start runs")),
            ("cancel_run", _("Can cancel runs")),
            ("pause_run", _("Can pause runs")),
            ("resume_run", _("Can resume runs")),
            ("fork_run", _("Can fork and restart runs")),
            ("send_message", _("Can send messages to runs")),
        )
        indexes = (
            # What is live is indexed apart, so that ten million finished runs cost a claim nothing.
            # The status comes first: without statistics, SQLite prefers an index whose first column it is asked for.
            models.Index(
                F("status"),
                F("queue"),
                F("priority").desc(),
                F("run_after"),
                F("id"),
                condition=Q(status=RunStatus.PENDING),
                name="durable_run_ready",
            ),
            models.Index(
                F("status"),
                F("priority").desc(),
                F("run_after"),
                F("id"),
                condition=Q(status=RunStatus.PENDING),
                name="durable_run_due",
            ),
            models.Index(
                fields=["status", "wake_at"], condition=Q(status=RunStatus.WAITING), name="durable_run_timers"
            ),
            # PostgreSQL takes another index than its usual one for what begins with a text.
            models.Index(
                fields=["status", "waiting_for"],
                opclasses=["varchar_pattern_ops", "varchar_pattern_ops"],
                condition=Q(status=RunStatus.WAITING),
                name="durable_run_waiting",
            ),
            models.Index(fields=["status", "worker"], condition=Q(status=RunStatus.RUNNING), name="durable_run_worker"),
            models.Index(
                fields=["deadline"],
                condition=Q(deadline__isnull=False, finished_at__isnull=True),
                name="durable_run_deadline",
            ),
            models.Index(fields=["finished_at"], condition=Q(finished_at__isnull=False), name="durable_run_finished"),
            models.Index(fields=["parent"], condition=Q(parent__isnull=False), name="durable_run_parent"),
            models.Index(
                fields=["related_model", "related_id"], condition=~Q(related_id=""), name="durable_run_related"
            ),
            models.Index(fields=["workflow", "created_at"], name="durable_run_workflow"),
            models.Index(fields=["status", "created_at"], name="durable_run_status"),
            models.Index(fields=["created_at"], name="durable_run_created"),
        )

    def __str__(self) -> str:
        return f"{self.workflow} {self.id}"

    @property
    def is_finished(self) -> bool:
        return self.status in FINISHED

    @property
    def related(self) -> models.Model | None:
        """The object that the run was started for; None if there is none, or no more."""
        if not self.related_model:
            return None
        try:
            model = apps.get_model(self.related_model)
        except (LookupError, ValueError):
            return None
        try:
            found: models.Model | None = model._base_manager.filter(pk=self.related_id).first()
        except (TypeError, ValueError, ValidationError):
            # The model's key has another type by now.
            return None
        return found

    @related.setter
    def related(self, obj: models.Model | None) -> None:
        self.related_model = "" if obj is None else obj._meta.label_lower
        self.related_id = "" if obj is None else str(obj.pk)


class StepCheckpoint(models.Model):
    """A step's one outcome, a value or an exception. (run, position) is the key: that makes a step happen once."""

    pk = models.CompositePrimaryKey("run_id", "position")
    # No constraint in the database: it would take a lock per step for what the fenced INSERT already guarantees,
    # and a step whose data live in another database has its checkpoint there, where there is no run.
    run = models.ForeignKey(
        WorkflowRun,
        verbose_name=_("run"),
        on_delete=models.CASCADE,
        db_constraint=False,
        db_index=False,
        related_name="steps",
    )
    position = models.PositiveIntegerField(_("position"))
    name = models.CharField(_("name"), max_length=255)
    kind = models.CharField(_("kind"), max_length=12, choices=step_kind_choices, default=StepKind.STEP)
    status = models.CharField(_("status"), max_length=12, choices=step_status_choices, default=StepStatus.SUCCEEDED)
    output = models.TextField(_("output"), blank=True, default="")
    error = models.TextField(_("error"), blank=True, default="")
    exception = models.TextField(_("exception"), blank=True, default="")
    attempts = models.PositiveIntegerField(_("attempts"), default=1)
    # Which of the run's executions wrote it.
    attempt = models.PositiveIntegerField(_("run attempt"))
    # The alias of the database that holds the step's data, if it is not the run's own.
    database = models.CharField(_("database"), max_length=100, blank=True, default="")
    started_at = models.DateTimeField(_("started at"))
    finished_at = models.DateTimeField(_("finished at"))

    class Meta:
        verbose_name = _("step")
        verbose_name_plural = _("steps")
        ordering = ("run_id", "position")

    def __str__(self) -> str:
        return f"{self.position}. {self.name}"


class Message(models.Model):
    """Something sent to a run: taken once, in the order of sending, in the same commit as the step that takes it."""

    run = models.ForeignKey(
        WorkflowRun,
        verbose_name=_("run"),
        on_delete=models.CASCADE,
        db_constraint=False,
        db_index=False,
        related_name="messages",
    )
    topic = models.CharField(_("topic"), max_length=200, blank=True, default="")
    # Null, where repeats are not to be dropped: it is unique only where there is one.
    key = models.CharField(_("key"), max_length=200, null=True, blank=True)
    body = models.TextField(_("body"))
    created_at = models.DateTimeField(_("created at"))
    consumed_at = models.DateTimeField(_("consumed at"), null=True, blank=True)
    # The position of the step that took it: if that step is forgotten, the message is there again.
    consumed_by = models.PositiveIntegerField(_("consumed by"), null=True, blank=True)

    class Meta:
        verbose_name = _("message")
        verbose_name_plural = _("messages")
        ordering = ("pk",)
        constraints = (models.UniqueConstraint(fields=["run", "topic", "key"], name="durable_message_key"),)
        indexes = (
            models.Index(
                fields=["run", "topic", "id"], condition=Q(consumed_at__isnull=True), name="durable_message_unread"
            ),
            models.Index(fields=["run"], name="durable_message_run"),
        )

    def __str__(self) -> str:
        return f"{self.topic or _('message')} to {self.run_id}"


class Event(models.Model):
    """What a run has published about itself under a key; the latest value."""

    run = models.ForeignKey(
        WorkflowRun,
        verbose_name=_("run"),
        on_delete=models.CASCADE,
        db_constraint=False,
        db_index=False,
        related_name="events",
    )
    key = models.CharField(_("key"), max_length=200)
    value = models.TextField(_("value"))
    updated_at = models.DateTimeField(_("updated at"))

    class Meta:
        verbose_name = _("event")
        verbose_name_plural = _("events")
        ordering = ("run_id", "key")
        constraints = (models.UniqueConstraint(fields=["run", "key"], name="durable_event_key"),)

    def __str__(self) -> str:
        return f"{self.key} of {self.run_id}"


class StreamItem(models.Model):
    """One of the values that a run writes while it runs, in order; an empty one closes the stream."""

    run = models.ForeignKey(
        WorkflowRun,
        verbose_name=_("run"),
        on_delete=models.CASCADE,
        db_constraint=False,
        db_index=False,
        related_name="stream_items",
    )
    key = models.CharField(_("key"), max_length=200)
    position = models.PositiveIntegerField(_("position"))
    value = models.TextField(_("value"))
    # The position of the step that wrote it: a fork takes along what belongs to the steps that it keeps.
    step = models.PositiveIntegerField(_("step"))
    created_at = models.DateTimeField(_("created at"))

    class Meta:
        verbose_name = _("stream item")
        verbose_name_plural = _("stream items")
        ordering = ("run_id", "key", "position")
        constraints = (models.UniqueConstraint(fields=["run", "key", "position"], name="durable_stream_position"),)

    def __str__(self) -> str:
        return f"{self.key}[{self.position}] of {self.run_id}"


class Worker(models.Model):
    """A process that executes runs. Its row is its runs' lease: no row, or an expired one, and they are anybody's."""

    # Random for every process that ever starts; a host's name or a pid comes back, and hides its dead namesake.
    id = models.CharField(_("id"), primary_key=True, max_length=32)
    kind = models.CharField(_("kind"), max_length=12, default="worker")
    host = models.CharField(_("host"), max_length=200)
    pid = models.PositiveIntegerField(_("pid"))
    # The space of process ids and the process's start: on one machine a dead pid is known at once.
    machine = models.CharField(_("machine"), max_length=100, blank=True, default="")
    pid_started = models.BigIntegerField(_("process start"), null=True, blank=True)
    # PostgreSQL: the advisory lock that the process's listening session holds; gone with the session, on any machine.
    session_key = models.BigIntegerField(_("session key"), null=True, blank=True)
    queues = models.JSONField(_("queues"), default=list, blank=True, help_text=_("Empty: all queues."))
    version = models.CharField(_("version"), max_length=200, blank=True, default="")
    started_at = models.DateTimeField(_("started at"))
    last_seen = models.DateTimeField(_("last seen"))
    expires_at = models.DateTimeField(_("expires at"))

    class Meta:
        verbose_name = _("worker")
        verbose_name_plural = _("workers")
        ordering = ("started_at",)

    def __str__(self) -> str:
        return f"{self.kind} {self.pid} on {self.host}"
