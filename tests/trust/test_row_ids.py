"""Mode batch, ids out of range: NaN in the rows that asked where a runtime does not refuse.

The CPU's Gather refuses, so nothing would show whether the file is safe elsewhere. Here every file
is changed so that it cannot: the constant that ids out of range become is 0. OpenVINO, which
answers as it is, runs the same files where a Python with it is named in LORA_FX_OPENVINO.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import draw
from lora_fx.errors import LoraFxError, MistakeError
from lora_fx.onnx import row_guards
from lora_fx.onnx.graph.emitter import OnnxEmitter
from lora_fx.onnx.graph.graph import OnnxGraph
from lora_fx.onnx.load import load
from lora_fx.onnx.session import open_session
from lora_fx.passes.find import find
from tests.onnx.decoders import llama
from tests.onnx.test_batch import adapter

Feeds = dict[str, Any]
BIG = 2**63 - 1


class Words(nn.Module):
    """A lookup, a convolution and two layers; outputs of floats, integers and booleans."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.conv = nn.Embedding(11, 6), nn.Conv1d(6, 5, 3, padding=1)
        self.mid, self.head = nn.Linear(5, 5), nn.Linear(5, 9)

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.conv(self.table(ids).transpose(1, 2)).transpose(1, 2)
        return torch.tanh(self.mid(torch.relu(x)))

    def forward(self, ids: torch.Tensor) -> Any:
        return {"logits": self.head(self.hidden(ids))}


class Layers(Words):
    """Without the convolution, which the runtime has in float32 alone."""

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.mid(self.table(ids)[..., 1:]))


class Several(Words):
    def forward(self, ids: torch.Tensor) -> Any:
        x = self.hidden(ids)
        y = self.head(x)
        best, sure = y.argmax(-1), y > 0
        return {"hidden": x, "pooled": x.mean((1, 2)), "y": y, "best": best, "sure": sure}


class Integers(Words):
    def forward(self, ids: torch.Tensor) -> Any:
        return {"best": self.head(self.hidden(ids)).argmax(-1)}


class Inside(Words):
    """An output that the model goes on with, and one that no adapter reaches."""

    def forward(self, ids: torch.Tensor) -> Any:
        x = self.hidden(ids)
        return {"x": x, "y": self.head(x), "asked": torch.relu(ids.float())}


def words(rng: Any, rows: int) -> Feeds:
    return {"ids": rng.integers(0, 11, (rows, 6))}


@dataclass(frozen=True)
class Case:
    """What is exported, with how many adapters, and what it runs on."""

    model: Callable[[], nn.Module] = Words
    count: int = 2
    include: tuple[str, ...] = ("table", "conv", "mid", "head")
    dtype: torch.dtype = torch.float32
    options: tuple[tuple[str, Any], ...] = ()
    without_nan: tuple[str, ...] = ()


CASES = {
    "a lookup, a convolution, layers": Case(),
    "one adapter": Case(count=1),
    "seven adapters": Case(count=7),
    "a head that is not adapted": Case(include=("mid",)),
    "a lookup alone": Case(include=("table",)),
    "a convolution alone": Case(include=("conv",)),
    "several outputs": Case(Several, without_nan=("best", "sure")),
    "integers alone": Case(Integers, without_nan=("best",)),
    "an output in the midst": Case(Inside),
    "float16": Case(dtype=torch.float16),
    "float64": Case(Layers, include=("table", "mid"), dtype=torch.float64),
    "weights by row": Case(options=(("scales", True),)),
    "opset 21": Case(options=(("opset", 21),)),
}


def exported(case: Case, folder: Path) -> tuple[Path, Any]:
    model = case.model().eval().to(case.dtype)
    cap = lora_fx.capture(model, (torch.randint(0, 11, (2, 5)),))
    adapters = [adapter(cap, s, 2, [*case.include]) for s in range(1, case.count + 1)]
    path = folder / "b.onnx"
    report = lora_fx.export(
        cap, path, adapters=adapters, mode="batch", provider="cpu", **dict(case.options)
    )
    return path, report


def unrefused(path: Path) -> Path:
    """The file, and no Gather in it can be out of range."""
    model = onnx.load(path)
    (over,) = (t for t in model.graph.initializer if t.name == "adapter_ids_over")
    over.CopyFrom(onnx.numpy_helper.from_array(np.array(0, np.int64), over.name))
    other = path.with_name("unrefused.onnx")
    onnx.save(model, other)
    return other


def tried(count: int) -> list[list[int]]:
    """Ids of five rows, most of them with some out of range."""
    n = count + 1
    return [
        [-1, 0, 0, 1, count], [0, n + 6, -5, count, 1], [n] * 5, [0, 1, count, 0, 1],
        [BIG, -BIG - 1, 2**62, 2**62 + 1, 1], [0, 2**32, -(2**32), 2**32 + 1, count],
    ]  # fmt: skip


def fit(ids: list[int], bits: int) -> bool:
    """Whether all of them are integers of so many bits."""
    return all(-(2 ** (bits - 1)) <= i < 2 ** (bits - 1) for i in ids)


def check_rows(
    run: Callable[[Feeds], Feeds],
    feeds: Feeds,
    count: int,
    brought: tuple[str, ...] = ("\0",),
    bits: int = 64,
) -> None:
    """Rows that ask for none are NaN, or where that cannot be the base's; others are unchanged.

    In outputs of `brought`, the part of an input stays.
    """
    seen = 0
    for ids in (np.array(i) for i in tried(count) if fit(i, bits)):
        outside = (ids < 0) | (ids > count)
        expected = run({**feeds, "adapter_ids": np.where(outside, 0, ids)})
        found = run({**feeds, "adapter_ids": ids})
        for name, y in found.items():
            assert np.array_equal(y[~outside], expected[name][~outside]), (ids, name)
            seen += outside.sum()
            if y.dtype.kind != "f":
                assert np.array_equal(y, expected[name]), (ids, name)
                continue
            assert np.isfinite(expected[name]).all()
            nan = np.isnan(y)
            if name.startswith(brought):
                past = feeds[name.replace("present", "past_key_values" if "." in name else "past")]
                length = past.shape[-2]
                assert np.array_equal(y[..., :length, :], past)
                nan = nan[..., length:, :]
            assert nan[outside].all(), (ids, name)
    assert seen >= 8


def runner(path: Path) -> Callable[[Feeds], Feeds]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return lambda feeds: dict(zip(names, session.run(None, feeds), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_rows_that_ask_for_none_are_nan(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    path, report = exported(case, tmp_path)
    feeds = words(np.random.default_rng(0), 5)
    if dict(case.options).get("scales"):
        feeds["adapter_scales"] = np.linspace(0.5, 1.5, 5).astype("f")
    said = [w for w in report.warnings if "cannot hold NaN" in w]
    assert [w.split("'")[1] for w in said] == [*case.without_nan]
    check_rows(runner(unrefused(path)), feeds, case.count)
    run = runner(path)
    with pytest.raises(Exception, match=f"adapter_ids out of range, 0 to {case.count}"):
        run({**feeds, "adapter_ids": np.array([0, 1, case.count + 1, 0, 1])})
    for bad in (2**62, 2**62 + 1, -1, -(2**63)):  # times a rank, some wrap around to valid rows
        with pytest.raises(Exception, match="adapter_ids out of range"):
            run({**feeds, "adapter_ids": np.array([0, 1, bad, 0, 1])})


FOREIGN = {
    "opset 11": (11, "float[batch, length, 5] y", "y = MatMul(x, q)"),
    "a head that widens": (17, "float[batch, length, 8] y", "a = MatMul(x, q) y = MatMul(a, w)"),
    "a bias behind it": (
        17, "float[batch, length, 8] y", "a = MatMul(x, q) t = MatMul(a, w) y = Add(t, c)",
    ),
    "rank 1": (13, "float[batch] y", "a = MatMul(x, q) y = ReduceMax<axes=[1, 2], keepdims=0>(a)"),
    "behind a Relu": (13, "float[batch, length, 5] y", "a = MatMul(x, q) y = Relu(a)"),
    "a Max of two, which may drop NaN": (
        13, "float[batch, length, 5] y", "a = MatMul(x, q) b = Relu(a) y = Max(b, a)",
    ),
    "two outputs": (
        13,
        "float[batch, length, 5] y, float[batch, length, 5] z",
        "y = MatMul(x, q) z = Relu(y)",
    ),
    "an unknown rank": (
        17, "float[batch, length, 5] y", "a = MatMul(x, q) y = com.microsoft.Gelu(a)",
    ),
    "new positions behind those of a cache": (
        17, "float[batch, all, 5] present, float[batch, length, 5] z",
        "a = MatMul(x, q) present = Concat<axis=1>(past, a) z = Tanh(a)",
    ),
    "the same, with integers beside it": (
        17, "float[batch, all, 5] y, int64[batch, all] z",
        "a = MatMul(x, q) y = Concat<axis=-2>(past, a) z = ArgMax<axis=2, keepdims=0>(y)",
    ),
}  # fmt: skip


def foreign(folder: Path, opset: int, outputs: str, body: str, *, unknown: bool) -> Path:
    past = ", float[batch, past, 5] past" * ("past" in body)
    text = f"""<ir_version: 8, opset_import: ["" : {opset}, "com.microsoft" : 1]>
    g (float[batch, length, 6] x{past}) => ({outputs})
    <float[6, 5] q, float[5, 8] w, float[8] c> {{ {body} }}"""
    model = onnx.parser.parse_model(text)
    rng, sizes = np.random.default_rng(0), {"q": (6, 5), "w": (5, 8), "c": (8,)}
    del model.graph.initializer[:]
    for name, size in sizes.items():
        if name in body:
            value = rng.standard_normal(size).astype("f")
            model.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    model = onnx.shape_inference.infer_shapes(model)
    if unknown:
        for value in (*model.graph.output, *model.graph.value_info):
            value.type.tensor_type.ClearField("shape")
    onnx.save(model, folder / "m.onnx")
    return folder / "m.onnx"


@pytest.mark.parametrize("name", FOREIGN)
def test_files_of_other_programs(name: str, tmp_path: Path) -> None:
    path = foreign(tmp_path, *FOREIGN[name], unknown=name == "an unknown rank")
    targets = find(OnnxGraph(load(path))).targets
    adapters = [
        Adapter(
            {
                t.key: lora_fx.LowRank(*draw(t.key, t.layout, 3, seed, "probe"), 3.0, t.layout)
                for t in targets
                if t.key == "q"
            }
        )
        for seed in (1, 2, 3)
    ]
    lora_fx.export(path, tmp_path / "b.onnx", adapters=adapters, mode="batch", provider="cpu")
    rng = np.random.default_rng(1)
    feeds = {"x": rng.standard_normal((5, 4, 6)).astype("f")}
    if "past" in FOREIGN[name][2]:
        feeds["past"] = rng.standard_normal((5, 3, 5)).astype("f")
    check_rows(runner(unrefused(tmp_path / "b.onnx")), feeds, 3, brought=("present",))


@pytest.mark.slow
def test_a_decoder_with_a_cache(tmp_path: Path) -> None:
    """Its new keys and values are NaN, and what the caller brings goes out as it came."""
    path = decoder(tmp_path)
    for past in (0, 3):
        check_rows(runner(unrefused(path)), tokens(past), 2, brought=("present.",))


def decoder(folder: Path) -> Path:
    model = llama(1)
    ids = (torch.randint(0, 96, (2, 5)),)
    adapters = [adapter(lora_fx.capture(model, ids), s, 2, ["q_proj", "down_proj"]) for s in (1, 2)]
    path = folder / "b.onnx"
    lora_fx.export(model, path, adapters=adapters, mode="batch", cache=True, provider="cpu")
    return path


def tokens(past: int) -> Feeds:
    rng = np.random.default_rng(0)
    feeds: Feeds = {
        "input_ids": rng.integers(1, 96, (5, 2)), "attention_mask": np.ones((5, 2 + past), int),
    }  # fmt: skip
    for kind in ("key", "value"):
        cached = rng.standard_normal((5, 2, past, 8)).astype("f")
        feeds[f"past_key_values.0.{kind}"] = cached
    return feeds


def test_a_range_over_all_rows(tmp_path: Path) -> None:
    """NaN within the model would reach every row there: it is put at the outputs alone."""
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[batch, 6] x) => (float[batch, 8] y) {
        a = MatMul(x, q)
        codes, scale, zero = DynamicQuantizeLinear(a)
        b = DequantizeLinear(codes, scale, zero)
        y = MatMul(b, w)
    }"""
    model, rng = onnx.parser.parse_model(text), np.random.default_rng(0)
    for name, size in {"q": (6, 5), "w": (5, 8)}.items():
        value = rng.standard_normal(size).astype("f")
        model.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    onnx.save(onnx.shape_inference.infer_shapes(model), tmp_path / "m.onnx")
    (target,) = (t for t in find(OnnxGraph(load(tmp_path / "m.onnx"))).targets if t.key == "q")
    factors = draw("q", target.layout, 2, 1, "probe")
    one = Adapter({"q": lora_fx.LowRank(*factors, 2.0, target.layout)})
    path = tmp_path / "b.onnx"
    lora_fx.export(tmp_path / "m.onnx", path, adapters=[one], mode="batch", provider="cpu")
    x = rng.standard_normal((5, 6)).astype("f")
    check_rows(runner(unrefused(path)), {"x": x}, 1)


GOOD = np.array([0, 1, 2, 1, 0])
WRONG = {
    "below": (np.array([0, 1, -1, 1, 0]), r"row 2 asks for adapter -1, .*out of range.* 0 to 2"),
    "above": (np.array([0, 1, 2, 1, 3]), r"row 4 asks for adapter 3, .*out of range"),
    "far above": (np.array([0, 1, 2**62 + 1, 1, 3]), r"row 2 asks for adapter 4611686018427387905"),
    "int32": (GOOD.astype("int32"), r"is int32; expected an array of int64"),
    "uint64": (GOOD.astype("uint64"), r"is uint64"),
    "floats": (GOOD.astype("float32"), r"is float32"),
    "booleans": (GOOD > 0, r"is bool"),
    "text": (np.array(["a"] * 5), r"is <U1"),
    "a list": ([0, 1, 2, 1, 0], r"is list"),
    "a number": (np.array(1), r"is \[\]; expected \[5\], one for each row"),
    "a column": (GOOD[:, None], r"is \[5, 1\]"),
    "too few": (GOOD[:3], r"is \[3\]; expected \[5\]"),
    "too many": (np.concatenate([GOOD, GOOD]), r"is \[10\]; expected \[5\]"),
    "none": (None, r"'adapter_ids' is missing"),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(Case(), tmp_path_factory.mktemp("plain"))[0]


@pytest.mark.parametrize("name", WRONG)
def test_a_session_says_which_ids_are_wrong(name: str, plain: Path) -> None:
    ids, message = WRONG[name]
    session = open_session(plain, "cpu")
    feeds = words(np.random.default_rng(0), 5)
    given = feeds if ids is None else {**feeds, "adapter_ids": ids}
    with pytest.raises(LoraFxError, match=message) as caught:
        session.run(given)
    assert "0 is the base, 1 to 2 are the adapters 'adapter_1', 'adapter_2'" in str(
        caught.value.hint
    )
    assert len(str(caught.value).splitlines()) == 2
    assert session.run({**feeds, "adapter_ids": GOOD})["logits"].shape == (5, 6, 9)


def test_an_unguarded_output_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = row_guards.guard_outputs

    def forgets(graph: Any, outside: Any) -> None:
        last = graph.model.graph.outputs.pop()
        right(graph, outside)
        graph.model.graph.outputs.append(last)

    monkeypatch.setattr(row_guards, "guard_outputs", forgets)
    with pytest.raises(MistakeError, match="no row of 'logits' becomes NaN"):
        exported(Case(), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrong", ["below", "above"])
def test_a_guard_that_misses_some_is_not_written(
    wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = OnnxEmitter.call

    def half(self: Any, op: str, *inputs: Any, **attributes: Any) -> Any:
        if op == "Or":
            return right(self, "Identity", inputs[wrong == "below"])
        return right(self, op, *inputs, **attributes)

    monkeypatch.setattr(OnnxEmitter, "call", half)
    with pytest.raises(MistakeError, match="out of range have numbers"):
        exported(Case(), tmp_path)


ON_OPENVINO = """
import sys, numpy, openvino
_, file, feeds, out = sys.argv
compiled = openvino.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
given = dict(numpy.load(feeds))
made = {}
for number in range(int(given.pop("runs"))):
    ids = {"adapter_ids": given[f"ids {number}"]}
    plain = {k: v for k, v in given.items() if not k.startswith("ids ")}
    found = compiled({**plain, **ids})
    for port in compiled.outputs:
        made[f"{number} {next(iter(port.get_names()))}"] = found[port]
numpy.savez(out, **made)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CASES, "a decoder with a cache"])
def test_on_openvino(name: str, tmp_path: Path) -> None:
    """Numbers of 32 bits alone: it reads every int64 input as int32."""
    python = os.environ.get("LORA_FX_OPENVINO", sys.executable)
    if subprocess.run([python, "-c", "import openvino"], capture_output=True).returncode:
        pytest.skip("openvino is not installed: LORA_FX_OPENVINO=PYTHON names one that has it")
    if name in CASES:
        case, count = CASES[name], CASES[name].count
        path, _ = exported(case, tmp_path)
        feeds = words(np.random.default_rng(0), 5)
        if dict(case.options).get("scales"):
            feeds["adapter_scales"] = np.linspace(0.5, 1.5, 5).astype("f")
    else:
        path, count, feeds = decoder(tmp_path), 2, tokens(3)
    runs = [np.array(i) for i in tried(count) if fit(i, 32)]
    both = [np.where((i < 0) | (i > count), 0, i) for i in runs] + runs
    given = {**feeds, **{f"ids {k}": i for k, i in enumerate(both)}, "runs": np.array(len(both))}
    np.savez(tmp_path / "in.npz", **given)
    subprocess.run(
        [python, "-c", ON_OPENVINO, path, tmp_path / "in.npz", tmp_path / "out.npz"], check=True
    )
    made = dict(np.load(tmp_path / "out.npz"))
    asked = [i.tolist() for i in both]

    def run(feeds: Feeds) -> Feeds:
        number = asked.index(feeds["adapter_ids"].tolist())
        rows = (k.partition(" ") for k in made)
        return {name: made[f"{k} {name}"] for k, _, name in rows if k == str(number)}

    check_rows(run, feeds, count, brought=("present.",), bits=32)
