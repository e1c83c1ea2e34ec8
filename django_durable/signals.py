"""Sent after commit, and only then: to observe runs, never to steer them.

Each passes ``run_id``, ``workflow``, ``database`` and ``worker`` (the executing process's id), and:

- `run_started` (``attempt``): a run begins to execute for the first time.
- `step_recorded` (``position``, ``name``, ``kind``, ``status``, ``attempts``, ``attempt``): a step's outcome, or a
  failed try that will be repeated, is stored.
- `run_finished` (``status``, ``attempt``): a run ended. FAILED, CANCELLED and DEAD count as ends.
- `run_recovered` (``recoveries``): a run was taken from a process that died; ``worker`` is the dead one.

A receiver's exception is logged and goes no further.
"""

from django.dispatch import Signal

run_started = Signal()
run_finished = Signal()
step_recorded = Signal()
run_recovered = Signal()
