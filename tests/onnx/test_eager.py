"""A model whose attention cannot be exported is exported with eager attention instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lora_fx
from lora_fx.compare import rel
from lora_fx.errors import LoraFxError
from lora_fx.onnx.session import open_session
from tests.onnx.decoders import llama

IDS = torch.randint(0, 90, (2, 5), generator=torch.Generator().manual_seed(0))


def flexible() -> Any:
    """On the CPU flex_attention cannot be traced with parameters that take gradients."""
    model = llama(layers=1)
    model.config.use_cache = False
    model.set_attn_implementation("flex_attention")
    return model


@pytest.mark.parametrize("mode", ["merged", pytest.param("switch", marks=pytest.mark.slow)])
def test_it_is_tried_again_and_said(mode: str, tmp_path: Path) -> None:
    model, path = flexible(), tmp_path / "m.onnx"
    report = lora_fx.export(model, path, (IDS,), mode=mode, provider="cpu")
    (said,) = [w for w in report.warnings if w.startswith("with eager attention")]
    assert "cannot capture LlamaForCausalLM" in said
    assert model.config._attn_implementation == "flex_attention"
    wide = llama(layers=1).double()
    wide.config.use_cache = False
    with torch.no_grad():
        wanted = wide(IDS).logits.numpy()
    got = open_session(path, "cpu").run({"input_ids": IDS.numpy()})["logits"]
    assert rel(got, wanted) < 1e-5


def test_an_error_that_attention_has_no_part_in_is_not_tried_again(tmp_path: Path) -> None:
    model = llama(layers=1)
    model.config.use_cache = False
    calls: list[str] = []
    model.set_attn_implementation = calls.append
    a, b = torch.ones(2, 7).numpy(), torch.ones(9, 2).numpy()
    wrong = lora_fx.Adapter({"no.weight": lora_fx.LowRank(a, b, 2.0)})
    with pytest.raises(LoraFxError, match="is not a target"):
        lora_fx.export(model, tmp_path / "m.onnx", (IDS,), adapters=wrong, provider="cpu")
    assert not calls and not list(tmp_path.iterdir())
