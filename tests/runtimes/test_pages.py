"""The page of a runtime shows its sample whole, so that a reader can copy it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.runtimes.environments import ROOT

SAMPLES = sorted((ROOT / "samples" / "runtimes").glob("*_switch.py"))
IMPORTS = "from __future__ import annotations\n\n"


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda path: path.stem)
def test_the_page_shows_the_sample(sample: Path) -> None:
    name = sample.stem.removesuffix("_switch")
    page = (ROOT / "docs" / "runtimes" / f"{name}.md").read_text(encoding="utf-8")
    shown = re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)
    _, _, code = sample.read_text(encoding="utf-8").partition(IMPORTS)
    assert code in shown
