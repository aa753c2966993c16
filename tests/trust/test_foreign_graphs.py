"""Files of other programs: rows through their ops, sequences of tensors, files changed since."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import draw
from lora_fx.compare import rel
from lora_fx.errors import LoraFxError
from lora_fx.onnx import Session
from lora_fx.onnx.graph.graph import OnnxGraph
from lora_fx.onnx.load import load
from lora_fx.onnx.manifest import manifest_of
from lora_fx.onnx.session import open_session
from lora_fx.passes.find import find
from tests.onnx.test_batch import adapter

SIZES = {
    "q": (6, 8), "w": (4, 4), "gw": (1, 12, 8), "gr": (1, 12, 4), "lw": (2, 16, 8),
    "lr": (2, 16, 4), "rw": (1, 4, 8), "rr": (1, 4, 4), "v": (8, 4),
}  # fmt: skip
INTS = {
    "four": 4,
    "zero": 0,
    "one": 1,
    "axis": [1],
    "twice": [1, 2, 1],
    "two": [2],
    "halves": [3, 5],
}
LAYERS = "a = MatMul(x, q) t = Transpose<perm = [1, 0, 2]>(a) "
BODIES = {
    "a sequence, split and picked": (
        "a = MatMul(x, q) s = SplitToSequence<axis = -1>(a, four) b = SequenceAt(s, zero) "
        "c = SequenceAt(s, one) d = Mul(b, c) y = MatMul(d, w)"
    ),
    "a sequence, split and joined": (
        "a = MatMul(x, q) s = SplitToSequence<axis = 2>(a, halves) "
        "b = ConcatFromSequence<axis = -1>(s) y = MatMul(b, v)"
    ),
    "a sequence of rank 2, joined with a new axis": (
        "a = MatMul(x, q) s = SplitToSequence<axis = 2, keepdims = 0>(a) "
        "b = ConcatFromSequence<axis = 2, new_axis = 1>(s) y = MatMul(b, v)"
    ),
    "a sequence that is put together": (
        "a = MatMul(x, q) b = Relu(a) s = SequenceConstruct(a, b) r = SequenceInsert(s, b, zero) "
        "u = SequenceErase(r, one) c = ConcatFromSequence<axis = 1>(u) y = MatMul(c, v)"
    ),
    "a GRU": (
        LAYERS + "h, l = GRU<hidden_size = 4>(t, gw, gr) s = Squeeze(h, axis) "
        "b = Transpose<perm = [1, 0, 2]>(s) y = MatMul(b, w)"
    ),
    "the last state of a GRU": (
        LAYERS + "h, l = GRU<hidden_size = 4>(t, gw, gr) b = Transpose<perm = [1, 0, 2]>(l) "
        "y = MatMul(b, w)"
    ),
    "an LSTM of two directions": (
        LAYERS + 'h, l, c = LSTM<hidden_size = 4, direction = "bidirectional">(t, lw, lr) '
        "s = Transpose<perm = [2, 0, 1, 3]>(h) d = ReduceSum<keepdims = 0>(s, two) y = MatMul(d, w)"
    ),
    "an RNN": (
        LAYERS + "h, l = RNN<hidden_size = 4>(t, rw, rr) s = Squeeze(h, axis) "
        "b = Transpose<perm = [1, 0, 2]>(s) y = MatMul(b, w)"
    ),
    "rows that are reversed": (
        "a = MatMul(x, q) n = ReduceMax<keepdims = 0, axes = [1, 2]>(x) m = Clip(n, lo, hi) "
        "k = Cast<to = 7>(m) r = ReverseSequence<batch_axis = 0, time_axis = 1>(a, k) "
        "y = MatMul(r, v)"
    ),
    "rows that are repeated inside": ("a = MatMul(x, q) t = Tile(a, twice) y = MatMul(t, v)"),
}  # fmt: skip
MIXED = {
    "a sequence of rows": (
        "a = MatMul(x, q) s = SplitToSequence<axis = 0>(a) b = SequenceAt(s, zero) "
        "c = Add(a, b) y = MatMul(c, v)", "SplitToSequence",
    ),
    "a GRU along the batch": (
        "a = MatMul(x, q) h, l = GRU<hidden_size = 4>(a, gw, gr) s = Squeeze(h, axis) "
        "y = MatMul(s, w)", "GRU",
    ),
    "rows that are reversed among each other": (
        "a = MatMul(x, q) n = ReduceMax<keepdims = 0, axes = [0, 2]>(x) m = Clip(n, lo, lo) "
        "k = Cast<to = 7>(m) r = ReverseSequence<batch_axis = 1, time_axis = 0>(a, k) "
        "y = MatMul(r, v)", "ReduceMax",
    ),
    "rows that are repeated": (
        "a = MatMul(x, q) t = Tile(a, doubled) h = Add(t, t) y = MatMul(h, v)", "Tile",
    ),
}  # fmt: skip


def saved(
    folder: Path, body: str, x: str = "float[batch, length, 6] x", y: str = "float y"
) -> Path:
    text = f"""<ir_version: 8, opset_import: ["" : 17]>
    g ({x}) => ({y}) {{ {body} }}"""
    model, rng = onnx.parser.parse_model(text), np.random.default_rng(0)
    words = {*text.replace("(", " ").replace(")", " ").replace(",", " ").split()}
    values: dict[str, Any] = {k: rng.standard_normal(s).astype("f") for k, s in SIZES.items()}
    values |= {k: np.array(n, np.int64) for k, n in INTS.items()}
    values |= {"lo": np.float32(1), "hi": np.float32(3), "doubled": np.array([2, 1, 1])}
    for name in words & {*values}:
        tensor = onnx.numpy_helper.from_array(np.asarray(values[name]), name)
        model.graph.initializer.append(tensor)
    model = onnx.shape_inference.infer_shapes(model)
    kind = model.graph.output[0].type
    if kind.HasField("tensor_type") and not kind.tensor_type.HasField("shape"):
        model.graph.output[0].type.tensor_type.shape.dim.add().dim_param = "batch"
        for _ in range(2):
            model.graph.output[0].type.tensor_type.shape.dim.add()
    path = folder / "m.onnx"
    onnx.save(model, path)
    return path


def adapters_of(path: Path, count: int = 2) -> list[Adapter]:
    targets = [t for t in find(OnnxGraph(load(path))).targets if t.key in ("q", "w", "v")]
    made = []
    for seed in range(1, count + 1):
        low = {
            t.key: lora_fx.LowRank(*draw(t.key, t.layout, 2, seed, "probe"), 2.0, t.layout)
            for t in targets
        }
        made.append(Adapter(low))
    return made


@pytest.mark.parametrize("name", BODIES)
def test_rows_are_followed(name: str, tmp_path: Path) -> None:
    """Each row of a batch is what the file merged with its adapter alone gives."""
    path = saved(tmp_path, BODIES[name], y="float[batch, a, b] y")
    adapters = adapters_of(path)
    assert len(adapters[0].lowrank) == 2
    batch = tmp_path / "b.onnx"
    assert lora_fx.export(path, batch, adapters=adapters, mode="batch", provider="cpu")
    x = np.random.default_rng(1).standard_normal((4, 5, 6)).astype("f")
    ids = np.array([2, 0, 1, 2])
    got = open_session(batch, "cpu").run({"x": x, "adapter_ids": ids})["y"]
    for i in range(3):
        merged = tmp_path / f"{i}.onnx" if i else path
        if i:
            lora_fx.export(path, merged, adapters=adapters[i - 1], provider="cpu")
        alone = open_session(merged, "cpu").run({"x": x})["y"]
        for row in np.flatnonzero(ids == i):
            assert rel(got[row], alone[row]) < 2e-6, (i, row)
    assert rel(got[0], got[3]) > 0.05


@pytest.mark.parametrize("name", MIXED)
def test_rows_that_mix_are_refused(name: str, tmp_path: Path) -> None:
    body, op = MIXED[name]
    path = saved(tmp_path, body, y="float[batch, a, b] y")
    with pytest.raises(
        LoraFxError,
        match=f"{op} '.' may mix the rows|output 'y' does not have one row for each row",
    ):
        lora_fx.export(
            path, tmp_path / "b.onnx", adapters=adapters_of(path), mode="batch", provider="cpu"
        )
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


@pytest.mark.parametrize("name", [n for n in BODIES if "sequence" in n])
def test_sequences_in_float16(name: str, tmp_path: Path) -> None:
    """What makes and reads them stays in float32."""
    path = saved(tmp_path, BODIES[name], y="float[batch, a, b] y")
    out = tmp_path / "h.onnx"
    assert lora_fx.export(path, out, precision="float16", provider="cpu")
    x = np.random.default_rng(1).standard_normal((4, 5, 6)).astype("f")
    got, want = (open_session(p, "cpu").run({"x": x})["y"] for p in (out, path))
    assert 0 < rel(got, want) < 8e-3


SEQUENCE = "a = MatMul(x, q) y = SplitToSequence<axis = -1>(a, four)"


@pytest.mark.parametrize("how", ["merged", "load", "batch", "optimise", "float16", "int8"])
def test_an_output_that_is_a_sequence(how: str, tmp_path: Path) -> None:
    """Its tensors are compared one by one, as y[0] and y[1]."""
    path = saved(tmp_path, SEQUENCE, y="seq(float[batch, length, 4]) y")
    one, two = adapters_of(path)
    options: dict[str, Any] = {
        "optimise": {"optimise": True}, "batch": {"adapters": [one, two], "mode": how},
    }.get(how, {"adapters": one, "mode": how})  # fmt: skip
    if how in ("float16", "int8"):
        options = {"precision": how}
    assert lora_fx.export(path, tmp_path / "o.onnx", provider="cpu", **options)
    assert lora_fx.verify(path, path, provider="cpu")
    x = np.random.default_rng(1).standard_normal((2, 3, 6)).astype("f")
    ids = {"adapter_ids": np.array([0, 0])} if how == "batch" else {}
    got = open_session(tmp_path / "o.onnx", "cpu").run({"x": x, **ids})
    base = open_session(path, "cpu").run({"x": x})
    assert {*got} == {*base} == {"y[0]", "y[1]"} and base["y[1]"].shape == (2, 3, 4)
    assert (rel(got["y[1]"], base["y[1]"]) > 0.05) == (how == "merged")


def test_a_sequence_in_mode_switch_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, SEQUENCE, y="seq(float[batch, length, 4]) y")
    (one, _) = adapters_of(path)
    with pytest.raises(LoraFxError, match=r"output 'y' is seq\(tensor\(float\)\)"):
        lora_fx.export(path, tmp_path / "o.onnx", provider="cpu", adapters=one, mode="switch")


# Batch mode and a batch that is fixed: the hint does not come back with the same error.


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4)


class Pinned(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.reshape(2, 3, 4)).reshape(2, 12)


class Branching(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x[:, :4])
        return y if float(y.sum()) < 1e9 else y * 2


class Two(Layer):
    def forward(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + self.layer(z).sum(0)


class Pair(Layer):
    def forward(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + self.layer(z)


NO_BATCH: dict[str, tuple[Callable[[], nn.Module], int, dict[str, Any], str, str]] = {
    "pinned": (Pinned, 1, {}, "x dimension 0 is fixed at 2 by ", "use mode merged or switch"),
    "recorded": (Branching, 1, {}, "x dimension 0 is fixed at 2 by ", "use mode merged or switch"),
    "asked for": (
        Pinned, 1, {"dynamic": {"x": {0: "batch"}}}, "x dimension 0 is fixed at 2 by ",
        "use mode merged or switch",
    ),
    "two symbols": (
        Two, 2, {"dynamic": {"x": {0: "n"}, "z": {0: "m"}}}, "found m, n",
        "one symbol for dimension 0 of x, z",
    ),
    "static": (Pair, 2, {"static": ["x:0"]}, "found none", "leave dimension 0 of x dynamic"),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_BATCH)
def test_a_model_without_one_batch(name: str, tmp_path: Path) -> None:
    model, count, how, message, hint = NO_BATCH[name]
    args = tuple(torch.randn(2, 12 if count == 1 else 4) for _ in range(count))
    cap = lora_fx.capture(model().eval(), args, **how)
    one = adapter(cap, 1, 2)
    with pytest.raises(LoraFxError) as caught:
        lora_fx.export(cap, tmp_path / "b.onnx", adapters=[one], mode="batch", provider="cpu")
    assert message in caught.value.message and hint in caught.value.hint
    assert "needs one dynamic dimension 0" in caught.value.message


@pytest.mark.parametrize("x", ["float[2, 3, 6] x", "float[n, 3, 6] x, float[m, 3, 6] z"])
def test_a_file_without_one_batch(x: str, tmp_path: Path) -> None:
    """--dynamic is refused for a file; naming its dimensions works."""
    body = "t = Add(x, z) y = MatMul(t, q)" if "z" in x else "y = MatMul(x, q)"
    path = saved(tmp_path, body, x=x, y=f"float[{'n' if 'z' in x else 2}, 3, 8] y")
    adapters = adapters_of(path)
    with pytest.raises(LoraFxError) as caught:
        lora_fx.export(path, tmp_path / "b.onnx", adapters=adapters, mode="batch", provider="cpu")
    assert "dynamic" not in caught.value.hint
    assert "onnx.tools.update_model_dims.update_inputs_outputs_dims" in caught.value.hint
    from onnx.tools.update_model_dims import update_inputs_outputs_dims

    named = {str(v): ["batch", 3, 6] for v in ("xz" if "z" in x else "x")}
    model = onnx.load(path)
    del model.graph.value_info[:]
    onnx.save(update_inputs_outputs_dims(model, named, {"y": ["batch", 3, 8]}), path)
    assert lora_fx.export(
        path, tmp_path / "b.onnx", adapters=adapters, mode="batch", provider="cpu"
    )


# Files of ours that another program has changed.


def folded(model: onnx.ModelProto) -> None:
    """As onnxsim and remove_initializer_from_input leave it: no default is an input."""
    kept = [i for i in model.graph.input if "lora" not in i.name]
    del model.graph.input[:]
    model.graph.input.extend(kept)


def half_folded(model: onnx.ModelProto) -> None:
    kept = [i for i in model.graph.input if i.name != "q.lora_B"]
    del model.graph.input[:]
    model.graph.input.extend(kept)


def renamed(model: onnx.ModelProto) -> None:
    for value in (*model.graph.input, *model.graph.initializer):
        value.name = value.name.replace("q.lora_A", "q_lora_A")
    for node in model.graph.node:
        node.input[:] = [n.replace("q.lora_A", "q_lora_A") for n in node.input]


def without_defaults(model: onnx.ModelProto) -> None:
    kept = [t for t in model.graph.initializer if not t.name.startswith("q.lora")]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)


def in_doubles(model: onnx.ModelProto) -> None:
    """Another dtype, and a Cast behind it."""
    for value in model.graph.input:
        if value.name == "q.lora_A":
            value.type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
    for tensor in model.graph.initializer:
        if tensor.name == "q.lora_A":
            array = onnx.numpy_helper.to_array(tensor).astype(np.float64)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    cast = onnx.helper.make_node("Cast", ["q.lora_A"], ["q_single"], to=1)
    for node in model.graph.node:
        node.input[:] = [n.replace("q.lora_A", "q_single") for n in node.input]
    model.graph.node.insert(0, cast)


CHANGED: dict[str, tuple[Callable[[onnx.ModelProto], None], str]] = {
    "folded": (folded, "the graph has no 'q.lora_A', which its manifest names for 'q'"),
    "half of it folded": (half_folded, "the graph has no 'q.lora_B'"),
    "renamed": (renamed, "the graph has no 'q.lora_A'"),
    "without defaults": (without_defaults, "the graph has no 'q.lora_A'"),
    "in another dtype": (in_doubles, "'q.lora_A' is float64, and float32 in its manifest"),
}


@pytest.fixture(scope="module")
def switchable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("switchable")
    path = saved(folder, "y = MatMul(x, q)", y="float[batch, length, 8] y")
    (one, *_) = adapters_of(path)
    lora_fx.export(path, folder / "s.onnx", adapters={"one": one}, mode="switch", provider="cpu")
    return folder


@pytest.mark.parametrize("name", CHANGED)
def test_a_switch_file_that_was_changed_is_not_opened(
    name: str, switchable: Path, tmp_path: Path
) -> None:
    change, message = CHANGED[name]
    model = onnx.load(switchable / "s.onnx")
    change(model)
    path = tmp_path / "changed.onnx"
    onnx.save(model, path)
    for opened in (lambda: Session(path, "cpu"), lambda: manifest_of(path)):
        with pytest.raises(LoraFxError) as caught:
            opened()
        assert caught.value.message.startswith(f"{path}: ") and message in caught.value.message
        assert "take the file that export wrote" in caught.value.hint


def test_a_switch_file_that_was_saved_again_is_opened(switchable: Path, tmp_path: Path) -> None:
    model = onnx.shape_inference.infer_shapes(onnx.load(switchable / "s.onnx"))
    onnx.save(model, tmp_path / "again.onnx")
    session = Session(tmp_path / "again.onnx", "cpu")
    session.load("one", switchable / "one.onnx_adapter")
    x = np.random.default_rng(1).standard_normal((2, 3, 6)).astype("f")
    assert rel(session.run({"x": x}, adapter="one")["y"], session.run({"x": x})["y"]) > 0.05
