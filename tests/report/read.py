"""A page as a browser without a script sees it, by the standard library's parser."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from typing import Any

VOID = {"meta", "br", "wbr", "i"}


class Page(HTMLParser):
    """Every start tag, the table's rows as cells of text, all text, and the data."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.heads: list[str] = []
        self.text = ""
        self.data: dict[str, Any] = {}
        self._inside = self._table = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append((tag, given))
        if tag == "table":
            self._table = given.get("id") or "other"
        if tag in ("script", "style"):
            self._inside = "data" if given.get("id") == "data" else tag
        if self._table == "rows":
            if tag == "tr":
                self.rows.append([])
            elif tag in ("td", "th"):
                self.rows[-1].append("")
        if tag == "svg" and self._table == "rows":
            self.rows[-1][-1] += f"[{given.get('aria-label')}]"

    def handle_endtag(self, tag: str) -> None:
        if tag == "table":
            self._table = ""
        if tag in ("script", "style"):
            self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "data":
            self.data = json.loads(data)
        elif not self._inside:
            self.text += data
            if self._table == "rows" and self.rows and self.rows[-1]:
                self.rows[-1][-1] += data

    @property
    def targets(self) -> list[dict[str, str]]:
        """The rows of the table of targets, by heading."""
        heads, *rest = self.rows or [[]]
        return [dict(zip(heads, cells, strict=True)) for cells in rest]
