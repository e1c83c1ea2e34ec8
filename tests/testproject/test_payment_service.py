"""The payment service, asked over HTTP: what the shop may rely on, and what it may not."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.testproject.processes import payment_service


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite3"


@pytest.fixture
def reliable(ledger: Path) -> Iterator[httpx.Client]:
    """A service that is never too busy."""
    with payment_service(ledger, "--faults", "0") as url, httpx.Client(base_url=url, trust_env=False) as client:
        yield client


def charge(client: httpx.Client, key: str = "key", **changes: object) -> httpx.Response:
    asked = {"order": "AB12", "amount": 4900, "card": "tok_4242", **changes}
    return client.post("/charges", json=asked, headers={"Idempotency-Key": key})


def charges(client: httpx.Client) -> list[dict[str, object]]:
    return client.get("/charges").json()["charges"]


def test_a_card_is_charged(reliable: httpx.Client):
    response = charge(reliable)
    assert response.status_code == 201
    [entry] = charges(reliable)
    assert response.json() == {"charge": entry}
    assert (entry["order"], entry["amount"], entry["status"]) == ("AB12", 4900, "succeeded")


def test_the_same_key_is_charged_once(reliable: httpx.Client):
    first, second = charge(reliable), charge(reliable)
    assert (first.status_code, second.status_code) == (201, 200)
    assert first.json() == second.json()
    assert len(charges(reliable)) == 1


def test_the_same_key_at_the_same_time_is_charged_once(reliable: httpx.Client):
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: charge(reliable), range(24)))
    assert sorted(answer.status_code for answer in answers) == [200] * 23 + [201]
    assert len({answer.json()["charge"]["id"] for answer in answers}) == 1
    assert len(charges(reliable)) == 1


def test_another_key_is_another_charge(reliable: httpx.Client):
    charge(reliable, "one")
    charge(reliable, "two")
    assert len(charges(reliable)) == 2


@pytest.mark.parametrize("changes", [{"amount": 1}, {"order": "CD34"}, {"card": "tok_5556"}])
def test_a_key_is_not_taken_for_another_charge(reliable: httpx.Client, changes: dict[str, object]):
    charge(reliable)
    assert charge(reliable, **changes).status_code == 422
    assert len(charges(reliable)) == 1


def test_some_cards_are_declined(reliable: httpx.Client):
    first, second = charge(reliable, card="tok_0002"), charge(reliable, card="tok_0002")
    assert (first.status_code, second.status_code) == (402, 402)
    assert [entry["status"] for entry in charges(reliable)] == ["declined"]


def test_only_four_digits_of_a_card_are_kept(reliable: httpx.Client, ledger: Path):
    charge(reliable, card="4000123412345556")
    assert [entry["last4"] for entry in charges(reliable)] == ["5556"]
    kept = b"".join(path.read_bytes() for path in ledger.parent.iterdir())
    assert b"5556" in kept
    assert b"40001234" not in kept


@pytest.mark.parametrize(
    "changes",
    [
        {"amount": 0},
        {"amount": 1.5},
        {"amount": "4900"},
        {"amount": True},
        {"card": "42"},
        {"card": None},
        {"order": ""},
    ],
)
def test_nonsense_is_refused(reliable: httpx.Client, changes: dict[str, object]):
    assert charge(reliable, **changes).status_code == 400
    assert charges(reliable) == []


def test_a_charge_without_a_key_is_refused(reliable: httpx.Client):
    response = reliable.post("/charges", json={"order": "AB12", "amount": 1, "card": "tok_4242"})
    assert response.status_code == 400
    assert "Idempotency-Key" in response.json()["error"]


def test_the_ledger_outlives_the_service(ledger: Path):
    for _ in range(2):
        with payment_service(ledger, "--faults", "0") as url, httpx.Client(base_url=url, trust_env=False) as client:
            assert charge(client).is_success
            assert len(charges(client)) == 1


def test_three_requests_in_ten_get_503_and_some_of_them_had_charged(ledger: Path):
    with payment_service(ledger, "--seed", "7") as url, httpx.Client(base_url=url, trust_env=False) as client:
        answers = [charge(client, f"key {n}").status_code for n in range(40)]
        charged = {entry["idempotency_key"] for entry in charges(client)}
    for ten in range(0, 40, 10):
        assert sorted(answers[ten : ten + 10]) == [201] * 7 + [503] * 3
    busy = {f"key {n}" for n, answer in enumerate(answers) if answer == 503}
    assert 0 < len(busy & charged) < len(busy), "a 503 must say nothing about whether the card was charged"


def test_who_asks_until_there_is_an_answer_is_charged_once(ledger: Path):
    with payment_service(ledger, "--seed", "19") as url, httpx.Client(base_url=url, trust_env=False) as client:
        for n in range(10):
            while charge(client, f"key {n}", order=f"order {n}").status_code == 503:
                pass
        assert [entry["order"] for entry in charges(client)] == [f"order {n}" for n in range(10)]


def test_a_seed_gives_the_same_failures_again(tmp_path: Path):
    answers = []
    for attempt in range(2):
        with (
            payment_service(tmp_path / f"{attempt}.sqlite3", "--seed", "3") as url,
            httpx.Client(base_url=url, trust_env=False) as client,
        ):
            answers.append([charge(client, f"key {n}").status_code for n in range(20)])
    assert answers[0] == answers[1]
