"""Insert and Fold in the pass managers of torch.fx and onnx_ir, against W + s·BA."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch.fx.passes.infra.pass_manager import PassManager

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import LowRank
from lora_fx.compare import rel
from lora_fx.fx.graph.pass_manager import ManagedFxPass as FxManaged
from lora_fx.onnx.graph.graph import ManagedOnnxPass as OnnxManaged
from lora_fx.onnx.graph.graph import OnnxGraph
from lora_fx.passes.find import find
from lora_fx.passes.fold import Fold
from lora_fx.passes.insert import Insert
from tests.passes.test_one_protocol import Same, onnx_model, reference, run, updates, weights

X = np.random.default_rng(1).standard_normal((3, 6)).astype(np.float32)


def change() -> dict[str, LowRank]:
    return updates(find(OnnxGraph(onnx_model())))


def wanted() -> list[Any]:
    return reference(X, Adapter(change()).deltas())


@pytest.mark.parametrize("rewrite", [Insert, Fold])
def test_torch_fx(rewrite: Any) -> None:
    module = torch.export.export(Same(weights()), (torch.from_numpy(X),)).module()
    manager = PassManager([FxManaged(rewrite(change()))])
    result = manager(module)
    assert result.modified
    with torch.no_grad():
        got = result.graph_module(torch.from_numpy(X))
    assert all(rel(g.numpy(), w) < 1e-6 for g, w in zip(got, wanted(), strict=True))


@pytest.mark.parametrize("rewrite", [Insert, Fold])
def test_onnx_ir(rewrite: Any) -> None:
    model = onnx_model()
    sequence = ir.passes.Sequential(OnnxManaged(rewrite(change())))
    assert sequence(model).modified
    assert all(rel(g, w) < 1e-6 for g, w in zip(run(model, X), wanted(), strict=True))
