"""Each test begins with no calls noted."""

import pytest

from tests.parallel.common import calls


@pytest.fixture(autouse=True)
def fresh_calls():
    calls.clear()
