"""The demo's lines: calm, aligned, and coloured only where somebody looks at them."""

from __future__ import annotations

import os
import sys
import textwrap
from datetime import datetime
from typing import Any

IS_COLOURED = sys.stdout.isatty() and "NO_COLOR" not in os.environ

BOLD, DIM, RED, GREEN, YELLOW = "1", "2", "31", "32", "33"

# What a worker tells (shop/story.py): the words for it, and their colour.
WORDS = {
    "started": ("begins", ""),
    "executing": ("executing", ""),
    "raised": ("{error}", YELLOW),
    "held": ("has done its writes, not committed", YELLOW),
    "recorded": ("recorded", GREEN),
    "answered": ("answered from its checkpoint", GREEN + ";" + BOLD),
    "recovered": ("taken over from a worker that died", BOLD),
    "finished": ("{status}", GREEN),
    # Ours.
    "bought": ("the form for seat {seat} is posted", ""),
    "page": ("the order's page says: {status}", ""),
    "killed": ("kill -9 {victim}", RED + ";" + BOLD),
    "note": ("{text}", ""),
}


def paint(text: str, colour: str) -> str:
    return f"\033[{colour}m{text}\033[0m" if colour and IS_COLOURED else text


def say(text: str = "") -> None:
    print(text, flush=True)


def headline(number: int, title: str, text: str) -> None:
    say()
    say(paint(f"{number}  {title}", BOLD))
    for line in textwrap.wrap(text, 100):
        say(paint(f"   {line}", DIM))
    say()


def line(event: dict[str, Any]) -> str | None:
    """Return the line for this event, or None if it needs none."""
    if "answer" in event:  # the payment service's log
        words, colour = f"{event['answer']}: {event['note']}", YELLOW if event["answer"] == 503 else ""
        return _columns(event["at"], "payments", f"order-{event['order']}", "POST /charges", words, colour)
    what = event.get("what")
    if what not in WORDS or (what == "recorded" and event["status"] == "RETRYING"):
        return None  # a failed try was told when it raised
    words, colour = WORDS[what]
    words = words.format(**event)
    if what == "executing" and event["attempt"] > 1:
        words += f", attempt {event['attempt']}"
    if what == "recorded" and event["status"] == "FAILED":
        words += ": failed"
    who = f"worker {event['pid']}" if "pid" in event else event["by"]
    step = f"{event['position']} {event['step']}" if "step" in event else ""
    return _columns(event["at"], who, event.get("run", ""), step, words, colour)


def _columns(at: float, who: str, run: str, step: str, words: str, colour: str) -> str:
    clock = datetime.fromtimestamp(at).strftime("%H:%M:%S.%f")[:-3]
    return f"   {paint(clock, DIM)}  {who:<14}{run:<18}{step:<20}{paint(words, colour)}"
