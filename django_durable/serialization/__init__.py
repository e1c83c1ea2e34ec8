"""Values and exceptions as text: what a run stores, and what its replay reads.

JSON with explicit type tags, never pickle. The format is described in `codec`, what can be stored in `types`.
"""

from __future__ import annotations

from django_durable.serialization import objects, values  # noqa: F401  (importing them registers their kinds)
from django_durable.serialization.codec import dumps, loads
from django_durable.serialization.failures import clean_text, describe_exception, dump_exception, load_exception
from django_durable.serialization.types import register_kind, register_type

__all__ = [
    "clean_text",
    "describe_exception",
    "dump_exception",
    "dumps",
    "load_exception",
    "loads",
    "register_kind",
    "register_type",
]
