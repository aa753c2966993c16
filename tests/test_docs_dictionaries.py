"""docs/from-peft.md: every field of PEFT's LoraConfig has its row."""

from __future__ import annotations

import dataclasses
import re

import peft

from tests.test_docs import DOCS


def test_every_field_of_loraconfig_has_its_row() -> None:
    text = (DOCS / "from-peft.md").read_text()
    table = text.partition("## Fields of LoraConfig")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \|", table, re.M)
    of_all_configs = {field.name for field in dataclasses.fields(peft.PeftConfig)}
    fields = [field.name for field in dataclasses.fields(peft.LoraConfig)]
    assert sorted(rows) == sorted(set(fields) - of_all_configs)
