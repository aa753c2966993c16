"""A batch of 0 rows gives 0 rows in every mode, as the file without adapters does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.compare import rel
from lora_fx.onnx.session import open_session
from lora_fx.onnx.unnamed_sizes import unnamed_size
from tests.onnx.test_batch import Front, Words, adapter
from tests.onnx.test_batch_forms import Attention, adapters


class Layers(nn.Module):
    """Layers that read one value; three of them share their product with A."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum((torch.tanh(layer(x)) for layer in self.layers), torch.zeros(()))


class Heads(nn.Module):
    """A layer whose result is only reshaped to heads, with a −1 for one of the sizes."""

    def __init__(self, unnamed: str) -> None:
        super().__init__()
        self.unnamed = unnamed
        self.layer = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        sizes = {"batch": batch, "length": length, "heads": 2, "width": 3}
        sizes[self.unnamed] = -1
        return torch.tanh(self.layer(x).view(*sizes.values()).transpose(1, 2))


@dataclass(frozen=True)
class Case:
    """A model and its example inputs."""

    model: Callable[[], nn.Module]
    args: Callable[[], torch.Tensor]
    include: tuple[str, ...] | None = None


def floats(*shape: int) -> Callable[[], torch.Tensor]:
    return lambda: torch.randn(shape)


def ids() -> torch.Tensor:
    return torch.randint(0, 11, (3, 5))


CASES = {
    "a layer, rank 2": Case(lambda: Layers(1), floats(3, 6)),
    "a layer, rank 3": Case(lambda: Layers(1), floats(3, 5, 6)),
    "a layer, rank 4": Case(lambda: Layers(1), floats(3, 5, 2, 6)),
    "three layers, rank 2": Case(lambda: Layers(3), floats(3, 6)),
    "three layers, rank 3": Case(lambda: Layers(3), floats(3, 5, 6)),
    "three layers, rank 4": Case(lambda: Layers(3), floats(3, 5, 2, 6)),
    "a lookup": Case(Words, ids, ("table",)),
    "rows on another axis": Case(Words, ids, ("mid",)),
    "rows in front, rows with heads": Case(Front, ids, ("table", "mid", "heads")),
    "rows that are innermost": Case(Attention, floats(3, 5, 8)),
    "heads without a batch": Case(lambda: Heads("batch"), floats(3, 5, 6)),
    "heads without a length": Case(lambda: Heads("length"), floats(3, 5, 6)),
    "heads without a number": Case(lambda: Heads("heads"), floats(3, 5, 6)),
    "heads without a width": Case(lambda: Heads("width"), floats(3, 5, 6)),
}
COMBINATIONS: dict[str, dict[str, Any]] = {
    "batch": {"mode": "batch"},
    "batch, weights by row": {"mode": "batch", "scales": True},
    "batch for cuda": {"mode": "batch", "target": "cuda"},
    "switch": {"mode": "switch"},
}


@pytest.mark.parametrize("name", CASES)
def test_no_rows_give_no_rows(name: str, tmp_path: Path) -> None:
    """In each mode, beside all rows, which equal those of the row alone."""
    case = CASES[name]
    torch.manual_seed(0)
    x = case.args()
    cap = lora_fx.capture(case.model().eval(), (x,))
    include = None if case.include is None else [*case.include]
    two = [adapter(cap, seed, 2, include) for seed in (1, 2)]
    for label, options in COMBINATIONS.items():
        path = tmp_path / "model.onnx"
        lora_fx.export(cap, path, adapters=two, provider="cpu", force=True, **options)
        session = open_session(path, "cpu")
        x_name = next(n for n in session.input_names if not n.startswith("adapter_"))
        feeds = {
            x_name: x.numpy(),
            "adapter_ids": np.array([2, 0, 1]),
            "adapter_scales": np.array([0.5, 1, 2], np.float32),
        }
        (all_rows,) = session.run(feeds).values()
        (nothing,) = session.run({key: value[:0] for key, value in feeds.items()}).values()
        assert nothing.shape == (0, *all_rows.shape[1:]), label
        for row in range(3):
            alone = {key: value[row : row + 1] for key, value in feeds.items()}
            (y,) = session.run(alone).values()
            assert rel(y[0], all_rows[row]) < 2e-6, (label, row)


@pytest.mark.parametrize("mode", COMBINATIONS)
def test_heads_in_a_file_that_does_not_tell_their_number(mode: str, tmp_path: Path) -> None:
    """As in other exporters' files: inference does not know the largest of a size."""
    w = np.random.default_rng(0).standard_normal((6, 6)).astype(np.float32)
    model = onnx.parser.parse_model("""<ir_version: 10, opset_import: ["" : 20]>
    g (float[batch, length, 6] x) => (float[batch, n, heads, width] y)
    <int64[1] minus = {-1}, int64[1] three = {3}, float[6] bias = {1.0, 2.0, 3.0, 4.0, 5.0, 6.0}> {
        rows = Shape<start = 0, end = 1>(x)
        positions = Shape<start = 1, end = 2>(x)
        longest = ReduceMax(positions)
        product = MatMul(x, w)
        layer = Add(product, bias)
        target = Concat<axis = 0>(rows, longest, minus, three)
        heads = Reshape<allowzero = 1>(layer, target)
        y = Tanh(heads)
    }""")
    model.graph.initializer.append(onnx.numpy_helper.from_array(w, "w"))
    onnx.save(model, tmp_path / "m.onnx")
    factors = adapters(tmp_path / "m.onnx")
    path = tmp_path / "adapted.onnx"
    lora_fx.export(
        tmp_path / "m.onnx", path, adapters=factors, provider="cpu", **COMBINATIONS[mode]
    )
    assert "Gemm" in {node.op_type for node in onnx.load(path).graph.node}

    session = open_session(path, "cpu")
    x = np.random.default_rng(1).standard_normal((3, 5, 6)).astype(np.float32)
    ids = np.array([2, 0, 1])
    feeds = {"x": x, "adapter_ids": ids, "adapter_scales": np.ones(3, np.float32)}
    (all_rows,) = session.run(feeds).values()
    assert all_rows.shape == (3, 5, 2, 3)
    (nothing,) = session.run({key: value[:0] for key, value in feeds.items()}).values()
    assert nothing.shape == (0, 5, 2, 3)


TARGETS = {
    "a number": ("batch, length, minus, four", "batch, length, 2, 4", 2, True),
    "the symbol of an axis": ("batch, minus, two, four", "batch, length, 2, 4", "length", True),
    "a symbol of no axis": ("batch, length, minus, four", "batch, length, n, 4", "n", False),
    "behind a part of unknown length": ("sizes, minus, four", "batch, length, 2, 4", None, False),
}


@pytest.mark.parametrize("name", TARGETS)
def test_the_size_that_a_target_leaves_to_a_minus_one(name: str) -> None:
    parts, sizes, size, is_known = TARGETS[name]
    model = ir.from_onnx_text(f"""<ir_version: 10, opset_import: ["" : 20]>
    g (float[batch, length, 8] x, int64[n] sizes) => (float[{sizes}] y)
    <int64[1] minus = {{-1}}, int64[1] two = {{2}}, int64[1] four = {{4}},
     int64[1] batch, int64[1] length> {{
        batch = Shape<start = 0, end = 1>(x)
        length = Shape<start = 1, end = 2>(x)
        target = Concat<axis = 0>({parts})
        y = Reshape(x, target)
    }}""")
    unnamed = unnamed_size(model.graph[-1])
    assert unnamed is not None
    assert unnamed.size == size
    assert unnamed.is_known_of(model.graph.inputs[0]) == is_known


@pytest.mark.parametrize("parts", ["batch, length, two, four", "numbers"])
def test_targets_that_are_left_alone(parts: str) -> None:
    """The −1 of numbers alone follows from the count of elements, flat rows or not."""
    target = "numbers" if parts == "numbers" else "target"
    model = ir.from_onnx_text(f"""<ir_version: 10, opset_import: ["" : 20]>
    g (float[batch, length, 8] x) => (float[b, l, 2, 4] y)
    <int64[1] two = {{2}}, int64[1] four = {{4}}, int64[4] numbers = {{-1, 5, 2, 4}},
     int64[1] batch, int64[1] length> {{
        batch = Shape<start = 0, end = 1>(x)
        length = Shape<start = 1, end = 2>(x)
        target = Concat<axis = 0>({parts})
        y = Reshape(x, {target})
    }}""")
    assert unnamed_size(model.graph[-1]) is None
