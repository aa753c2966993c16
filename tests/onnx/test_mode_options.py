"""Which option goes with which mode of export: each cell of the table in docs/modes.md."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import lora_fx

PAGE = Path(__file__).parents[2] / "docs" / "modes.md"
MODES = ("merged", "switch", "load", "batch", "train")
EMPTY = lora_fx.Adapter({})
OPTIONS: Mapping[str, list[dict[str, Any]]] = {
    "no adapter": [{"adapters": None}],
    "two adapters": [{"adapters": {"one": EMPTY, "two": EMPTY}}],
    "an `.onnx` file as MODEL": [{"model": "none.onnx"}],
    "OUT is a `.pt2` file": [{"path": "out.pt2"}],
    "`--target cuda`, `webgpu`": [{"target": "cuda"}, {"target": "webgpu"}],
    "`--target portable`": [{"target": "portable"}],
    "`--include`, `--exclude`": [{"include": "fc"}, {"exclude": "fc"}],
    "`--rank`": [{"rank": 4}],
    "`--variant dora`": [{"variant": "dora"}],
    "`--scales`": [{"scales": True}],
    "`--cache`": [{"cache": True}],
    "`--cache --genai`": [{"cache": True, "genai": "served"}],
    "`--triton`": [{"triton": "models"}],
    "`--quantise`": [{"quantise": "int4"}],
    "`--quantise --target portable`": [{"quantise": "int4", "target": "portable"}],
    "`--precision`, `--optimise`": [{"precision": "float16"}, {"optimise": True}],
    "`--accuracy-level 4`": [{"accuracy_level": 4}],
    "`--loss`, `--optimizer`, `--weight-decay`, `--clip`": [
        {"loss": "mse"}, {"optimizer": "sgd"}, {"weight_decay": 0.1}, {"clip": 1.0}
    ],
}  # fmt: skip
"""Row of the table → what it asks of an export of a model that does not exist."""
SLOTS = {"switch": lora_fx.Switch, "load": lora_fx.Load}
"""The modes whose classes have a variant; to others it is no keyword at all."""


def taken(mode: str, asked: dict[str, Any]) -> bool:
    """Whether an export goes on to look for its model, which is missing."""
    keywords = {"model": "none.py:build", "path": "out.onnx", **asked}
    if mode == "batch":
        keywords.setdefault("adapters", [EMPTY])
    variant = keywords.pop("variant", None)
    if variant is not None:
        if mode not in SLOTS:
            return False
        keywords["mode"] = SLOTS[mode](variant=variant)
    model, path = keywords.pop("model"), keywords.pop("path")
    with pytest.raises(lora_fx.LoraFxError) as refused:
        lora_fx.export(model, path, **{"mode": mode, **keywords})
    return bool(re.match(r"none\.(py|onnx): .*no such file", refused.value.message))


@pytest.mark.filterwarnings("ignore:options of mode:FutureWarning")
@pytest.mark.parametrize("option", OPTIONS)
def test_a_row_of_the_page(option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (line,) = [x for x in PAGE.read_text().splitlines() if x.startswith(f"| {option} | ")]
    told = dict(zip(MODES, (cell.strip() for cell in line.split("|")[2:-1]), strict=True))
    for asked in OPTIONS[option]:
        tried = {mode: "yes" if taken(mode, dict(asked)) else "no" for mode in MODES}
        assert tried == told, asked
    assert not list(tmp_path.iterdir())


def test_the_page_has_no_other_row() -> None:
    table = PAGE.read_text().partition("| | merged | switch | load | batch | train |\n")[2]
    rows = re.findall(r"^\| (.+?) \| (?:yes|no) ", table.partition("\n\n")[0], re.M)
    assert rows == list(OPTIONS)
