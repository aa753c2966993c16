"""float16 with islands of float32, and int8: near enough to float32, or not written."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx_ir.passes.common import ShapeInferencePass
from torch import nn

import lora_fx
from lora_fx.compare import rel
from lora_fx.errors import LoraFxError
from lora_fx.onnx import precision
from lora_fx.onnx.candidate_error import WorstError
from lora_fx.onnx.rewrites.to_half import ToHalf
from lora_fx.onnx.session import open_session
from tests.providers import PROVIDERS

HALF, EIGHT = 8 * 2.0**-10, 8 * 2.0**-7


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(24, 40), nn.Linear(40, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.tanh(self.a(x)))


class Large(Plain):
    """In the middle its numbers are beyond what float16 holds."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x)
        return self.b(torch.tanh(torch.sqrt((h * 300) * (h * 300) + 1) / 300))


X = torch.randn(4, 24, generator=torch.Generator().manual_seed(1))


def written(model: nn.Module, path: Path, provider: str = "cpu", **options: Any) -> Any:
    adapter = lora_fx.insert(model, (X,), rank=3, seed=4).eval()
    for name, p in adapter.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, 0, 0.2)
    report = lora_fx.export(adapter, path, provider=provider, **options)
    with torch.no_grad():
        wanted = adapter(X).numpy()
    got = next(iter(open_session(path, provider).run({"x": X.numpy()}).values()))
    return report, rel(got, wanted)


def kinds(path: Path) -> dict[str, int]:
    """Initialiser → its ONNX dtype."""
    return {t.name: t.data_type for t in onnx.load(path).graph.initializer}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("optimise", [False, True])
def test_float16(optimise: bool, tmp_path: Path, provider: str) -> None:
    report, error = written(
        Plain().eval(), tmp_path / "m.onnx", provider, precision="float16", optimise=optimise
    )
    assert 1e-6 < error <= HALF
    found = kinds(tmp_path / "m.onnx")
    assert {found["a.weight"], found["b.weight"]} == {onnx.TensorProto.FLOAT16}
    (said,) = [w for w in report.warnings if w.startswith("float16")]
    assert "outputs differ from float32 by" in said and "stay in float32" not in said
    graph = onnx.load(tmp_path / "m.onnx").graph
    assert {v.type.tensor_type.elem_type for v in (*graph.input, *graph.output)} == {1}


def test_what_overflows_stays_in_float32(tmp_path: Path) -> None:
    report, error = written(Large().eval(), tmp_path / "m.onnx", precision="float16")
    assert error <= HALF
    (said,) = [w for w in report.warnings if w.startswith("float16")]
    assert "nodes stay in float32" in said
    model = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "m.onnx"))
    dtypes = {v.name: v.type.tensor_type.elem_type for v in model.graph.value_info}
    of = {n.op_type: dtypes.get(n.output[0]) for n in model.graph.node}
    assert of["Sqrt"] == onnx.TensorProto.FLOAT and of["Tanh"] == onnx.TensorProto.FLOAT16


def narrowed(
    worst: Callable[[set[str]], float], tol: float = precision.GATES["float16"]
) -> precision.Narrowed:
    """A chain of ten nodes, with an error that depends on which are in float32."""
    text = " ".join(f"v{i + 1} = Neg(v{i})" for i in range(10))
    model = ir.from_onnx_text(
        f'<ir_version: 10, opset_import: ["": 20]> m (float[3] v0) => (float[3] v10) {{ {text} }}'
    )

    class Error(WorstError):
        failure = ""

        def __init__(self) -> None:
            pass

        def __call__(self, candidate: ir.Model) -> float:
            half = {n.name for n in candidate.graph if n.outputs[0].dtype == ir.DataType.FLOAT16}
            return worst({str(n.name) for n in model.graph if n.op_type == "Neg"} - half)

        def place(self, candidate: ir.Model, gate: float, drawn: int) -> str:
            return "on random inputs at v0 [3]"

    for i, node in enumerate(model.graph):
        node.name = f"n{i}"
    limit = precision.Limit("float16", tol, Error(), drawn=1)
    return precision._to_float16(model, limit, {})


def test_culprits_are_found_by_bisection() -> None:
    culprits, calls = {"n2", "n7"}, 0

    def worst(kept: set[str]) -> float:
        nonlocal calls
        calls += 1
        return 1.0 if culprits - kept else 1e-4

    made = narrowed(worst)
    assert set(made.islands) == culprits and made.error == 1e-4
    assert calls <= 3 + 2 * 4  # three whole ones, and log2(10) for each culprit


def test_a_model_that_needs_float32_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "MOST", 3)
    with pytest.raises(LoraFxError, match="with 3 nodes left in float32"):
        narrowed(lambda kept: 1.0 if len(kept) < 9 else 1e-4)


@pytest.mark.parametrize(("tol", "islands", "error"), [(0.5, 3, 0.4), (0.7, 3, 0.4), (0.3, 0, 0.0)])
def test_tol_is_asked_once_no_more_nodes_may_go_back(
    tol: float, islands: int, error: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written is the nearest that was found, not the first below tol."""
    monkeypatch.setattr(precision, "MOST", 3)

    def worst(kept: set[str]) -> float:
        return 0.7 - 0.1 * len(kept)

    if islands:
        made = narrowed(worst, tol)
        assert len(made.islands) == islands and made.error == pytest.approx(error)
        assert f"by {error:.1e}, over the gate of 7.8e-03" in made.said("float16")
    else:
        with pytest.raises(LoraFxError, match=r"the gate is 3\.0e-01"):
            narrowed(worst, tol)


def test_int8(tmp_path: Path) -> None:
    report, error = written(Plain().eval(), tmp_path / "m.onnx", precision="int8")
    assert 1e-4 < error <= EIGHT
    assert any(w.startswith("int8: outputs differ from float32 by") for w in report.warnings)
    ops = {n.op_type for n in onnx.load(tmp_path / "m.onnx").graph.node}
    assert ops & {"MatMulInteger", "DynamicQuantizeLinear", "DynamicQuantizeMatMul"}
    adapter = lora_fx.insert(Plain().eval(), (X,), rank=1).adapter()
    with pytest.raises(LoraFxError):  # a base in int8 takes no adapter
        lora_fx.merge(tmp_path / "m.onnx", adapter, tmp_path / "n.onnx")


def too_far_off() -> tuple[nn.Module, np.ndarray[Any, Any]]:
    """One huge input a row leaves the others a step of the scale or less."""
    model = Plain().eval()
    with torch.no_grad():
        model.b.weight[:, 0] *= 1e-4
        model.a.weight[0] *= 1e3
        model.a.bias[0] = 0
    x = np.random.default_rng(0).standard_normal((4, 24)).astype(np.float32)
    x[:, 0] *= 1e4
    return model, x


class GivenWeight(nn.Module):
    """A convolution whose weight is an input, which the runtime's converter does not take."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(4))

    def forward(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv2d(x, weight, self.bias)


class Recurrent(nn.Module):
    """A recurrent net, whose steps begin with constants."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.RNN(5, 4, batch_first=True)
        self.out = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        states, _ = self.layer(x)
        return self.out(states)


def test_float16_that_ends_the_process_is_one_line(tmp_path: Path) -> None:
    args = (torch.randn(2, 6, 5),)
    with pytest.raises(LoraFxError, match="ends the process when it loads this graph in float16"):
        lora_fx.export(Recurrent().eval(), tmp_path / "m.onnx", args, precision="float16")
    assert not list(tmp_path.iterdir())


def test_int8_that_the_converter_refuses_is_one_line(tmp_path: Path) -> None:
    args = (torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3))
    with pytest.raises(LoraFxError, match="cannot make int8 of this graph: Expected") as refused:
        lora_fx.export(
            GivenWeight().eval(),
            tmp_path / "m.onnx",
            args,
            precision="int8",
            dynamic={"x": {0: "batch"}},
        )
    assert "\n" not in refused.value.message
    assert not list(tmp_path.iterdir())


def test_int8_that_is_too_far_off_is_not_written(tmp_path: Path) -> None:
    model, x = too_far_off()
    with pytest.raises(LoraFxError, match=r"int8 differs by .* on your inputs") as refused:
        lora_fx.export(
            model, tmp_path / "m.onnx", (X,), provider="cpu", precision="int8", inputs={"x": x}
        )
    assert "with inputs" not in str(refused.value)
    assert not list(tmp_path.iterdir())


class Difference(nn.Module):
    """Two layers that almost cancel, so that the rounding of each shows."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 32), nn.Linear(64, 32)
        with torch.no_grad():
            self.b.weight.copy_(self.a.weight * (1 + 0.04 * torch.randn(32, 64)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x) - self.b(x)


def test_a_refused_int8_says_on_what_it_was_measured_and_how_to_go_on(tmp_path: Path) -> None:
    """Both hints are followed, and the tol leads to a file."""
    torch.manual_seed(0)
    model, path = Difference().eval(), tmp_path / "m.onnx"
    wanted: dict[str, Any] = dict(provider="cpu", precision="int8")
    with pytest.raises(LoraFxError) as refused:
        lora_fx.export(model, path, (torch.zeros(3, 64),), **wanted)
    message, hint = refused.value.message, str(refused.value)
    on = r"on random inputs \(floats are N\(0, 1\)\) at x \[\d+, 64\], where \d+ of \d+ numbers"
    assert re.search(on, message), message
    assert "measure on data of your own with inputs; tol=0." in hint
    inputs = {"x": 3 * np.random.default_rng(0).standard_normal((9, 64)).astype(np.float32)}
    with pytest.raises(LoraFxError, match=r"on your inputs at x \[9, 64\]"):
        lora_fx.export(model, path, (torch.zeros(3, 64),), **wanted, inputs=inputs)
    tol = float(re.findall(r"tol=([\d.]+)", hint)[0])
    assert lora_fx.export(model, path, (torch.zeros(3, 64),), **wanted, tol=tol)


@pytest.mark.parametrize("source", ["torch", "onnx"])
def test_tol_accepts_what_is_over_the_gate_and_no_more(source: str, tmp_path: Path) -> None:
    """The fold keeps its gate; what was reached is said, and is what the file's outputs are off."""
    model, x = too_far_off()
    branched = lora_fx.insert(model, (X,), rank=3, seed=4).eval()
    nn.init.normal_(dict(branched.named_parameters())["b.lora_B.weight"], 0, 0.01)
    wanted = branched(torch.from_numpy(x)).detach().numpy()
    path, base = tmp_path / "m.onnx", tmp_path / "base.onnx"
    given: dict[str, Any] = dict(provider="cpu", inputs={"x": x})
    if source == "onnx":
        lora_fx.export(branched, base, **given)
    made_of: Any = branched if source == "torch" else base
    given["precision"] = "int8"
    with pytest.raises(LoraFxError, match=r"int8 differs by .*; the gate is 1\.0e-01") as caught:
        lora_fx.export(made_of, path, **given, tol=0.1)
    assert "accepts this difference" in str(caught.value) and not path.exists()
    report = lora_fx.export(made_of, path, **given, tol=0.3)
    error = rel(next(iter(open_session(path, "cpu").run({"x": x}).values())), wanted)
    assert 0.1 < error < 0.3
    (said,) = [w for w in report.warnings if w.startswith("int8")]
    assert f"by {error:.1e}, over the gate of 6.2e-02, but within tol" in said
    rows = {p.of: (p.tol, p.rel) for p in report.parity}
    if source == "torch":
        assert rows["fold"][0] == 1e-6 and rows["onnxruntime"][0] == 0.3
        assert rows["onnxruntime"][1] == pytest.approx(error, 1e-3)
        assert [p["tol"] for p in report.to_json()["parity"]] == [1e-6, 0.3]


def test_tol_is_of_what_rounds(tmp_path: Path) -> None:
    """Nothing in float32 gets another gate, none gets a narrower one, and half is not loosened."""
    rows: list[tuple[str, str, dict[str, Any]]] = [
        ("no tol, since this export rounds nothing", "leave tol out", {}),
        (
            "no tol, since this export rounds nothing",
            "precision='float16'",
            {"precision": "float32"},
        ),
        ("no tol, since this export rounds nothing", "accuracy_level=4", {"mode": "switch"}),
        ("no tol, since this export rounds nothing", "leave tol out", {"quantise": "int8"}),
        (
            "0.06; expected more than the gate of int8, 0.0625",
            "",
            {"precision": "int8", "tol": 0.06},
        ),
        ("tol is 1; expected", "leave tol out", {"precision": "float16", "tol": 1}),
        ("tol is nan; expected", "leave tol out", {"precision": "float16", "tol": float("nan")}),
        (
            "tol is a str, not a number",
            "pass tol=0.1 to accept",
            {"precision": "float16", "tol": "0.1"},
        ),
        ("of level 4, 0.0625", "", {"quantise": "int8", "accuracy_level": 4, "tol": 0.05}),
    ]
    for words, hint, options in rows:
        with pytest.raises(LoraFxError) as caught:
            lora_fx.export(Plain().eval(), tmp_path / "m.onnx", (X,), **{"tol": 0.1, **options})
        assert words in caught.value.message and hint in str(caught.value), words
        assert caught.value.exit_code == 2
    assert not list(tmp_path.iterdir())


def test_tol_of_level_four(tmp_path: Path) -> None:
    """A block of x that one number fills has no codes left for the others."""
    model, x = nn.Linear(64, 24).eval(), torch.randn(4, 64, generator=torch.Generator())
    with torch.no_grad():
        model.weight[:, 0] *= 1e-5
        x[:, 0] *= 3e2
    given: dict[str, Any] = dict(
        provider="cpu", quantise="int8", accuracy_level=4, inputs={"input": x.numpy()}
    )
    path = tmp_path / "m.onnx"
    with pytest.raises(lora_fx.errors.NoEffectError, match=r"the gate is 6\.2e-02"):
        lora_fx.export(model, path, (x,), **given)
    for mode in ("merged", "switch"):
        report = lora_fx.export(model, path, (x,), **given, tol=0.9, mode=mode, force=True)
        assert {p.tol for p in report.parity} == {0.9}
        assert 0.0625 < max(p.rel for p in report.parity) < 0.9


def test_files(tmp_path: Path) -> None:
    lora_fx.export(Plain().eval(), tmp_path / "base.onnx", (X,), provider="cpu")
    for kind, gate in (("float16", HALF), ("int8", EIGHT)):
        path = tmp_path / f"{kind}.onnx"
        report = lora_fx.export(tmp_path / "base.onnx", path, precision=kind, provider="cpu")
        assert any(w.startswith(kind) for w in report.warnings)
        got, want = (
            next(iter(open_session(p, "cpu").run({"x": X.numpy()}).values()))
            for p in (path, tmp_path / "base.onnx")
        )
        assert 0 < rel(got, want) <= gate


def test_refusals(tmp_path: Path) -> None:
    rows: list[tuple[str, dict[str, Any]]] = [
        ("unknown precision 'fp4'", {"precision": "fp4"}),
        ("precision bfloat16 needs a model in bfloat16", {"precision": "bfloat16"}),
        ("starts from the exported graph", {"precision": "int8", "optimise": True}),
        ("would ignore", {"precision": "float16", "mode": "switch"}),
    ]
    for words, options in rows:
        with pytest.raises(LoraFxError, match=words):
            lora_fx.export(Plain().eval(), tmp_path / "m.onnx", (X,), provider="cpu", **options)
    assert not list(tmp_path.iterdir())


def test_one_cast_a_value_and_a_cast_to_float_is_one_to_half(tmp_path: Path) -> None:
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["": 20]> m (float[3] x, int64[3] i) => (float[3] y) '
        "{ a = Neg(x) f = Cast<to = 1>(i) b = Mul(a, f) c = Exp(b) d = Sin(b) y = Add(c, d) }"
    )
    for node in model.graph:
        node.name = node.op_type
    ShapeInferencePass()(model)
    reference = model.clone()
    assert ToHalf({"Exp", "Sin"})(model).modified
    casts = [(str(n.inputs[0] and n.inputs[0].name), n.attributes["to"].as_int())
             for n in model.graph if n.op_type == "Cast"]  # fmt: skip
    assert sorted(casts) == [
        ("b", 1), ("c", 10), ("d", 10), ("i", 10), ("x", 10), ("y_half", 1),
    ]  # fmt: skip
    feeds = {"x": np.array([0.5, -1.25, 2], np.float32), "i": np.array([1, 2, -1])}
    outputs = []
    for name, one in (("a", model), ("b", reference)):
        ir.save(one, tmp_path / f"{name}.onnx")
        outputs.append(open_session(tmp_path / f"{name}.onnx", "cpu").run(feeds)["y"])
    assert outputs[0].dtype == np.float32 and rel(*outputs) <= HALF
    assert not ToHalf()(ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["": 20]> m (int64[3] i) => (int64[3] y) { y = Neg(i) }'
    )).modified  # fmt: skip


def test_why_a_candidate_fails_is_kept(tmp_path: Path) -> None:
    text = '<ir_version: 10, opset_import: ["": 20]> m (float[3] x) => (float[3] y) {{ y = {} }}'
    good, bad = (ir.from_onnx_text(text.format(body)) for body in ("Neg(x)", "NoSuchOp(x)"))
    error = WorstError(good, [{"x": np.ones(3, np.float32)}], "cpu")
    assert error(bad) == float("inf") and "invalid model" in error.failure
    assert error(good) == 0.0 and not error.failure
