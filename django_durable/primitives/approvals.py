"""`approval`: a person decides, and the run waits for that without a thread."""

from __future__ import annotations

from collections.abc import Coroutine
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from asgiref.sync import markcoroutinefunction
from django.forms import BaseForm

from django_durable.conf import as_seconds, check_text
from django_durable.engine import approvals, payloads
from django_durable.engine.asynchronous.awaitables import awaitable
from django_durable.engine.calls import Awaited, Call, body
from django_durable.engine.checkpoints import Outcome
from django_durable.states import StepKind, StepStatus


@dataclass(frozen=True, slots=True)
class Decision:
    """What a person has decided; or that nobody has in time.

    `by` is the user's name as text, None if none was given. `data`: what the form has cleaned, or what was passed.
    `decided_at` is None behind a timeout.
    """

    approved: bool
    by: str | None
    data: Any
    decided_at: datetime | None
    timed_out: bool


def approval(
    name: str,
    permission: str | None = None,
    form: type[BaseForm] | None = None,
    timeout: float | timedelta | None = None,
) -> Decision:
    """Wait until a person decides, in the admin or by `RunHandle.decide`, and return the `Decision`.

    `name`: 1 to 200 characters; the same name again, as in a loop, is another decision. `permission`: what who decides
    must be allowed, such as ``"shop.approve_order"``. `form`: a Form class for what they fill in, at the top of a
    module. After `timeout` (seconds or timedelta, kept over restarts; None waits without limit) the decision is
    ``approved=False, timed_out=True``. Raises NotInWorkflow outside a workflow's body.
    """
    context = body("approval")
    check_text("name", name, 200)
    if permission is not None:
        check_text("permission", permission, 255)
    asked = approvals.question(permission, form)
    seconds = None if timeout is None else as_seconds(timeout, "timeout")
    call = Call(context, approvals.step_name(name), StepKind.APPROVAL)

    def look() -> Outcome | None:
        # Nobody can decide what was not asked yet.
        return None if call.recorded is None else approvals.decided(context.alias, context.run_id, call.position)

    def nobody() -> Outcome:
        late = {"approved": False, "by": None, "data": None, "decided_at": None, "timed_out": True}
        return Outcome(StepStatus.SUCCEEDED, output=payloads.dump(late, call.place))

    if call.done:
        return Decision(**call.answer())
    whom = Awaited(approvals.waiting_key(name))
    note = payloads.dump(asked, call.place)
    return Decision(**call.wait(look, lambda: whom, timeout=seconds, otherwise=nobody, note=note))


@markcoroutinefunction
def aapproval(
    name: str,
    permission: str | None = None,
    form: type[BaseForm] | None = None,
    timeout: float | timedelta | None = None,
) -> Coroutine[Any, Any, Decision]:
    """See approval()."""
    return awaitable("aapproval", approval, name, permission, form, timeout)
