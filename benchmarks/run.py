"""How fast it is, beside the database alone.

    python benchmarks/run.py [--db sqlite|postgres|both] [--seconds N] [--json FILE]
    python benchmarks/run.py waiting [--db ...] [--parked N ...] [--executed N] [--parts NAME ...] [--json FILE]

The second one measures what runs that wait cost.

Starts a PostgreSQL of its own, with fsync on, and a SQLite file; measures each in a process of its own; prints one
table for each. It measures and does not judge: the exit status is 0 whether a target was met or not.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import waiting  # noqa: E402
from benchmarks.report import table  # noqa: E402
from tests.postgres import private_postgres, why_unavailable  # noqa: E402
from tests.scratch import scratch_directory  # noqa: E402

DATABASES = ("sqlite", "postgres")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", choices=["speed", "waiting"], default="speed")
    parser.add_argument("--db", choices=[*DATABASES, "both"], default="both")
    parser.add_argument(
        "--seconds", type=float, default=1.5, metavar="N", help="time for each side of a comparison (default 1.5)"
    )
    parser.add_argument(
        "--parked", type=int, nargs="+", default=waiting.SIZES, metavar="N", help="waiting: runs that are parked"
    )
    parser.add_argument(
        "--executed",
        type=int,
        default=waiting.EXECUTED,
        metavar="N",
        help="waiting: so many of them are executed up to their wait, the others are copies of their rows",
    )
    parser.add_argument(
        "--parts", nargs="+", choices=waiting.PARTS, default=waiting.PARTS, help="waiting: measure only these"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the numbers there")
    given = parser.parse_args()
    found, show = {}, waiting.table if given.what == "waiting" else table
    for name in DATABASES if given.db == "both" else [given.db]:
        if name == "postgres" and (reason := why_unavailable()):
            print(f"\nPostgreSQL was not measured: {reason}. `make bench` installs what is needed.")
            continue
        print(f"\n{name}: a private database", file=sys.stderr, flush=True)
        with database(name) as url:
            if given.what == "waiting":
                sizes, parts = map(str, given.parked), given.parts
                arguments = ["--parked", *sizes, f"--executed={given.executed}", "--parts", *parts]
                found[name] = measured(url, "benchmarks.waiting", arguments)
            else:
                found[name] = measured(url, "benchmarks.measure", [f"--seconds={given.seconds}"])
        print(show(found[name]), flush=True)
    if given.json:
        given.json.write_text(json.dumps(found, indent=2) + "\n")


@contextmanager
def database(name: str) -> Iterator[str]:
    """The URL of a new, empty database, gone at the end."""
    if name == "postgres":
        with private_postgres(fsync=True) as server:
            yield server.url
    else:
        with scratch_directory() as folder:
            yield f"sqlite:///{folder}/db.sqlite3"


def measured(url: str, module: str, arguments: list[str]) -> dict[str, Any]:
    """What this module, in a process of its own, finds out about this database."""
    environment = {**os.environ, "DATABASE_URL": url, "DJANGO_SETTINGS_MODULE": "benchmarks.settings"}
    with TemporaryDirectory() as folder:
        numbers = Path(folder) / "numbers.json"
        command = [sys.executable, "-m", module, *arguments, f"--json={numbers}"]
        subprocess.run(command, cwd=ROOT, env=environment, check=True)
        found: dict[str, Any] = json.loads(numbers.read_text())
        return found


if __name__ == "__main__":
    main()
