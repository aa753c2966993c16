"""docs/troubleshooting.md: each message is one that the code says, and no mistake lacks its row."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import click

from tests.mistakes.test_commands import QUICK, SLOW
from tests.test_docs import DOCS, ROOT

PLACE = re.compile(r"\{\w*(?:![rs])?\}")
"""A placeholder of str.format, as click writes its messages."""


def shown() -> list[str]:
    """The messages of the page, with … for what is the user's."""
    page = (DOCS / "troubleshooting.md").read_text()
    return re.findall(r"^\| `([^`]+)` \|", page, re.M)


def sources() -> Iterator[Path]:
    for folder in (ROOT / "lora_fx", ROOT / "passes", ROOT / "cli", Path(click.__file__).parent):
        yield from sorted(folder.rglob("*.py"))


@cache
def said() -> frozenset[str]:
    """Every text of the code, with … for what it fills in."""
    texts: set[str] = set()
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (p.value if isinstance(p, ast.Constant) else "…" for p in node.values)
                texts.add("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.add(PLACE.sub("…", node.value))
    return frozenset(texts)


def is_said(message: str) -> bool:
    """Whether a text of the code is this message, or what stands before a name; … is any text."""
    if message.strip("…: ") in said():
        return True
    longest = max(message.split("…"), key=len)
    whole = re.compile(pattern(message))
    return any(whole.fullmatch(text) for text in said() if longest in text)


def pattern(message: str) -> str:
    return ".*".join(map(re.escape, message.split("…")))


def test_each_message_is_one_that_the_code_says() -> None:
    assert [message for message in shown() if not is_said(message)] == []


def test_each_message_is_there_once() -> None:
    messages = shown()
    assert len(messages) == len(set(messages)) > 100


def test_each_mistake_has_its_row() -> None:
    """Those of tests/mistakes/commands.txt, whose messages are parts of what is said."""
    rows = [re.compile(pattern(message.strip("…: "))) for message in shown()]
    told = [message for _, message, _, _ in (*QUICK, *SLOW)]
    lacking = [message for message in told if not any(row.search(message) for row in rows)]
    assert lacking == [], "docs/troubleshooting.md has no row for these"
