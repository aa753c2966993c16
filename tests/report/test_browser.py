"""The page in headless Chromium: without its script, in both themes, narrow and wide.

Skipped, with the reason, where no chromium is installed (Debian: apt-get install chromium).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lora_fx.report.page import page
from tests.report.browser import PROGRAM, Browser, browser
from tests.report.made import everything, hostile, merged, trained
from tests.report.read import Page

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no chromium is installed")

CONTRAST = r"""(() => {
const rgba = text => {
  const n = text.match(/[\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n};
const luminance = c => { const [r, g, b] = c.map(v => v / 255).map(
  v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b};
const behind = (x, y, own) => {
  for (const e of document.elementsFromPoint(x, y)) {
    const s = getComputedStyle(e), svg = e instanceof SVGElement;
    if (svg && e.tagName === 'text') continue;
    if (svg && e.tagName !== 'path') continue;
    const c = svg ? s.fill : s.backgroundColor;
    if (c === 'none') continue;
    const v = rgba(c);
    if (v[3] === 1) return v; if (v[3] > 0) throw `half transparent ${c}`}
  return rgba(getComputedStyle(document.body).backgroundColor)};
const seen = [];
const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
for (let n = walk.nextNode(); n; n = walk.nextNode()) {
  const e = n.parentElement;
  if (!n.data.trim() || ['SCRIPT', 'STYLE'].includes(e.tagName)) continue;
  e.scrollIntoView({block: 'center', inline: 'center'});
  const range = document.createRange(); range.selectNodeContents(n);
  const box = [...range.getClientRects()].find(r => r.width > 0);
  if (!box) { seen.push({text: n.data, ratio: 0, why: 'not drawn'}); continue }
  const s = getComputedStyle(e);
  for (let p = e; p; p = p.parentElement)
    if (getComputedStyle(p).opacity !== '1') throw 'opacity';
  const ink = rgba(e instanceof SVGElement ? s.fill : s.color);
  const paper = behind(box.x + box.width / 2, box.y + box.height / 2, e);
  if (ink[3] !== 1) throw 'half transparent text';
  const [a, b] = [luminance(ink.slice(0, 3)), luminance(paper.slice(0, 3))].sort((x, y) => y - x);
  seen.push({text: n.data, ratio: (a + 0.05) / (b + 0.05), svg: e instanceof SVGElement,
    ink: ink.join(), paper: paper.join(), size: parseFloat(s.fontSize)})}
return seen})()"""
VISIBLE = (
    "(e => { const b = e && e.getBoundingClientRect(); return !!b && b.width > 0 && b.height > 0 })"
)
ROWS = "[...document.querySelectorAll('#rows tbody tr')].filter(r => !r.hidden)"
MADE: dict[str, Callable[[], dict[str, Any]]] = {
    "trained": lambda: trained(2),
    "everything": everything,
    "hostile": hostile,
    "rounded": lambda: merged(2),
}


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as one:
        yield one


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    for name, make in {**MADE, "large": lambda: trained(72)}.items():
        (folder / f"{name}.html").write_text(page(make()), encoding="utf-8")
    return {p.stem: p for p in folder.iterdir()}


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("name", MADE)
def test_every_text_can_be_read(
    tab: Browser, files: dict[str, Path], name: str, dark: bool
) -> None:
    tab.open(files[name], dark=dark)
    seen = tab.value(CONTRAST)
    assert len(seen) > 100 and any(s.get("svg") for s in seen)
    assert [s for s in seen if s["ratio"] < 4.5] == []
    assert min(s["size"] for s in seen) >= 14
    papers = {s["paper"] for s in seen if not s["svg"]}
    assert all((int(p.split(",")[0]) < 80) == dark for p in papers), "the theme is the browser's"
    hint = tab.value("getComputedStyle(document.querySelector('.filter'), '::placeholder').color")
    assert hint in ("rgb(84, 93, 107)", "rgb(163, 173, 187)"), "as quiet text, which was measured"


@pytest.mark.parametrize("width", [360, 760, 1600])
@pytest.mark.parametrize("name", [*MADE, "large"])
def test_the_page_is_as_wide_as_the_window(
    tab: Browser, files: dict[str, Path], name: str, width: int
) -> None:
    tab.open(files[name], width=width)
    assert tab.value("document.documentElement.scrollWidth") <= width
    clipped = tab.value(
        "[...document.querySelectorAll('.box, .facts div, h1, figure, pre, li')]"
        ".filter(e => e.getBoundingClientRect().right > innerWidth).length"
    )
    assert clipped == 0


@pytest.mark.parametrize("width", [500, 1280])
def test_tables_are_as_wide_as_charts(tab: Browser, files: dict[str, Path], width: int) -> None:
    tab.open(files["everything"], width=width)
    wide = "[...document.querySelectorAll('{}')].map(e => e.getBoundingClientRect().width)"
    (chart,) = set(tab.value(wide.format("figure.curve")))
    tables = tab.value(wide.format("table"))
    assert len(tables) >= 3 and min(tables) >= chart


def test_without_a_script_all_is_there(tab: Browser, files: dict[str, Path]) -> None:
    tab.open(files["everything"], script=False)
    assert tab.value("document.querySelector('.filter')") is None, "the script did not run"
    result = everything()
    keys = tab.value(f"{ROWS}.map(r => r.cells[0].textContent)")
    assert keys == [t["key"] for t in result["targets"]]
    assert tab.value(f"{ROWS}.every({VISIBLE})")
    for part in (".facts div", ".curve svg", ".box svg", "td svg", ".warned li", ".mark"):
        found = tab.value(f"[...document.querySelectorAll('{part}')].map({VISIBLE})")
        assert found and all(found), part


@pytest.mark.parametrize("name", [*MADE, "large"])
def test_nothing_is_fetched_and_nothing_fails(
    tab: Browser, files: dict[str, Path], name: str
) -> None:
    tab.open(files[name])
    assert tab.requests == [files[name].as_uri()]
    assert tab.errors == []
    assert tab.value("document.querySelector('.filter') !== null"), "the script is allowed"
    assert tab.value("document.compatMode") == "CSS1Compat"


def test_what_the_parser_made_is_what_was_meant(tab: Browser, files: dict[str, Path]) -> None:
    """End tags are left out: the tree must be the same as with them."""
    tab.open(files["hostile"], script=False)
    cells = (
        "[...document.querySelectorAll('#rows tr')].map(r => [...r.cells].map(c => c.textContent))"
    )
    plain = [[c.partition("[σ")[0] for c in r] for r in Page(files["hostile"].read_text()).rows]
    assert tab.value(cells) == plain
    assert tab.value("document.querySelectorAll('#rows thead tr, #rows tbody tr').length") == 12
    assert tab.value("document.querySelectorAll('main > section').length") >= 7


def test_sort_and_filter(tab: Browser, files: dict[str, Path]) -> None:
    tab.open(files["trained"])
    ranks = f"{ROWS}.map(r => r.cells[4].textContent)"
    first = tab.value(ranks)
    click = "document.querySelectorAll('#rows thead button')[4].click()"
    tab.value(click)
    assert [int(r) for r in tab.value(ranks)] == sorted(map(int, first), reverse=True)
    assert tab.value("document.querySelector('[aria-sort]').ariaSort") == "descending"
    tab.value(click)
    assert [int(r) for r in tab.value(ranks)] == sorted(map(int, first))
    tab.value(click)
    assert tab.value(ranks) == first, "the third press is the order of the file"
    tab.value(
        "(f => {f.value = 'layers.1. MLP'; f.dispatchEvent(new Event('input'))})"
        "(document.querySelector('.filter'))"
    )
    assert tab.value(f"{ROWS}.map(r => r.cells[0].textContent)") == [
        f"model.layers.1.mlp.{p}_proj.weight" for p in ("gate", "up", "down")
    ]


def test_the_keyboard_reaches_what_scrolls(tab: Browser, files: dict[str, Path]) -> None:
    tab.open(files["trained"], width=360)
    stuck = tab.value(
        "[...document.querySelectorAll('*')].filter(e => e.scrollWidth > e.clientWidth + 1 && "
        "getComputedStyle(e).overflowX === 'auto' && e.tabIndex !== 0).length"
    )
    assert stuck == 0
    names = tab.value("[...document.querySelectorAll('[tabindex]')].map(e => e.ariaLabel)")
    assert "Table of targets" in names
    assert tab.value("document.querySelectorAll('main, header, h1').length") == 3
