"""Size 1, proven: where the model takes another path there, the module refuses it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree

from lora_fx.compare import rel
from lora_fx.fx.capture.capture import Captured
from lora_fx.fx.module import CapturedModule
from lora_fx.fx.tensors import to_numpy
from lora_fx.inputs import SIZES


def prove_ones(module: CapturedModule) -> None:
    """Ban size 1 where the model takes another path there than the captured graph.

    The capture drops torch's own exclusion of size 1; here the user's module and the graph run
    at size 1, and sizes that differ are refused at the door from then on.
    """
    captured = module.captured
    traced = captured.traced(False, captured.named)
    lone = {(traced.door.names[i], d) for i, d in traced.lone}
    if not lone:
        return
    symbols = {captured.requested.get(n, {}).get(d, "") for n, d in lone}
    banned: set[tuple[str, int]] = set()
    for symbol in symbols:
        size = (1, SIZES[0][1]) if symbol == "batch" else (SIZES[0][0], 1)
        if not _same_at(module, captured, module.sample(size)):
            banned |= {
                (n, d)
                for n, dims in captured.requested.items()
                for d, s in dims.items()
                if s == symbol
            }
    module.ban_ones(frozenset(banned))


def _same_at(module: CapturedModule, captured: Captured, named: Mapping[str, Any]) -> bool:
    model = captured.model
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), module.base():
            ours = pytree.tree_leaves(module._run_named(named))
            theirs = pytree.tree_leaves(captured.signature.call(model, named))
    except Exception:  # whatever stops either at this size, the size is not proven
        return False
    finally:
        for m, was in modes:
            m.training = was
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if isinstance(b, torch.Tensor)]
    return all(rel(to_numpy(a), to_numpy(b)) < 1e-4 or torch.equal(a, b) for a, b in pairs)
