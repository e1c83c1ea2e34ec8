"""The pytest plugin: what a test did to the durable clock ends with it. Imports nothing of Django."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _durable_clock() -> Iterator[None]:
    yield
    clock = sys.modules.get("django_durable.clock")
    if clock is not None:
        clock.reset()
