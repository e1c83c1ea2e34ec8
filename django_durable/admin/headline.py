"""What is happening to a run, and why, in one sentence."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from django.utils.translation import gettext, ngettext

from django_durable.admin import values, words
from django_durable.clock import DatabaseNow
from django_durable.engine import registry
from django_durable.engine.steering import PAUSED
from django_durable.models import StepCheckpoint, Worker, WorkflowRun
from django_durable.states import RunStatus, StepStatus


@dataclass(frozen=True)
class Seen:
    """What the sentence is made from: the run, its error as far as the reader may see it, and the database's time."""

    run: WorkflowRun
    error: str
    now: datetime
    alias: str

    def since(self, moment: datetime | None) -> str:
        return words.between(moment, self.now)

    def took(self) -> str:
        """How long the run took, from its first execution; one that never began, from its start."""
        return words.between(self.run.started_at or self.run.created_at, self.run.finished_at)


def sentence(seen: Seen) -> str:
    match seen.run.status:
        case RunStatus.PENDING:
            return _pending(seen)
        case RunStatus.RUNNING:
            return _running(seen)
        case RunStatus.WAITING:
            return _waiting(seen)
        case RunStatus.SUCCEEDED:
            return gettext("Succeeded after %(took)s.") % {"took": seen.took()}
        case RunStatus.FAILED:
            return gettext("Failed after %(took)s: %(error)s") % {"took": seen.took(), "error": seen.error}
        case RunStatus.CANCELLED:
            return _cancelled(seen)
        case RunStatus.DEAD:
            return _dead(seen)
        case unknown:
            return gettext("Its status, %(status)s, is not known to this version.") % {"status": unknown}


def _pending(seen: Seen) -> str:
    run = seen.run
    facts = {"age": seen.since(run.run_after), "queue": run.queue, "workflow": run.workflow}
    alive = list(
        Worker.objects.using(seen.alias)
        .filter(kind="worker", expires_at__gt=DatabaseNow())
        .values_list("queues", flat=True)
    )
    serving = [queues for queues in alive if not queues or run.queue in queues]
    if not alive:
        return gettext("Pending, due for %(age)s: no worker is alive. Start one: manage.py durable_worker") % facts
    if not serving:
        return gettext("Pending, due for %(age)s: no live worker takes the queue %(queue)s.") % facts
    if registry.find(run.workflow) is None:
        return (
            gettext(
                "Pending, due for %(age)s: the workflow %(workflow)s is not known here. Its workers may know it; "
                "if none does, it stays pending."
            )
            % facts
        )
    sentence = ngettext(
        "Pending, due for %(age)s: %(count)d live worker takes its queue.",
        "Pending, due for %(age)s: %(count)d live workers take its queue.",
        len(serving),
    )
    return sentence % {**facts, "count": len(serving)}


def _running(seen: Seen) -> str:
    worker = Worker.objects.using(seen.alias).filter(pk=seen.run.worker).first()
    if worker is None:
        return gettext("Its process is gone; the next live worker recovers the run from its last completed step.")
    facts = {
        "host": worker.host,
        "pid": worker.pid,
        "good": words.clock(worker.expires_at, seen.now),
        "seen": seen.since(worker.last_seen),
    }
    if worker.expires_at <= seen.now:
        return (
            gettext(
                "Its process on %(host)s (pid %(pid)d) was last heard of %(seen)s ago and its lease has run out; "
                "the next live worker recovers the run."
            )
            % facts
        )
    if worker.kind == "worker":
        sentence = gettext("Running on a worker on %(host)s (pid %(pid)d); its lease is good until %(good)s.")
    else:
        sentence = gettext("Running in a web process on %(host)s (pid %(pid)d); its lease is good until %(good)s.")
    return sentence % facts


def _waiting(seen: Seen) -> str:
    run = seen.run
    what, _colon, name = run.waiting_for.partition(":")
    if what == PAUSED:
        return gettext("Paused: it goes on when it is resumed.")
    if (awaited := _awaited(what, name)) is not None:
        return _waiting_for(seen, awaited)
    purposes = {
        "start": gettext("to start"),
        "sleep": gettext("asleep"),
        "retry": gettext("to retry %(name)s") if name else gettext("to try again after %(error)s"),
        "recovery": gettext("to be recovered, its process died"),
    }
    purpose = purposes.get(what, gettext("for %(waiting_for)s")) % {
        "name": name,
        "error": seen.error,
        "waiting_for": run.waiting_for,
    }
    if run.wake_at is None:
        sentence = gettext("Waiting %(purpose)s")
    elif run.wake_at > seen.now:
        sentence = gettext("Waiting until %(until)s (in %(left)s) %(purpose)s")
    else:
        sentence = gettext("Due for %(late)s %(purpose)s, and no live worker has taken it up")
    facts = {"purpose": purpose}
    if run.wake_at is not None:
        facts["until"] = words.clock(run.wake_at, seen.now)
        facts["left"] = words.between(seen.now, run.wake_at)
        facts["late"] = seen.since(run.wake_at)
    return sentence % facts


def _awaited(what: str, name: str) -> str | None:
    """What somebody else has to bring about, in words; None: only time has to pass."""
    if what == "event":
        run_id, _colon, key = name.rpartition(":")
        return gettext("the event “%(key)s” of run %(run)s") % {"key": key, "run": run_id}
    sentences = {
        "message": gettext("a message “%(name)s”") if name else gettext("a message"),
        "run": gettext("the end of run %(name)s"),
        "children": gettext("the end of one of its child runs"),
        "approval": gettext("somebody to decide “%(name)s”"),
    }
    return sentences[what] % {"name": name} if what in sentences else None


def _waiting_for(seen: Seen, awaited: str) -> str:
    run = seen.run
    steps = StepCheckpoint.objects.using(seen.alias).filter(run=run.pk, status=StepStatus.WAITING)
    began, until = steps.order_by("-position").values_list("started_at", "finished_at").first() or (None, None)
    facts = {"awaited": awaited}
    sentence = gettext("Waits for %(awaited)s")
    if began is not None and until is not None:
        facts |= {"since": seen.since(began), "until": words.clock(until, seen.now)}
        sentence = gettext("Has waited for %(since)s for %(awaited)s")
        if until > began:
            sentence = gettext("Has waited for %(since)s for %(awaited)s, until %(until)s at most")
    return f"{sentence % facts}."


def _cancelled(seen: Seen) -> str:
    run = seen.run
    if run.cancel_reason == "timeout":
        return gettext("Cancelled after %(took)s: its time was up.") % {"took": seen.took()}
    facts = {"took": seen.took(), "reason": run.cancel_reason}
    sentence = (
        gettext("Cancelled after %(took)s: %(reason)s") if facts["reason"] else gettext("Cancelled after %(took)s.")
    )
    return sentence % facts


def _dead(seen: Seen) -> str:
    kind = values.error_type(seen.error)
    facts = {"error": seen.error, "times": seen.run.recoveries}
    if kind == "RunDead":
        return gettext("Dead: its process died %(times)d times while it ran. Mend the cause, then resume it.") % facts
    if kind == "NonDeterminism":
        return gettext("Dead: its code no longer fits its history. Mend the code, then resume it.") % facts
    return gettext("Dead until its cause is mended and it is resumed: %(error)s") % facts
