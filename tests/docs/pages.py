"""The documentation's pages, read for their code and tables, so that tests can run the one and compare the other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"

FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
CAPTION = re.compile(r"\A:caption: (?P<caption>.*)\n\n?")


class Block(NamedTuple):
    """A fenced block: the heading it stands under, its language, its caption if it has one, and its text."""

    section: str
    language: str
    caption: str
    text: str


class Command(NamedTuple):
    """A line that a reader types, and what the page says that it prints."""

    line: str
    output: str


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[Block]:
    found = []
    text = read(page)
    headings = list(re.finditer(r"^#+ (.*)$", FENCE.sub(lambda fence: " " * len(fence[0]), text), re.MULTILINE))
    for fence in FENCE.finditer(text):
        title = [heading[1] for heading in headings if heading.start() < fence.start()][-1]
        language = fence["info"].removeprefix("{code-block}").strip()
        caption = CAPTION.match(fence["body"])
        body = fence["body"][caption.end() :] if caption else fence["body"]
        found.append(Block(title, language, caption["caption"] if caption else "", body))
    return found


def commands(block: Block) -> list[Command]:
    """The commands of a console block; what stands between them is their output."""
    found: list[Command] = []
    for line in block.text.splitlines():
        if line.startswith("$ "):
            found.append(Command(line[2:], ""))
        else:
            found[-1] = found[-1]._replace(output=f"{found[-1].output}{line}\n")
    return found


def section(page: str, title: str) -> str:
    """The text under a heading, up to the next one of any level."""
    parts = re.split(r"^#+ (.*)\n", read(page), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))[title]


def table(text: str) -> list[list[str]]:
    """The cells of the first table in a text, without its head; a backslash guards a bar inside a cell."""
    rows = re.search(r"(?:^\|.*\|\n?)+", text, flags=re.MULTILINE)
    assert rows, f"There is no table in: {text[:200]!r}"
    cells = [re.split(r"(?<!\\)\|", line.strip().strip("|")) for line in rows[0].splitlines()]
    return [[cell.strip().replace(r"\|", "|") for cell in row] for row in cells[2:]]


def code(cell: str) -> str:
    """What stands between the first pair of backticks."""
    return cell.split("`")[1]


def links(page: str) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", read(page)))
