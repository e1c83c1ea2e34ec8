"""Scenarios: real processes, really killed. A file that is about one database is collected on that one only."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.scenarios.harness import Stage, Zygote

HERE = Path(__file__).parent
ABOUT = {"sqlite": "test_sqlite_", "postgresql": "test_postgresql_"}
elsewhere = tuple(prefix for vendor, prefix in ABOUT.items() if vendor != os.environ["DURABLE_EXPECT_VENDOR"])
collect_ignore_glob = [f"{prefix}*.py" for prefix in elsewhere]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A file that was named on the command line is collected all the same."""
    off = [item for item in items if item.path.parent == HERE and item.path.name.startswith(elsewhere)]
    if off:
        config.hook.pytest_deselected(items=off)
        items[:] = [item for item in items if item not in off]


@pytest.fixture(scope="session")
def zygotes() -> Iterator[dict[str, Zygote]]:
    """The processes that fork the scenarios' ones, by database: one for a whole session."""
    made: dict[str, Zygote] = {}
    yield made
    for zygote in made.values():
        zygote.end()


@pytest.fixture
def stage(
    transactional_db: None, process_env: dict[str, str], zygotes: dict[str, Zygote], tmp_path: Path
) -> Iterator[Stage]:
    environment = {
        **process_env,
        "DJANGO_SETTINGS_MODULE": "tests.scenarios.settings",
        "DURABLE_TEST_LOG": "WARNING",
    }
    database = environment["DURABLE_TEST_DATABASE"]
    if database not in zygotes:
        zygotes[database] = Zygote(environment)
    stage = Stage(tmp_path, environment, zygotes[database])
    yield stage
    stage.close()
