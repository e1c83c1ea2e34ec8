"""Everything that this package raises on purpose.

Each class takes facts and writes its own sentence: the run, the step, what was found and what to do.
What users catch is a `DurableError`. `LeaseLost`, `Parked` and `Cancelled` unwind a workflow that may not go on
here; they are `BaseException`s, so that a workflow's ``except Exception`` cannot swallow them.
"""

from __future__ import annotations

from typing import Any

from django.core.exceptions import ValidationError


class DurableError(Exception):
    """The root of all errors of this package."""


class InsideTransaction(DurableError, RuntimeError):
    """A workflow was called directly inside a transaction, whose rollback would undo its checkpoints."""

    def __init__(self, workflow: str, database: str) -> None:
        super().__init__(
            f"Workflow {workflow!r} was called directly inside a transaction on database {database!r}: "
            "its steps could not commit. Use .start(), which stores the run with your transaction, "
            "or call it outside atomic() and ATOMIC_REQUESTS."
        )

    @classmethod
    def waiting(cls, run_id: str, database: str, what: str = "result()") -> InsideTransaction:
        return cls._saying(
            f"{what} would wait for run {run_id} without limit inside a transaction on database {database!r}: if the "
            "run was started in it, no worker sees it before the commit. Wait behind the transaction, pass timeout=, "
            "or in a test call run_until_idle() first."
        )

    @classmethod
    def step(cls, step: str, run_id: str, database: str) -> InsideTransaction:
        return cls._saying(
            f"Step {step!r} of run {run_id} was called inside a transaction on database {database!r} that the "
            "workflow opened: its checkpoint could not commit. Move the atomic() block into an atomic step."
        )

    @classmethod
    def pausing(cls, step: str, run_id: str) -> InsideTransaction:
        return cls._saying(
            f"Step {step!r} of run {run_id} pauses its own run inside its transaction, which that would undo. "
            "Pause it from a step with atomic=False, or from outside."
        )

    @classmethod
    def _saying(cls, sentence: str) -> InsideTransaction:
        error = cls.__new__(cls)
        RuntimeError.__init__(error, sentence)
        return error


class InvalidInput(DurableError, ValidationError):
    """`validate` refused a workflow's arguments; nothing was stored. Carries the validator's own messages."""

    def __init__(self, message: Any, code: str | None = None, params: dict[str, Any] | None = None) -> None:
        ValidationError.__init__(self, message, code, params)


class SerializationError(DurableError):
    """A value cannot be stored, or a stored one cannot be read.

    `problem` says what was found and what to do; `place` names the run, step or argument.
    """

    def __init__(self, problem: str, place: str = "") -> None:
        self.problem = problem
        self.place = place
        super().__init__(f"{place}: {problem}" if place else problem)

    def at(self, place: str) -> SerializationError:
        """Return the same error with the place where it happened."""
        return type(self)(self.problem, place)


class PayloadTooLarge(SerializationError):
    """A value's stored text is longer than ``DURABLE["MAX_PAYLOAD_BYTES"]``."""

    @classmethod
    def of(cls, size: int, limit: int) -> PayloadTooLarge:
        return cls(
            f"the value takes {size:,} bytes, the limit is {limit:,}. Store it elsewhere (a file, a model) and "
            'pass a reference, or raise DURABLE["MAX_PAYLOAD_BYTES"].'
        )


class RunNotFound(DurableError):
    """There is no run of this id."""

    def __init__(self, run_id: str, database: str) -> None:
        super().__init__(
            f"There is no run {run_id!r} in database {database!r}. It was never committed, was pruned, "
            "or lives in another database: pass database=..."
        )


class RunIdInUse(DurableError):
    """The run id belongs to a run of another workflow."""

    def __init__(self, run_id: str, found: str, wanted: str) -> None:
        super().__init__(
            f"Run id {run_id!r} belongs to a run of {found!r}, so {wanted!r} cannot use it. "
            "Choose another id, for example one with the workflow's name in front."
        )


class NotInWorkflow(DurableError):
    """Something that only a running workflow can do was called outside one."""

    def __init__(self, name: str, where: str = "outside a workflow") -> None:
        super().__init__(
            f"{name} was called {where}. Call it from a function decorated with @durable.workflow, "
            "while that runs, and not from inside a step."
        )


class StepFailed(DurableError):
    """A step failed with an exception whose class cannot be rebuilt; holds its type's name and its text."""

    def __init__(self, type_name: str, text: str, step: str = "") -> None:
        self.type_name = type_name
        self.text = text
        super().__init__(f"{f'step {step!r} failed with ' if step else ''}{type_name}: {text}")


class StepTimeout(DurableError):
    """A step took longer than its `timeout`."""

    def __init__(self, step: str, run_id: str, seconds: float) -> None:
        super().__init__(
            f"Step {step!r} of run {run_id} took longer than its timeout of {seconds:g} s and was stopped. "
            "Raise the step's timeout=, or make it do less."
        )


class RunFailed(DurableError):
    """A run failed with an exception whose class cannot be rebuilt; holds its type's name and its text."""

    def __init__(self, run_id: str, type_name: str, text: str) -> None:
        self.run_id = run_id
        self.type_name = type_name
        self.text = text
        super().__init__(f"Run {run_id} failed with {type_name}: {text}")


class RunCancelled(DurableError):
    """The run was cancelled, so it has no result."""

    def __init__(self, run_id: str, reason: str = "") -> None:
        self.run_id = run_id
        self.reason = reason
        super().__init__(
            f"Run {run_id} was cancelled{f' ({reason})' if reason else ''}. resume() lets it go on from its last "
            "completed step."
        )


class RunDead(DurableError):
    """The run was set aside for a person, so it has no result."""

    def __init__(self, run_id: str, error: str = "") -> None:
        self.run_id = run_id
        first_line = error.partition("\n")[0]
        super().__init__(
            f"Run {run_id} is DEAD{f': {first_line}' if first_line else ''}. Mend its cause, then resume() lets it "
            "go on from its last completed step."
        )

    @classmethod
    def crashed(cls, run_id: str, crashes: int, limit: int) -> RunDead:
        return cls(
            run_id,
            f"it was being executed when its process died, {crashes} times (max_recoveries={limit}); "
            "it may be what kills the workers",
        )


class NonDeterminism(DurableError):
    """Replay reached another step than the one recorded: the code no longer fits the run's history."""

    def __init__(self, run_id: str, position: int, recorded: str, called: str) -> None:
        super().__init__(
            f"Run {run_id}, step {position}: recorded {recorded!r}, the code now calls {called!r}. "
            "Restore the order and names of the steps, then resume() the run."
        )


class AlreadyDecided(DurableError):
    """An approval has its decision, or its time is over: the first decision stands."""

    def __init__(self, run_id: str, approval: str, how: str) -> None:
        super().__init__(f"Approval {approval!r} of run {run_id} {how}. That stands.")


class NothingToDecide(DurableError):
    """The run does not wait for this approval."""

    def __init__(self, run_id: str, approval: str, found: str) -> None:
        super().__init__(
            f"Run {run_id} does not wait for an approval {approval!r}: it {found}. Decide when it is WAITING for that "
            "approval, by the name that its workflow gives to approval()."
        )


class NothingDue(DurableError):
    """In a test, a run was called directly that waits for what nobody can bring about while the call lasts."""

    def __init__(self, run_id: str, waiting_for: str) -> None:
        super().__init__(
            f"Run {run_id} was called directly, waits for {waiting_for!r}, and nothing else is due in this test. Start "
            "it with .start(), let run_until_idle() execute it, and bring about what it waits for."
        )


class WorkflowNotRegistered(DurableError):
    """No workflow of this name is known to this process."""

    def __init__(self, name: str, near: str | None = None) -> None:
        super().__init__(
            f"No workflow is registered as {name!r} here{f'; did you mean {near!r}?' if near else '.'} "
            "Is its app in INSTALLED_APPS and its module named workflows.py, or was it renamed without aliases=?"
        )


class TablesMissing(DurableError):
    """A worker cannot use its tables."""

    def __init__(self, database: str, found: str) -> None:
        super().__init__(f"Database {database!r} does not have this version's tables ({found}). Run manage.py migrate.")


class QueryOutsideStep(DurableError):
    """STRICT: the workflow's body queried the database, where a replay would see other rows."""

    def __init__(self, run_id: str, sql: str) -> None:
        super().__init__(
            f"Run {run_id} queried the database in the workflow's body, outside a step; a replay would see other rows "
            f'and take another course: {sql[:200]!r}. Move it into a step, or set DURABLE["STRICT"] to False.'
        )


class GiveUp(DurableError):
    """Raise it in a step to stop retrying: ``raise GiveUp("...") from exc``; the workflow sees `exc`."""


class RetryAfter(DurableError):
    """Raise it in a step to be tried again after `seconds` (a number or a timedelta), once."""

    def __init__(self, seconds: Any) -> None:
        from django_durable.conf import as_seconds

        self.seconds = as_seconds(seconds, "RetryAfter")
        super().__init__(f"retry after {self.seconds:g} s")


class LeaseLost(BaseException):
    """The run may not go on here; whatever this process still does for it is not recorded. `crashed`: as by a crash."""

    def __init__(self, reason: str, *, crashed: bool = False) -> None:
        self.crashed = crashed
        super().__init__(reason)


class Parked(BaseException):
    """The run has to wait and was stored as WAITING; the workflow leaves this thread and is replayed later."""


class Cancelled(BaseException):
    """The run was cancelled; the workflow ends here."""


class ContinueAsNew(BaseException):
    """What `continue_as_new` ends a run with: another goes on for it, with these arguments as they are stored."""

    def __init__(self, text: str) -> None:
        self.text = text
        super().__init__("the run goes on as a new one")


class Halt(BaseException):
    """The run cannot be replayed; `error` says why. Not the workflow's to catch: it would go on from nowhere."""

    def __init__(self, error: DurableError) -> None:
        self.error = error
        super().__init__(str(error))


class Crash(BaseException):
    """What `django_durable.testing` raises where a real process would be killed: nothing may be stored after it."""
