import pytest

from tests.serialization import samples


@pytest.fixture(autouse=True)
def calls():
    """What the sample classes' own code recorded. Reading stored text must leave it empty."""
    samples.calls.clear()
    yield samples.calls
    samples.calls.clear()
