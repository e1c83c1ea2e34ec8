"""make demo and make serve, as they are."""

from __future__ import annotations

import re
import signal
import subprocess
from pathlib import Path

import httpx
import psutil
import pytest

from tests.testproject.processes import run, started

pytestmark = pytest.mark.timeout(180)  # the demo's own watchdog ends it after 120 s


def children_in(folder: Path) -> list[psutil.Process]:
    """Return the processes that work in this folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("SHOP_VAR") == str(folder.resolve()):
                found.append(process)
        except psutil.Error:
            pass  # ended meanwhile, or another user's
    return found


def steps_of(output: str, worker: str, run_id: str) -> list[tuple[str, str]]:
    """Return (step, what happened) of the lines of one worker and one run, in their order."""
    columns = re.compile(rf"worker {worker} +{run_id} +\d (\w+) +(.+)")
    return columns.findall(output)


def test_the_demo_proves_what_it_promises(tmp_path: Path):
    done = run("demo.py", "--folder", str(tmp_path / "demo"), timeout=150)
    output = done.stdout
    assert done.returncode == 0, output
    assert "0 lost, 0 double." in output
    assert re.search(r"requests reached the payment service, whose ledger has 3 charges", output), output
    assert len(re.findall(r"sold +paid +1 +1 +SUCCEEDED", output)) == 3, output
    assert "\033" not in output, "colours are for terminals"

    run_id, killed = re.search(r"demo +(order-\w+) +kill -9 (\d+)", output).groups()
    heir = re.search(rf"worker (\d+) +{run_id} +taken over", output)[1]
    assert heir != killed
    before = steps_of(output, killed, run_id)
    assert before[-1] == ("fulfil", "has done its writes, not committed")
    assert ("charge_card", "recorded") in before
    assert steps_of(output, heir, run_id) == [
        ("reserve_tickets", "answered from its checkpoint"),
        ("charge_card", "answered from its checkpoint"),
        ("fulfil", "executing"),
        ("fulfil", "recorded"),
        ("send_confirmation", "executing"),
        ("send_confirmation", "recorded"),
    ]

    assert "make serve" in output
    assert "user admin, password admin" in output
    assert children_in(tmp_path / "demo") == []


def test_the_demo_fails_when_a_card_is_charged_twice(tmp_path: Path):
    """The proof looks: with a payment service that ignores idempotency keys, it finds the second charge."""
    done = run("demo.py", "--folder", str(tmp_path / "demo"), "--forget-keys", timeout=150)
    assert done.returncode == 1, done.stdout
    assert "0 lost, 1 double." in done.stdout
    assert children_in(tmp_path / "demo") == []


def test_an_interrupted_demo_leaves_no_process(tmp_path: Path):
    with started("demo.py", "--folder", str(tmp_path / "demo")) as demo:
        for line in demo.stdout:
            if "fulfil" in line and "executing" in line:
                break
        assert children_in(tmp_path / "demo")
        demo.send_signal(signal.SIGINT)
        demo.communicate(timeout=60)
    assert demo.returncode == 130
    assert children_in(tmp_path / "demo") == []


def read_until_it_is_open(serve: subprocess.Popen[str]) -> str:
    said = ""
    for line in serve.stdout:
        said += line
        if "Ctrl-C" in line:
            break
    return said


def test_serve_opens_the_shop_and_the_admin_until_ctrl_c(tmp_path: Path):
    folder = tmp_path / "shop"
    with started("serve.py", "--folder", str(folder), "--port", "0") as serve:
        said = read_until_it_is_open(serve)
        shop = re.search(r"the shop +(http://\S+)/", said)[1]
        with httpx.Client(base_url=shop, trust_env=False) as client:
            assert "String quartet" in client.get("/").text
            login = client.get("/admin/login/").text
            token = re.search(r'name="csrfmiddlewaretoken" value="(\w+)"', login)[1]
            credentials = {"username": "admin", "password": "admin", "csrfmiddlewaretoken": token}
            assert client.post("/admin/login/?next=/admin/", data=credentials).headers["Location"] == "/admin/"
            assert client.get("/admin/").status_code == 200
            assert client.get("/static/shop/shop.css").status_code == 200
        serve.send_signal(signal.SIGINT)
        try:
            serve.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            pytest.fail("serve.py does not end by Ctrl-C")
    assert serve.returncode == 0
    assert children_in(folder) == []


def test_serve_leaves_the_database_of_the_environment_alone(tmp_path: Path):
    """That one may hold somebody's work: it gets no tables, and no administrator whose password everybody knows."""
    folder, other = tmp_path / "shop", tmp_path / "other.sqlite3"
    with started("serve.py", "--folder", str(folder), "--port", "0", DATABASE_URL=f"sqlite:///{other}") as serve:
        assert "the shop " in read_until_it_is_open(serve)
        assert (folder / "shop.sqlite3").exists()
    assert not other.exists()
    assert children_in(folder) == []
