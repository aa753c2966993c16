"""What codes of a llama weigh, in memory and in a file, and what backward keeps of it."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_fx
from lora_fx.fx.capture.capture import Captured
from lora_fx.fx.quantised_parameters import forms, numbers, tensors_of
from lora_fx.passes.verbs.open import capture
from lora_fx.passes.verbs.quantise import quantised
from tests.fx.train.saved_bytes import saved_bytes

pytest.importorskip("transformers")
IDS = torch.arange(24).reshape(3, 8)
IN_MEMORY, IN_FILE = 0.17, 0.18
"""Bytes of quantised weights alone as a part of float32's; the issue's own gates."""


@functools.cache
def llama() -> Captured:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000, hidden_size=256, intermediate_size=1536, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    return capture(model, (), {"input_ids": IDS})


def over(kind: str) -> tuple[Captured, int, int]:
    """(the capture over codes, their bytes in memory, those of the weights as float32)."""
    cap = quantised(llama(), kind)
    held = forms(cap.model)
    assert len(held) == 7, "every matrix but the head"
    codes = sum(t.nbytes for n in held for t in tensors_of(cap.model, n))
    return cap, codes, sum(4 * torch.Size(s.shape).numel() for s in held.values())


@pytest.mark.parametrize("kind", [pytest.param("nf4", marks=pytest.mark.slow), "int4"])
def test_bytes_of_the_codes(kind: str, tmp_path: Path) -> None:
    import onnx

    cap, codes, floats = over(kind)
    assert codes / floats <= IN_MEMORY
    file = tmp_path / "q.onnx"
    assert lora_fx.export(cap, file, provider="cpu").ok
    made = onnx.load(file).graph
    sizes = {i.name: i.ByteSize() for i in made.initializer}
    products = [n for n in made.node if n.op_type in ("MatMulNBits", "MatMulBnb4")]
    assert len(products) == 7
    read = {name for n in products for name in n.input[1:] if name in sizes}
    assert codes <= sum(sizes[n] for n in read) <= IN_FILE * floats
    # norms, the embedding and the head stay in float; a file of floats has more than the weights
    assert file.stat().st_size / sum(p.nbytes for p in llama().model.parameters()) < 0.45


def filled(module: Any) -> Any:
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for n, p in module.named_parameters():
            if "lora_B" in n:
                p.copy_(torch.randn(p.shape, generator=g) * 0.1)
    return module.train()


@pytest.mark.parametrize("kind", ["nf4", pytest.param("int8", marks=pytest.mark.slow)])
def test_backward_keeps_no_more_than_over_floats(kind: str) -> None:
    cap, codes, _ = over(kind)
    floats = copy.deepcopy(llama().model)
    with torch.no_grad():
        for n in forms(cap.model):
            floats.get_parameter(n).copy_(numbers(cap.model, n, torch.float32))
    ours = filled(lora_fx.insert(cap, rank=4))
    theirs = filled(lora_fx.insert(floats, (), {"input_ids": IDS}, rank=4))
    kept, y = saved_bytes(ours, lambda: ours(input_ids=IDS).logits)
    want, z = saved_bytes(theirs, lambda: theirs(input_ids=IDS).logits)
    assert torch.allclose(y, z, atol=1e-5)
    assert 0 < kept <= want + codes
    assert kept < want + codes / 8, "nor a copy of the codes"
