"""The ledger: every charge, and every request that asked for one. A SQLite file that only this service opens."""

from __future__ import annotations

import secrets
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

SCHEMA = """
CREATE TABLE IF NOT EXISTS charge (
    id TEXT PRIMARY KEY,
    idempotency_key TEXT NOT NULL UNIQUE,
    order_id TEXT NOT NULL,
    amount INTEGER NOT NULL,
    last4 TEXT NOT NULL,
    status TEXT NOT NULL,
    created_at TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS request (
    number INTEGER PRIMARY KEY,
    idempotency_key TEXT NOT NULL,
    order_id TEXT NOT NULL,
    answer INTEGER NOT NULL,
    received_at TEXT NOT NULL
);
"""
DECLINED = "0002"  # cards ending so are declined


class KeyReused(Exception):
    """One Idempotency-Key came with two different charges."""


class Ledger:
    def __init__(self, path: Path, forget_keys: bool = False) -> None:
        self.path = path
        self.forget_keys = forget_keys
        with self._connect() as db:
            db.execute("PRAGMA journal_mode = WAL")
            db.executescript(SCHEMA)

    def charge(self, key: str, order: str, amount: int, card: str) -> tuple[dict[str, Any], bool]:
        """Return the one charge of this key, and whether it was made just now."""
        # Four digits are enough to recognise a card, and useless to who steals the ledger.
        asked = {"order": order, "amount": amount, "last4": card[-4:]}
        if self.forget_keys:
            key = f"{key} {secrets.token_hex(6)}"
        with self._transaction() as db:
            row = db.execute("SELECT * FROM charge WHERE idempotency_key = ?", (key,)).fetchone()
            if row is None:
                status = "declined" if card.endswith(DECLINED) else "succeeded"
                row = db.execute(
                    "INSERT INTO charge VALUES (?, ?, ?, ?, ?, ?, ?) RETURNING *",
                    (f"ch_{secrets.token_hex(6)}", key, order, amount, card[-4:], status, _now()),
                ).fetchone()
                return _as_dict(row), True
        charge = _as_dict(row)
        if asked != {name: charge[name] for name in asked}:
            raise KeyReused(f"Idempotency-Key {key!r} was used for another charge. Use a new key for a new charge.")
        return charge, False

    def note(self, key: str, order: str, answer: int) -> None:
        """Remember that a request came, and how it was answered."""
        with self._transaction() as db:
            db.execute(
                "INSERT INTO request (idempotency_key, order_id, answer, received_at) VALUES (?, ?, ?, ?)",
                (key, order, answer, _now()),
            )

    def charges(self) -> list[dict[str, Any]]:
        with self._connect() as db:
            return [_as_dict(row) for row in db.execute("SELECT * FROM charge ORDER BY created_at, rowid")]

    def requests(self) -> list[dict[str, Any]]:
        with self._connect() as db:
            rows = db.execute("SELECT number, order_id AS 'order', answer, received_at FROM request ORDER BY number")
            return [dict(row) for row in rows]

    @contextmanager
    def _connect(self) -> Iterator[sqlite3.Connection]:
        # One connection a request: the server answers each connection in a thread of its own.
        with closing(sqlite3.connect(self.path, timeout=10, isolation_level=None)) as db:
            db.row_factory = sqlite3.Row
            yield db

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._connect() as db:
            # IMMEDIATE: of two requests with one key, the second reads only after the first has written.
            db.execute("BEGIN IMMEDIATE")
            with db:
                yield db


def _as_dict(row: sqlite3.Row) -> dict[str, Any]:
    charge = dict(row)
    charge["order"] = charge.pop("order_id")
    return charge


def _now() -> str:
    return datetime.now(UTC).isoformat()
