"""Each test begins with nothing seen."""

from __future__ import annotations

import pytest

from tests.asynchronous.common import gates, seen


@pytest.fixture(autouse=True)
def _nothing_seen_yet():
    seen.clear()
    gates.clear()
