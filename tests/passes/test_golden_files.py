"""Every golden file of the passes: its texts are those of the graphs, and so are their numbers."""

from __future__ import annotations

import pytest

from lora_fx.compare import ORT_TOL, rel
from tests.passes.golden import FOLDER, Case, File
from tests.passes.rewrites import PAGE, SHOWN, page

FILES = {p.stem: File.read(p.stem) for p in sorted(FOLDER.glob("*.txt"))}
TWINS = [(name, title) for name, file in FILES.items() for title in file.twins]


@pytest.mark.parametrize("name", FILES)
def test_before_and_after(name: str) -> None:
    parts = FILES[name].parts
    case = Case(FILES[name], "before")
    assert case.source == parts.get("model", parts["before"]).code
    assert case.text() == parts["before"].code
    assert rel(case.run_text(parts["before"].code), case.wanted(case.setup)) < ORT_TOL
    assert case.step(case.graph).modified
    assert case.text() == parts["after"].code
    want = case.wanted(case.setup, case.step)
    assert rel(case.run(), want) < ORT_TOL
    assert rel(case.run_text(parts["after"].code), want) < ORT_TOL
    assert name == "clean" or 0.05 < rel(want, case.wanted()) < 5, "a change that is seen"
    assert not case.step(case.graph).modified
    assert case.text() == parts["after"].code


@pytest.mark.parametrize(("name", "title"), TWINS)
def test_twins_stay_as_they_are(name: str, title: str) -> None:
    case = Case(FILES[name], title)
    assert case.source == FILES[name].parts[title].code
    before = case.text()
    assert not case.step(case.graph).modified
    assert case.text() == before
    if "dropout=" not in case.part.said.get("setup", ""):
        assert rel(case.run(), case.wanted(case.setup)) < ORT_TOL


def test_every_file_has_a_twin() -> None:
    assert {name for name, _ in TWINS} == set(FILES) == {
        "clean", "fold", "fuse", "insert", "insert_convolution", "insert_einsum", "insert_product",
        "insert_scaled_rows", "insert_shared", "insert_stack", "insert_weight_form", "recompute",
        "share",
    }  # fmt: skip


def test_the_page_shows_every_file() -> None:
    """docs/rewrites.md; `python -m tests.passes.rewrites` writes its graphs anew."""
    text = PAGE.read_text()
    assert text == page()
    assert sorted(name for _, name, _ in SHOWN.findall(text)) == sorted(FILES)
