"""The pages by axe-core: no findings, in both themes, narrow and wide.

Slow, and skipped where there is no chromium or no `npm ci --prefix samples`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_fx.report.page import page
from tests.axe import SCRIPT, findings
from tests.report.browser import PROGRAM, browser
from tests.report.made import everything, hostile, trained

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PROGRAM is None, reason="no chromium is installed"),
    pytest.mark.skipif(not SCRIPT.is_file(), reason="npm ci --prefix samples"),
]


def in_state(state: str) -> dict[str, Any]:
    """A training that has no result."""
    result = trained(1, steps=40)
    result["page"]["run"] = {"state": state, "step": 40, "steps": 80, "digest": None}
    return {**result, "ok": state == "running"}


PAGES: dict[str, Callable[[], dict[str, Any]]] = {
    "trained": lambda: trained(2),
    "everything": everything,
    "hostile": hostile,
    "running": lambda: in_state("running"),
    "interrupted": lambda: in_state("interrupted"),
}


@pytest.mark.parametrize("name", PAGES)
def test_the_page_has_no_findings(name: str, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(page(PAGES[name]()), encoding="utf-8")
    with browser(tmp_path / "profile") as tab:
        for width in (1280, 500):
            for dark in (False, True):
                tab.open(path, width=width, dark=dark)
                assert findings(tab) == [], (width, dark)


def test_axe_finds_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    text = page(trained(1)).replace("<html lang=en>", "<html>")
    path.write_text(text, encoding="utf-8")
    with browser(tmp_path / "profile") as tab:
        tab.open(path)
        (line,) = findings(tab)
        assert line.startswith("html-has-lang")
