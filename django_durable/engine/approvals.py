"""Decisions of people: what a run asks for, who may answer, and the one answer that stands.

While a run waits, its checkpoint holds what is asked, and then the decision: one UPDATE that finds it undecided. The
row is the lock, too: the run looks at it locked before it gives up or goes on waiting, so that of two people, or of a
person and the deadline, one comes first, and the other sees it. The run itself makes the decision its outcome.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, NamedTuple, NoReturn

from django.core.exceptions import PermissionDenied
from django.forms import BaseForm

from django_durable import compat
from django_durable.clock import DatabaseNow
from django_durable.conf import check_text
from django_durable.engine import endings, payloads, steering
from django_durable.engine.checkpoints import Outcome
from django_durable.exceptions import AlreadyDecided, InvalidInput, NothingToDecide, RunNotFound, SerializationError
from django_durable.models import StepCheckpoint, WorkflowRun
from django_durable.serialization.types import find_class, name_of
from django_durable.states import UNFINISHED, RunStatus, StepKind, StepStatus


class PendingApproval(NamedTuple):
    """What a run waits for a person to decide."""

    name: str
    position: int
    # What the person has to be allowed, and the form of what they fill in: both as they were when the run began to
    # wait.
    permission: str | None
    form: str | None
    asked_at: datetime
    deadline: datetime | None

    def form_class(self) -> type[BaseForm] | None:
        """The form; raise SerializationError if there is no such class any more."""
        return None if self.form is None else _form_of(self.form)


def step_name(approval: str) -> str:
    return f"approval {approval}"


def waiting_key(approval: str) -> str:
    return f"approval:{approval}"


def form_path(form: type[BaseForm] | None) -> str | None:
    """The name under which a form is found again in another process; raise TypeError if there is none."""
    if form is None:
        return None
    if not (isinstance(form, type) and issubclass(form, BaseForm)):
        raise TypeError(f"form takes a Form class, found {form!r}.")
    path = name_of(form)
    try:
        found: type | None = find_class(path)
    except SerializationError:
        found = None
    if found is not form:
        raise TypeError(f"form takes a class at the top of a module, which every process can find; found {path}.")
    return path


def pending(alias: str, run_id: str) -> list[PendingApproval]:
    """What the run waits for people to decide, in its order."""
    if not WorkflowRun.objects.using(alias).filter(pk=run_id, status__in=UNFINISHED).exists():
        return []
    steps = StepCheckpoint.objects.using(alias).filter(run=run_id, kind=StepKind.APPROVAL, status=StepStatus.WAITING)
    return [_pending(step) for step in steps.order_by("position") if _noted(step)["decision"] is None]


def question(permission: str | None, form: type[BaseForm] | None) -> dict[str, str | None]:
    """What the checkpoint holds while the run waits: what is asked, and later the decision and a word on it."""
    return {"permission": permission, "form": form_path(form), "decision": None, "how": None}


def _noted(step: StepCheckpoint) -> dict[str, Any]:
    noted: dict[str, Any] = payloads.load(step.output, f"Run {step.run_id}, step {step.position} ({step.name})")
    return noted


def _pending(step: StepCheckpoint) -> PendingApproval:
    asked = _noted(step)
    deadline = step.finished_at if step.finished_at > step.started_at else None
    return PendingApproval(
        step.name.removeprefix(step_name("")),
        step.position,
        asked["permission"],
        asked["form"],
        step.started_at,
        deadline,
    )


def decided(alias: str, run_id: str, position: int) -> Outcome | None:
    """The decision, if somebody has made it; in the transaction that takes it, goes on waiting, or gives up."""
    steps = StepCheckpoint.objects.using(alias).filter(run=run_id, position=position, status=StepStatus.WAITING)
    for step in compat.locked(steps):
        if (decision := _noted(step)["decision"]) is not None:
            return Outcome(StepStatus.SUCCEEDED, output=decision)
    return None


def decide(
    alias: str,
    run_id: str,
    name: str,
    approved: bool,
    *,
    by: Any = None,
    data: Any = None,
    position: int | None = None,
) -> None:
    """Decide what the run waits for, in the caller's transaction; see `RunHandle.decide`."""
    check_text("name", name, 200)
    if not isinstance(approved, bool):
        raise TypeError(f"decide() takes approved as True or False, found {approved!r}.")
    who = _username(by)
    with compat.write_transaction(alias):
        run_id = steering.latest(alias, run_id)
        runs = WorkflowRun.objects.using(alias).filter(pk=run_id)
        facts = runs.values_list("status", "waiting_for", DatabaseNow()).first()
        if facts is None:
            raise RunNotFound(run_id, alias)
        status, waiting_for, now = facts
        steps = StepCheckpoint.objects.using(alias).filter(run=run_id, kind=StepKind.APPROVAL, name=step_name(name))
        if position is not None:
            steps = steps.filter(position=position)
        step = next((step for step in steps.order_by("position") if _is_open(step)), None)
        if step is None or status not in UNFINISHED:
            _refuse(run_id, name, status, waiting_for, steps.order_by("position").last())
        asked = _pending(step)
        _check_permission(asked, by, who, run_id)
        if asked.deadline is not None and now >= asked.deadline:
            # Whether a worker has seen it or not.
            raise AlreadyDecided(run_id, name, _closed(asked.deadline))
        if approved and (form := asked.form_class()) is not None:
            data = _cleaned(form, data)
        decision = {"approved": approved, "by": who, "data": data, "decided_at": now, "timed_out": False}
        place = f"The decision on approval {name!r} of run {run_id}"
        noted = {**_noted(step), "decision": payloads.dump(decision, place), "how": _how(approved, who, now)}
        undecided = steps.filter(position=step.position, status=StepStatus.WAITING, output=step.output)
        if not undecided.update(output=payloads.dump(noted, place)):
            _refuse(run_id, name, status, waiting_for, steps.filter(position=step.position).first())
        endings.wake(runs.filter(waiting_for=waiting_key(name)))


def _username(by: Any) -> str | None:
    if by is None:
        return None
    if not hasattr(by, "get_username"):
        raise TypeError(f"decide() takes by as a user, found {type(by).__name__}: {by!r}.")
    return str(by.get_username()) or None


def _check_permission(asked: PendingApproval, by: Any, who: str | None, run_id: str) -> None:
    if asked.permission is not None and (by is None or not by.has_perm(asked.permission)):
        raise PermissionDenied(
            f"Approval {asked.name!r} of run {run_id} takes the permission {asked.permission!r}, which "
            f"{who or 'nobody'} does not have."
        )


def _cleaned(form: type[BaseForm], data: Any) -> dict[str, Any]:
    if not isinstance(data, Mapping | None):
        raise TypeError(f"decide() takes the form's data as a dict, found {type(data).__name__}: {data!r}.")
    # None would make a form that is not filled in, and has no errors to tell.
    filled: Any = form(data={} if data is None else data)
    if not filled.is_valid():
        raise InvalidInput(filled.errors.as_data())
    return dict(filled.cleaned_data)


def _form_of(path: str) -> type[BaseForm]:
    found = find_class(path)
    if not issubclass(found, BaseForm):
        raise SerializationError(f"an approval's form is stored as {path!r}, which is no Form class.")
    return found


def _is_open(step: StepCheckpoint) -> bool:
    return step.status == StepStatus.WAITING and _noted(step)["decision"] is None


def _how(approved: bool, who: str | None, at: datetime) -> str:
    return f"was {'approved' if approved else 'rejected'} by {who or 'somebody'} at {at:%Y-%m-%d %H:%M:%S %Z}"


def _closed(deadline: datetime) -> str:
    return f"was open until {deadline:%Y-%m-%d %H:%M:%S %Z}"


def _refuse(run_id: str, name: str, status: str, waiting_for: str, last: StepCheckpoint | None) -> NoReturn:
    """Raise what tells the caller why there is nothing to decide."""
    if last is not None and not _is_open(last):
        noted = _noted(last)
        if last.status == StepStatus.WAITING:
            how = noted["how"]
        elif noted["timed_out"]:
            how = _closed(last.finished_at)
        else:
            how = _how(noted["approved"], noted["by"], noted["decided_at"])
        raise AlreadyDecided(run_id, name, how)
    waits = status == RunStatus.WAITING and waiting_for
    raise NothingToDecide(run_id, name, f"waits for {waiting_for!r}" if waits else f"is {status}")
