"""export and insert of .onnx files, against the merged weights and what torch exports."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

import lora_fx
from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import LowRank
from lora_fx.compare import rel
from lora_fx.errors import LoraFxError, NoEffectError
from lora_fx.onnx import Session
from lora_fx.onnx.graph.graph import OnnxGraph
from lora_fx.onnx.inserted_branches import adapter_in
from lora_fx.onnx.load import load
from lora_fx.onnx.manifest import manifest_of
from lora_fx.onnx.match import match
from lora_fx.onnx.session import open_session
from lora_fx.passes.find import find
from lora_fx.passes.insert import Insert
from lora_fx.passes.verbs.insert_onnx import insert_onnx
from tests.onnx.test_switch import ADAPTERS, RANKS, Net, captured, ids
from tests.providers import PROVIDERS

X = {"ids": ids()}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "base.onnx"
    lora_fx.export(captured(), path, provider="cpu")
    return path


def wanted(adapter: Adapter | None, x: Any = None) -> Any:
    """W + s·BA in the torch module, fp64."""
    net = Net().eval().double()
    parameters = dict(net.named_parameters())
    with torch.no_grad():
        for key, delta in ({} if adapter is None else adapter.deltas()).items():
            p, change = parameters[key], torch.tensor(delta)
            p.add_(change if change.shape == p.shape else change.T)  # ONNX stores [in, out]
        return net(torch.tensor(ids() if x is None else x))["y"].numpy()


def ops(path: Path, folder: Path) -> list[str]:
    """The ops that are left after the runtime's own rewrites."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "seen.onnx")
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return [n.op_type for n in onnx.load(folder / "seen.onnx").graph.node]


@pytest.mark.parametrize("provider", PROVIDERS)
def test_switch(provider: str, base: Path, tmp_path: Path) -> None:
    report = lora_fx.export(
        base, tmp_path / "s.onnx", adapters=ADAPTERS, mode="switch", provider=provider
    )
    assert report and len(report.parity) == 3 * (1 + len(ADAPTERS))
    session = Session(tmp_path / "s.onnx", provider)
    for name, rank in RANKS.items():
        session.load(name, tmp_path / f"{name}.onnx_adapter")
        got = session.run(X, adapter=name)["y"]
        assert rel(got, wanted(ADAPTERS[name])) < 1e-6, rank
    assert rel(session.run(X)["y"], wanted(None)) < 1e-6


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("source", ["torch", "onnx"])
def test_load_is_folded_by_the_runtime(
    source: str, provider: str, base: Path, tmp_path: Path
) -> None:
    model: Any = base if source == "onnx" else Net().eval()
    args = () if source == "onnx" else (torch.tensor(ids()),)
    path = tmp_path / "l.onnx"
    report = lora_fx.export(model, path, args, adapters=ADAPTERS, mode="load", provider=provider)
    assert report and len(report.parity) == (3 + (source != "onnx")) * (1 + len(ADAPTERS))
    assert ops(path, tmp_path) == ops(base, tmp_path)
    assert {s.rank for s in manifest_of(path).slots.values()} == {16}
    for name in RANKS:
        session = Session(path, provider, adapter=tmp_path / f"{name}.onnx_adapter")
        assert rel(session.run(X)["y"], wanted(ADAPTERS[name])) < 1e-6
    assert rel(Session(path, provider).run(X)["y"], wanted(None)) < 1e-6
    assert rel(open_session(path, provider).run(X)["y"], wanted(None)) < 1e-6
    with pytest.raises(LoraFxError, match="when the session is made"):
        session.load("de", ADAPTERS["de"])
    with pytest.raises(LoraFxError, match="no adapter 'de' is loaded"):
        session.run(X, adapter="de")


def test_load_refuses_a_rank_without_room(base: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"mode": "load", "provider": "cpu"}
    with pytest.raises(LoraFxError, match="an adapter has rank 16, more than rank=8"):
        lora_fx.export(base, tmp_path / "l.onnx", adapters=ADAPTERS, rank=8, **options)
    assert not list(tmp_path.iterdir())
    lora_fx.export(base, tmp_path / "l.onnx", rank=4, include="*", **options)
    with pytest.raises(LoraFxError, match="has rank 8; expected at most 4"):
        Session(tmp_path / "l.onnx", "cpu", adapter=ADAPTERS["fr"])
    tiny = {
        k: lora_fx.LowRank(u.a[:1], u.b[:, :1], 1.0, u.layout)
        for k, u in ADAPTERS["de"].lowrank.items()
    }
    lora_fx.export(base, tmp_path / "one.onnx", rank=1, include="*", **options)  # bytes, not more
    got = Session(tmp_path / "one.onnx", "cpu", adapter=Adapter(tiny)).run(X)["y"]
    assert rel(got, wanted(Adapter(tiny))) < 1e-6
    with pytest.raises(LoraFxError, match="of mode switch takes an adapter at each run"):
        lora_fx.export(base, tmp_path / "s.onnx", mode="switch", provider="cpu")
        Session(tmp_path / "s.onnx", "cpu", adapter=ADAPTERS["fr"])


@pytest.mark.parametrize("provider", PROVIDERS)
def test_batch(provider: str, base: Path, tmp_path: Path) -> None:
    path = tmp_path / "b.onnx"
    report = lora_fx.export(
        base, path, adapters=ADAPTERS, mode="batch", scales=True, provider=provider
    )
    assert report and report.details["adapters"] == [*ADAPTERS]
    x = ids(3)[[0, 1, 2, 0, 1]]
    feeds = {
        "ids": x,
        "adapter_ids": np.array([3, 0, 1, 2, 3]),
        "adapter_scales": np.array([1, 1, 0.5, 1, 2], np.float32),
    }
    got = open_session(path, provider).run(feeds)["y"]
    given = [None, *ADAPTERS.values()]
    for row, (i, w) in enumerate(zip(feeds["adapter_ids"], feeds["adapter_scales"], strict=True)):
        one = given[i] and given[i].weighted(float(w))
        assert rel(got[row], wanted(one, x)[row]) < 1e-6


class Twice(torch.nn.Module):
    """One matrix read twice, under one name."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w = torch.nn.Parameter(torch.randn(6, 6) / 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ self.w) @ self.w


@pytest.mark.parametrize("provider", PROVIDERS)
def test_rows_of_single_uses(provider: str, tmp_path: Path) -> None:
    net, path = Twice().eval(), tmp_path / "b.onnx"
    batch = ({0: torch.export.Dim("batch")},)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporter's own
        torch.onnx.export(
            net, (torch.randn(2, 6),), tmp_path / "x.onnx", dynamic_shapes=batch, verbose=False
        )
    rng = np.random.default_rng(0)
    keys = ("w", "w@call:0", "w@call:1")
    pairs = [(rng.standard_normal((2, 6)), rng.standard_normal((6, 2))) for _ in keys]
    adapters = {
        k[-1]: Adapter({k: LowRank(a.astype("f4"), b.astype("f4"), 0.5)})
        for k, (a, b) in zip(keys, pairs, strict=True)
    }
    lora_fx.export(tmp_path / "x.onnx", path, adapters=adapters, mode="batch", provider=provider)
    x = rng.standard_normal((4, 6)).astype("f4")
    got = open_session(path, provider).run({"x": x, "adapter_ids": np.arange(4)})
    w, (every, first, last) = net.w.detach().double().numpy(), [(b @ a).T / 4 for a, b in pairs]
    for row, (one, two) in enumerate([(0, 0), (every, every), (first, 0), (0, last)]):
        want = np.tanh(x[row] @ (w + one)) @ (w + two)
        assert rel(next(iter(got.values()))[row], want) < 1e-6


@pytest.mark.parametrize("mode", ["switch", "load", "batch"])
def test_a_file_for_adapters_is_no_base_of_another(mode: str, base: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    lora_fx.export(base, path, adapters=ADAPTERS, mode=mode, provider="cpu")
    for again in ("switch", "load", "batch"):
        (tmp_path / again).mkdir()
        with pytest.raises(LoraFxError, match="has slots for adapters already") as caught:
            lora_fx.export(path, tmp_path / again / "a.onnx", adapters=ADAPTERS, mode=again)
        assert caught.value.hint and not any((tmp_path / again).iterdir())


@pytest.mark.parametrize("provider", PROVIDERS)
def test_merged_and_optimised(provider: str, base: Path, tmp_path: Path) -> None:
    for optimise in (False, True):
        path = tmp_path / f"{optimise}.onnx"
        report = lora_fx.export(
            base, path, adapters=ADAPTERS["fr"], optimise=optimise, provider=provider
        )
        assert report and report.command == "export"
        assert ("stages" in report.details) is optimise
        assert rel(open_session(path, provider).run(X)["y"], wanted(ADAPTERS["fr"])) < 1e-6


@pytest.mark.parametrize("provider", PROVIDERS)
def test_insert_is_the_base_and_is_read_back(base: Path, tmp_path: Path, provider: str) -> None:
    path = tmp_path / "i.onnx"
    report = insert_onnx(base, path, rank=3, alpha=4.5, include="*", seed=2, provider=provider)
    found = {t["key"] for t in report.details["targets"]}
    assert found == {"embed.weight", "conv.weight", "fc.weight", "w", "head.weight"}
    assert report.details["trained"] == sum(
        u.a.size + u.b.size for u in adapter_in(path).lowrank.values()
    )
    assert rel(open_session(path, provider).run(X)["y"], wanted(None)) < 1e-6
    model, rng = onnx.load(path), np.random.default_rng(0)
    for tensor in model.graph.initializer:
        if ".lora_B" in tensor.name or tensor.name.startswith("lora_B"):
            assert not onnx.numpy_helper.to_array(tensor).any()
            value = 0.1 * rng.standard_normal(tensor.dims).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))
    onnx.save(model, tmp_path / "trained.onnx")
    adapter = adapter_in(tmp_path / "trained.onnx")
    assert {k: (u.rank, u.scale) for k, u in adapter.lowrank.items()} == dict.fromkeys(
        found, (3, 1.5)
    )
    got = open_session(tmp_path / "trained.onnx", provider).run(X)["y"]
    assert rel(got, wanted(None)) > 0.05
    assert rel(got, wanted(adapter)) < 1e-6
    with pytest.raises(LoraFxError, match="slots for adapters already"):
        insert_onnx(path, tmp_path / "again.onnx")
    with pytest.raises(LoraFxError, match="without trainable branches"):
        adapter_in(base)


def test_both_ways_from_torch_give_the_same_numbers(base: Path, tmp_path: Path) -> None:
    """torch → insert → export, and torch → export → insert into the file."""
    args = (torch.tensor(ids()),)
    module = lora_fx.insert(Net().eval(), args, adapter=ADAPTERS["fr"])
    lora_fx.export(module, tmp_path / "s.onnx", mode="switch", provider="cpu")
    session = Session(tmp_path / "s.onnx", "cpu")
    session.load("fr", ADAPTERS["fr"])
    model = load(base)
    graph = OnnxGraph(model)
    Insert(match(ADAPTERS["fr"], graph, find(graph)).updates)(graph)
    ir.save(model, tmp_path / "inserted.onnx")
    for seed in range(3):
        x = {"ids": ids(seed)}
        got = open_session(tmp_path / "inserted.onnx", "cpu").run(x)["y"]
        assert rel(session.run(x, "fr")["y"], got) <= 1e-6
        assert rel(session.run(x)["y"], got) > 0.05


def test_a_target_without_effect(tmp_path: Path) -> None:
    """Its product is multiplied by zero."""
    rng = np.random.default_rng(0)
    weights = {n: rng.standard_normal((4, 5)).astype(np.float32) for n in ("live", "dead")}
    weights["zero"] = np.zeros(1, np.float32)
    nodes = [
        onnx.helper.make_node("MatMul", ["x", "live"], ["a"]),
        onnx.helper.make_node("MatMul", ["x", "dead"], ["b"]),
        onnx.helper.make_node("Mul", ["b", "zero"], ["c"]),
        onnx.helper.make_node("Add", ["a", "c"], ["y"]),
    ]
    x, y = (onnx.helper.make_tensor_value_info(n, 1, ["batch", k]) for n, k in (("x", 4), ("y", 5)))
    stored = [onnx.numpy_helper.from_array(v, n) for n, v in weights.items()]
    graph = onnx.helper.make_graph(nodes, "g", [x], [y], stored)
    opset = [onnx.helper.make_opsetid("", 18)]
    path = tmp_path / "m.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=9), path)
    with pytest.raises(NoEffectError, match="'dead' changes no output"):
        insert_onnx(path, tmp_path / "i.onnx", rank=2, include="*", provider="cpu")
    report = insert_onnx(path, tmp_path / "i.onnx", rank=2, provider="cpu")
    assert [t["key"] for t in report.details["targets"]] == ["live"]
    assert "dead: left out, it changes no output" in report.warnings
    kept = insert_onnx(path, tmp_path / "k.onnx", rank=2, dead="keep", provider="cpu")
    assert "dead: it changes no output" in kept.warnings
    assert {t["key"] for t in kept.details["targets"]} == {"live", "dead"}


@pytest.mark.parametrize("mode", ["switch", "load"])
def test_a_wrong_factor_is_not_written(
    mode: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_fx.onnx.manifest import Manifest

    right = Manifest.tensors

    def wrong(self: Manifest, *args: Any) -> Any:
        return {k: v * np.float32(1.01) for k, v in right(self, *args).items()}

    monkeypatch.setattr(Manifest, "tensors", wrong)
    with pytest.raises(NoEffectError, match="ONNX Runtime differs from the model"):
        lora_fx.export(base, tmp_path / "s.onnx", adapters=ADAPTERS, mode=mode, provider="cpu")
    assert not list(tmp_path.iterdir())


def test_refusals(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.onnx"
    rows: list[tuple[str, dict[str, Any]]] = [
        ("nothing to do", {}),
        ("the output would replace the input", {"adapters": ADAPTERS, "mode": "switch"}),
        (
            "is not a target of the model|adapter tensor",
            {"adapters": {"x": odd()}, "mode": "switch"},
        ),
        ("holds the whole tensor 'fc.bias'", {"adapters": {"x": whole()}, "mode": "batch"}),
        ("opset and repeat have no effect", {"adapters": ADAPTERS["de"], "opset": 18}),
        ("no input is named 'z'", {"mode": "switch", "inputs": {"z": ids()}}),
        ("would ignore", {"mode": "switch", "optimise": True}),
        ("does not run at", {"mode": "switch", "inputs": {"ids": np.array([[999]])}}),
    ]
    for words, options in rows:
        target = base if "replace" in words else out
        with pytest.raises(LoraFxError, match=words):
            lora_fx.export(base, target, force="replace" in words, provider="cpu", **options)
    assert not list(tmp_path.iterdir()) and len(list(base.parent.iterdir())) == 1


def odd() -> Adapter:
    a, b = np.ones((2, 7), np.float32), np.ones((9, 2), np.float32)
    return Adapter({"no.weight": lora_fx.LowRank(a, b, 2.0)})


def whole() -> Adapter:
    return Adapter({**ADAPTERS["de"].entries, "fc.bias": lora_fx.Full(np.zeros(32, np.float32))})


def test_an_unbounded_input_of_ids_stays_below_the_table(base: Path, tmp_path: Path) -> None:
    seen: list[int] = []
    run = Session.run

    def spy(self: Any, inputs: Any, adapter: Any = None) -> Any:
        seen.append(int(inputs["ids"].max()))
        return run(self, inputs, adapter)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "run", spy)
        lora_fx.export(base, tmp_path / "s.onnx", mode="switch", provider="cpu")
    assert 50 < max(seen) < 100  # the table has 100 rows


def test_no_torch(base: Path, tmp_path: Path) -> None:
    lora_fx.save_adapter(ADAPTERS["de"], tmp_path / "de")
    code = (
        "import sys\nsys.modules['torch'] = None\nimport lora_fx\n"
        "a = lora_fx.load_adapter(sys.argv[2])\n"
        "for mode in ('switch', 'load', 'batch', 'merged'):\n"
        "    one = a if mode == 'merged' else {f'de_{mode}': a}\n"
        "    lora_fx.export(sys.argv[1], f'{sys.argv[3]}/{mode}.onnx', adapters=one, mode=mode,\n"
        "                   provider='cpu')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(base), str(tmp_path / "de"), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
