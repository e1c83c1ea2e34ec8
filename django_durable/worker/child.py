"""The first lines of a spawned worker process. Imports nothing that needs Django to be set up: it is not, yet."""

from __future__ import annotations

import os
import threading
import time
from typing import Any


def work(alias: str, parent: int, verbosity: int, settings: dict[str, Any]) -> None:
    """Be one of a supervisor's workers, until told to stop or left alone."""
    import django

    django.setup()
    from django_durable.conf import options
    from django_durable.worker.command import log_to_stderr, run_until_signalled
    from django_durable.worker.loop import Worker

    log_to_stderr(verbosity)
    worker = Worker(alias, **settings)

    def stop_without_parent() -> None:
        # Nobody else would ever stop or replace this process.
        while os.getppid() == parent:
            time.sleep(options().POLL_INTERVAL)
        worker.stop()

    threading.Thread(target=stop_without_parent, name="parent-watch", daemon=True).start()
    run_until_signalled(worker)
