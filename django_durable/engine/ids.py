"""Time-ordered ids for runs: UUID version 7 (RFC 9562, §5.7)."""

from __future__ import annotations

import secrets
import threading
import time
from uuid import UUID

_lock = threading.Lock()
_last = 0


def new_id() -> str:
    """Return a UUIDv7 as text; later ones of this process sort after earlier ones."""
    global _last
    with _lock:
        # 48 bits of milliseconds and 12 of rand_a; within a millisecond rand_a counts (RFC 9562, §6.2, method 1).
        _last = max(time.time_ns() // 1_000_000 << 12, _last + 1)
        ticks = _last
    value = (ticks >> 12) << 80 | 7 << 76 | (ticks & 0xFFF) << 64 | 2 << 62 | secrets.randbits(62)
    return str(UUID(int=value))
