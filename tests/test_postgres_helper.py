"""tests/postgres.py: a database server that a test may kill."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.postgres import find_server, private_postgres


def test_what_was_committed_survives_a_kill(tmp_path):
    import psycopg

    with private_postgres(tmp_path) as server:
        first_pid = server.pid
        with server.connect() as connection:
            connection.execute("CREATE TABLE kept (word text)")
            connection.execute("INSERT INTO kept VALUES ('committed')")

        open_connection = server.connect()
        server.kill()
        assert server.pid is None
        with pytest.raises(psycopg.OperationalError):
            open_connection.execute("SELECT 1")
        with pytest.raises(psycopg.OperationalError):
            server.connect()
        open_connection.close()

        server.start()
        assert server.pid not in (None, first_pid)
        with server.connect() as connection:
            assert connection.execute("SELECT word FROM kept").fetchall() == [("committed",)]

        server.stop()
        assert server.pid is None
    assert "automatic recovery" in (tmp_path / "postgres.log").read_text()


def test_it_listens_on_a_private_socket_only():
    with private_postgres() as server, server.connect() as connection:
        assert connection.execute("SHOW listen_addresses").fetchone() == ("",)
        assert server.home.stat().st_mode & 0o077 == 0


def test_settings_and_durability_can_be_chosen():
    with private_postgres(fsync=True, max_connections=20) as server, server.connect() as connection:
        assert connection.execute("SHOW fsync").fetchone() == ("on",)
        assert connection.execute("SHOW max_connections").fetchone() == ("20",)


def test_nothing_stays_after_the_end():
    with private_postgres() as server:
        postmaster = find_server(server.data)
    assert find_server(server.data) is None
    assert not server.home.exists()
    assert not postmaster.is_running() or postmaster.status() == "zombie"


def test_the_next_session_removes_what_a_killed_one_left():
    script = (
        "import time\n"
        "from tests.postgres import private_postgres\n"
        "with private_postgres() as server:\n"
        "    print(server.home, flush=True)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as session:
        home = Path(session.stdout.readline().strip())
        session.kill()
    assert find_server(home / "data") is not None, "the server outlives its session: what this test is about"

    with private_postgres():
        assert find_server(home / "data") is None
        assert not home.exists()


def test_two_at_a_time_do_not_meet():
    with private_postgres() as one, private_postgres() as other:
        assert one.pid != other.pid
        with one.connect() as connection:
            connection.execute("CREATE TABLE only_here ()")
        with other.connect() as connection:
            assert connection.execute("SELECT to_regclass('only_here')").fetchone() == (None,)
