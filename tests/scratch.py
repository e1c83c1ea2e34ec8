"""Directories for one test session: nobody else enters them, and they do not outlive it for long.

Who makes one holds a lock on it. The kernel frees that lock however the process ends, so that the next session
knows what a killed one left behind, and removes it, with the database server that may still run in it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# PostgreSQL refuses to run as root. `nobody` is there everywhere, and owns nothing.
SERVER_USER = "nobody" if os.geteuid() == 0 else None

# The address of a unix socket holds about a hundred characters, of which ours takes some forty.
LONGEST_PLACE = 60


@contextmanager
def scratch_directory() -> Iterator[Path]:
    """A new empty directory, removed at the end."""
    base = scratch_base()
    with (base / "lock").open("w") as gate:
        # One at a time: a directory that is just being made has no lock on it yet, and looks left behind.
        fcntl.flock(gate, fcntl.LOCK_EX)
        sweep(base)
        path = Path(tempfile.mkdtemp(dir=base))
        owner = (path / "owner").open("w")
        fcntl.flock(owner, fcntl.LOCK_EX)
    if SERVER_USER:
        shutil.chown(path, SERVER_USER)
    with owner:
        try:
            yield path
        finally:
            remove(path)


def scratch_base() -> Path:
    """This user's folder for such directories, made if it is missing."""
    # TMPDIR may be too long for a socket, or closed to the server's user; /tmp is neither.
    places = [Path(tempfile.gettempdir()).resolve(), Path("/tmp").resolve()]
    base = next((place for place in places if fits(place)), places[0]) / f"durable-tests-{os.geteuid()}"
    base.mkdir(mode=0o711, exist_ok=True)  # the server's user passes through; the directories in it are 0700
    if base.is_symlink() or base.stat().st_uid != os.geteuid():
        raise PermissionError(f"{base} belongs to somebody else. Remove it, or set TMPDIR to a directory of yours.")
    return base


def fits(place: Path) -> bool:
    open_to_all = all(folder.stat().st_mode & 0o001 for folder in [place, *place.parents])
    return len(str(place)) <= LONGEST_PLACE and (open_to_all or not SERVER_USER)


def sweep(base: Path) -> None:
    """Remove what killed sessions left: the directories whose lock nobody holds."""
    for path in base.glob("*/"):
        try:
            with (path / "owner").open("r+") as owner:
                fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove(path)
        except BlockingIOError:  # in use
            pass
        except FileNotFoundError:  # its session is removing it now, or was killed while doing so
            remove(path)


def remove(path: Path) -> None:
    if (path / "data" / "postmaster.pid").exists():
        from tests.postgres import kill_server

        kill_server(path / "data")
    shutil.rmtree(path, ignore_errors=True)
