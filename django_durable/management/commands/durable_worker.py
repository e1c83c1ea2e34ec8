"""``manage.py durable_worker``: argument parsing; the work is in `django_durable.worker`."""

from __future__ import annotations

from argparse import ArgumentParser
from typing import Any

from django.core.management.base import BaseCommand, CommandError
from django.db import connections

from django_durable.conf import options
from django_durable.engine.starting import database_of
from django_durable.exceptions import DurableError
from django_durable.worker.command import run_worker


class Command(BaseCommand):
    help = "Executes durable runs, and recovers those of processes that died. Run as many as you like."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--queue", action="append", default=[], metavar="NAME", help="Only this queue; repeatable.")
        parser.add_argument("--concurrency", type=int, metavar="N", help="Runs executed at a time, by each process.")
        parser.add_argument("--processes", type=int, default=1, metavar="N", help="Worker processes (default 1).")
        parser.add_argument("--burst", action="store_true", help="End when nothing is due.")
        parser.add_argument("--database", metavar="ALIAS", help="The database whose runs to execute.")
        parser.add_argument("--autoreload", action="store_true", help="Start anew when the code changes.")
        parser.add_argument("--health-port", type=int, metavar="PORT", help="Serve GET /healthz and /readyz there.")
        parser.add_argument(
            "--grace", type=float, default=30.0, metavar="SECONDS", help="Time to finish what runs, when told to stop."
        )

    def handle(self, *args: Any, **given: Any) -> None:
        alias = database_of(given["database"])
        if alias not in connections:
            raise CommandError(f"--database takes one of {', '.join(sorted(connections))}, found {alias!r}.")
        for name in ("concurrency", "processes"):
            if given[name] is not None and given[name] < 1:
                raise CommandError(f"--{name} takes a number from 1, found {given[name]}.")
        if given["grace"] < 0:
            raise CommandError(f"--grace takes seconds, 0 or more, found {given['grace']}.")
        if given["autoreload"] and (given["burst"] or given["processes"] > 1):
            raise CommandError("--autoreload is for one process that stays: leave --burst and --processes out.")
        try:
            self._run(alias, given)
        except (DurableError, OSError) as error:
            raise CommandError(str(error)) from error

    def _run(self, alias: str, given: dict[str, Any]) -> None:
        run_worker(
            alias,
            queues=given["queue"],
            concurrency=given["concurrency"] or options().WORKER_CONCURRENCY,
            processes=given["processes"],
            burst=given["burst"],
            autoreload=given["autoreload"],
            health_port=given["health_port"],
            grace=given["grace"],
            verbosity=given["verbosity"],
        )
