"""bitsandbytes' layers once they have run on a CPU that reorders their codes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.compare import rel


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_layer_that_has_run_is_read_as_it_is_and_stays_so(kind: str, nested: bool) -> None:
    layers = pytest.importorskip("bitsandbytes").nn
    torch.manual_seed(0)
    layer = layers.Linear4bit(
        128, 64, compute_dtype=torch.float32, quant_type=kind, compress_statistics=nested
    )
    model = nn.Sequential(layer).to("cpu")
    x = torch.randn(4, 128)
    fresh = lora_fx.insert(model, (x,), rank=2)(x).detach()
    with torch.no_grad():
        before = model.eval()(x)
    if not getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
        pytest.skip("this CPU has no AVX512-BF16: nothing is reordered")
    mine = lora_fx.insert(model, (x,), rank=2)(x).detach()
    with torch.no_grad():
        assert torch.equal(model(x), before), "reading changed the user's layer"
    assert 0 < rel(mine.numpy(), fresh.numpy()) < 0.01, "scales in bfloat16"
    assert rel(mine.numpy(), before.numpy()) < 0.02, "its kernel has x in bfloat16 as well"
