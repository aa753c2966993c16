"""Adapters of torch models in the ONNX files of their bases; the whole zoo runs by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_fx.errors import LoraFxError
from tests.zoo.onnx_files import differences

SLOW = (pytest.param(n, marks=pytest.mark.slow) for n in ("hf_bert", "hf_gpt2", "hf_llama"))


@pytest.mark.parametrize("name", ["tied_head", "fused_qkv", "hf_gpt2/1", *SLOW])
def test_fold_and_insert_equal_the_torch_module(name: str, tmp_path: Path) -> None:
    found = differences(name, tmp_path)
    assert set(found) == {"fold", "insert"}
    assert max(found.values()) < 2e-6


def test_a_weight_that_the_exporter_rewrote_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LoraFxError, match="is not a target of the model"):
        differences("lstm", tmp_path)  # its gates lie in another order, under another name
