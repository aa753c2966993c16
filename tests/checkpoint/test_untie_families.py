"""--untie on models of transformers: what they load gives the logits of two weights that differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lora_fx
from lora_fx import Adapter, LoraFxError, LowRank
from lora_fx.adapter.origin import Origin
from tests.checkpoint.families import FAMILIES, ROWS, SIDE, load, logits, tied
from tests.checkpoint.made import read


def low(seed: int, **facts: Any) -> LowRank:
    """An update as PEFT's files have it, [rows, width] of a head or a lookup's transposed."""
    rng = np.random.default_rng(seed)
    b, a = (rng.standard_normal(shape).astype("f4") for shape in ((ROWS, 2), (2, SIDE)))
    origin = Origin(**facts)
    if origin.op == "embedding":
        a, b = b.T, a.T
    return LowRank(np.ascontiguousarray(a), np.ascontiguousarray(b), 0.5, origin=origin)


def delta(entry: LowRank) -> torch.Tensor:
    """Its ΔW as the table stores it."""
    product = entry.scale * entry.b.astype("f8") @ entry.a.astype("f8")
    return torch.from_numpy(product.T if entry.origin.op == "embedding" else product)


def explicit(name: str, base: Path, table: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """Logits of the base with a head of its own, and these changes of the two weights."""
    model = load(name, base)
    out = model.get_output_embeddings()
    with torch.no_grad():
        out.weight = torch.nn.Parameter(out.weight + head)
        model.get_input_embeddings().weight.add_(table)  # in place: every lookup's
    return logits(model)


HEAD, LOOKUP = low(1), low(2, op="embedding")


@pytest.mark.parametrize("uses", ["head", "table", "both apart", "one and both"])
@pytest.mark.parametrize("name", FAMILIES)
def test_untied(name: str, uses: str, tmp_path: Path) -> None:
    base, (_, _, _, table, head) = tmp_path / "base", FAMILIES[name]
    tied(name, base)
    assert table in read(base) and head not in read(base)
    entries, moved = {
        "head": ({head: HEAD}, (0, delta(HEAD))),
        "table": ({table: LOOKUP}, (delta(LOOKUP), 0)),
        "both apart": ({head: HEAD, table: LOOKUP}, (delta(LOOKUP), delta(HEAD))),
        "one and both": (
            {head: HEAD, table: low(3, op="embedding", tied=True, twins=(head,))},
            (delta(low(3)), delta(low(3)) + delta(HEAD)),
        ),
    }[uses]
    with pytest.raises(LoraFxError, match="one of two uses") as caught:
        lora_fx.merge(base, Adapter(entries), tmp_path / "out")
    assert "--untie" in caught.value.hint
    assert not lora_fx.verify(base, base, adapter=Adapter(entries))
    lora_fx.merge(base, Adapter(entries), tmp_path / "out", untie=True)
    assert lora_fx.verify(tmp_path / "out", base, adapter=Adapter(entries), rows=None)
    want = explicit(name, base, *(torch.as_tensor(m, dtype=torch.float64) for m in moved))
    found, before = logits(load(name, tmp_path / "out")), logits(load(name, base))
    scale = float(want.abs().max())
    assert float((found - want).abs().max()) < 2e-6 * scale
    assert float((before - want).abs().max()) > 1e-2 * scale
