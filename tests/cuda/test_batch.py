"""Mode batch made for CUDA: ONNX Runtime's provider copies nothing, and captures CUDA graphs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import lora_fx
from tests.cuda import stand_in
from tests.cuda.cases import RANK
from tests.cuda.table import PLACED

CASES = {
    "linear layers and lookups": ("hf_bert", {}),
    "rows that are flattened": ("hf_gpt2", {}),
    "a decoder": ("hf_llama", {}),
    "a convolution": ("hf_vit", {}),
    "weights by row": ("hf_bert", {"scales": True}),
    "codes of four bits": ("hf_llama", {"quantise": "int4"}),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.slow
def test_batch_for_cuda_is_capturable(name: str, stand_in_folder: Path, tmp_path: Path) -> None:
    from tests.zoo.models import ZOO
    from tests.zoo.shared import captured

    family, options = CASES[name]
    model, _, _ = captured(family)
    adapter = lora_fx.insert(model, rank=RANK, include=ZOO[family].include).adapter()
    path = tmp_path / "batch.onnx"
    lora_fx.export(
        model, path, adapters={"first": adapter, "second": adapter}, mode="batch",
        target="cuda", provider="cpu", **options,
    )  # fmt: skip
    child = stand_in.run_with(stand_in_folder, PLACED, path)
    assert child.returncode == 0, child.stderr
    row: dict[str, Any] = json.loads(child.stdout)
    assert row["copies"] == []
    assert row["uncapturable"] == ""
