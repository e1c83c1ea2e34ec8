"""Several workers on one machine: processes started anew, not forked, and what is done when one dies."""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
import time
from multiprocessing.connection import wait
from typing import Any

from django.db import Error, connections
from django.db.models import QuerySet

from django_durable import compat
from django_durable.clock import DatabaseNow
from django_durable.engine import leases
from django_durable.models import Worker as WorkerRow
from django_durable.worker import child

logger = logging.getLogger("django_durable.worker")

# A fork would share its parent's connections and locks.
_spawn = multiprocessing.get_context("spawn")

# The longest pause before a process that keeps dying is started again.
RESTART_PAUSE = 10.0


class Supervisor:
    """Keeps `count` worker processes alive; gives the runs of one that died to the others at once."""

    def __init__(self, alias: str, count: int, verbosity: int, settings: dict[str, Any]) -> None:
        self.alias = alias
        self.verbosity = verbosity
        self.settings = settings
        self._slots: list[_Slot] = [_Slot() for _ in range(count)]
        self._stopping = threading.Event()
        self._at_once = False
        self._wake_in, self._wake_out = _spawn.Pipe(duplex=False)

    @property
    def ready(self) -> bool:
        """Whether every process is alive and has renewed its lease."""
        pids = [slot.process.pid for slot in self._slots if slot.process is not None]
        try:
            alive = self._rows(pids).filter(expires_at__gt=DatabaseNow()).values_list("pid").distinct().count()
            return not self._stopping.is_set() and alive == len(self._slots)
        except Error:
            return False
        finally:
            connections[self.alias].close()

    def stop(self, *, at_once: bool = False) -> None:
        self._at_once = at_once
        self._stopping.set()
        self._wake_out.send(None)

    def run(self) -> None:
        for slot in self._slots:
            self._start(slot)
        killing_at = None
        # One that is to be started again counts: all may be dead for a moment.
        while any(slot.process is not None or slot.restart_at is not None for slot in self._slots):
            sentinels = [slot.process.sentinel for slot in self._slots if slot.process is not None]
            for ready in wait([*sentinels, self._wake_in], timeout=0.1 if len(sentinels) < len(self._slots) else 0.5):
                if ready is self._wake_in:
                    self._wake_in.recv()
                    self._pass_on_stop()
                    killing_at = time.monotonic() + (5 if self._at_once else self.settings["grace"] + 10)
            for slot in self._slots:
                if slot.process is not None and not slot.process.is_alive():
                    self._bury(slot)
            if killing_at is not None and time.monotonic() > killing_at:
                for slot in self._slots:
                    if slot.process is not None:
                        slot.process.kill()
            self._restart_due()
        connections.close_all()

    def _rows(self, pids: list[int]) -> QuerySet[WorkerRow]:
        """The children's rows. Not by id: one that was taken for dead goes on under another."""
        here = WorkerRow.objects.using(self.alias).filter(host=compat.host_name(), machine=compat.machine_id())
        return here.filter(kind="worker", pid__in=pids)

    def _start(self, slot: _Slot) -> None:
        slot.started_at = time.monotonic()
        slot.process = _spawn.Process(
            target=child.work,
            args=(self.alias, os.getpid(), self.verbosity, self.settings),
            daemon=False,
        )
        slot.process.start()

    def _pass_on_stop(self) -> None:
        for slot in self._slots:
            if slot.process is not None:
                slot.process.terminate()

    def _bury(self, slot: _Slot) -> None:
        """Hand on what a dead process held, and plan its successor."""
        process, slot.process = slot.process, None
        code, pid = process.exitcode, process.pid
        process.close()
        if code == 0 and (self._stopping.is_set() or self.settings["burst"]):
            return
        logger.warning("A worker process ended with exit code %s", code)
        try:
            leases.bury(self.alias, self._rows([pid]).values_list("pk", flat=True))
            leases.recover(self.alias)
        except Error:
            connections[self.alias].close()
        if not self._stopping.is_set():
            # One that lived for a while is replaced at once; one that dies at its start is not, again and again.
            slot.deaths = 0 if time.monotonic() - slot.started_at > RESTART_PAUSE else slot.deaths + 1
            slot.restart_at = time.monotonic() + min(RESTART_PAUSE, 0.1 * 2**slot.deaths - 0.1)

    def _restart_due(self) -> None:
        for slot in self._slots:
            if slot.restart_at is None or self._stopping.is_set():
                slot.restart_at = None
            elif time.monotonic() >= slot.restart_at:
                slot.restart_at = None
                self._start(slot)


class _Slot:
    process: Any = None
    started_at = 0.0
    restart_at: float | None = None
    deaths = 0
