"""Mode switch: adapters of several ranks in one session, against their merged models."""

from __future__ import annotations

import copy
import functools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
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
from lora_fx.fx.capture.capture import Captured
from lora_fx.onnx import Session
from lora_fx.onnx.manifest import manifest_of
from lora_fx.onnx.runtime_adapter import write_adapter, write_file
from lora_fx.onnx.session import open_session
from lora_fx.targets.target import Target
from tests.providers import PROVIDERS

RANKS = {"de": 4, "fr": 8, "it": 16}
TOL = 1e-5


class Net(nn.Module):
    """An embedding, a convolution, a linear, a bare product and a linear without bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(100, 24)
        self.conv = nn.Conv1d(24, 20, 3, padding=1)
        self.fc = nn.Linear(20, 32)
        self.w = nn.Parameter(torch.randn(32, 18) * 0.2)
        self.head = nn.Linear(18, 17, bias=False)

    def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        h = self.conv(self.embed(ids).transpose(1, 2)).transpose(1, 2)
        return {"y": self.head(torch.tanh(torch.relu(self.fc(h)) @ self.w))}


def ids(seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 100, (3, 6))


@functools.cache
def captured() -> Captured:
    return lora_fx.capture(Net().eval(), (torch.tensor(ids()),))


@functools.cache
def targets() -> tuple[Target, ...]:
    found = lora_fx.find(captured())
    return (*found.targets, *found.optional)


def adapter(seed: int, rank: int) -> Adapter:
    """A random one for every weight; alpha is 3 times the rank over 4, so scale is .75."""
    entries = {}
    for target in targets():
        a, b = draw(target.key, target.layout, rank, seed, "probe")
        entries[target.key] = lora_fx.LowRank(a, b, 0.75 * rank, target.layout)
    return Adapter(entries)


ADAPTERS = {name: adapter(i, r) for i, (name, r) in enumerate(RANKS.items())}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("switch")
    path = folder / "m.onnx"
    lora_fx.export(captured(), path, mode="switch", adapters=ADAPTERS, provider="cpu")
    base = folder / "base-merged.onnx"
    lora_fx.export(captured(), base, provider="cpu")
    for name, one in ADAPTERS.items():
        lora_fx.export(base, folder / f"{name}-merged.onnx", adapters=one, provider="cpu")
    return path


def merged(made: Path, name: str, provider: str = "cpu") -> Any:
    session = open_session(made.with_name(f"{name}-merged.onnx"), provider)
    return session.run({"ids": ids()})["y"]


@pytest.mark.parametrize("provider", PROVIDERS)
def test_three_ranks_in_one_session_equal_their_merged_models(made: Path, provider: str) -> None:
    session = Session(made, provider)
    for name in RANKS:
        session.load(name, made.with_name(f"{name}.onnx_adapter"))
    base = session.run({"ids": ids()})["y"]
    for name in (*RANKS, *reversed(RANKS)):
        got = session.run({"ids": ids()}, adapter=name)["y"]
        assert rel(got, merged(made, name, provider)) <= TOL
        assert rel(got, base) > 0.05
        binding = session.bind({"ids": ids()}, adapter=name)
        session.session.run_with_iobinding(binding)
        np.testing.assert_array_equal(binding.copy_outputs_to_cpu()[0], got)
    np.testing.assert_array_equal(session.run({"ids": ids()})["y"], base)
    binding = session.bind({"ids": ids()})
    session.session.run_with_iobinding(binding)
    np.testing.assert_array_equal(binding.copy_outputs_to_cpu()[0], base)


def test_base_of_the_default_is_the_exported_base(made: Path) -> None:
    got = Session(made, "cpu").run({"ids": ids()})["y"]
    assert rel(got, merged(made, "base")) <= 1e-6


def test_plain_onnx_runtime_ignores_an_adapter_with_io_binding(made: Path) -> None:
    """docs/serving.md says so, and that the binding of our session has the adapter."""
    import onnxruntime as ort

    plain = ort.InferenceSession(str(made), providers=["CPUExecutionProvider"])
    loaded = ort.LoraAdapter()
    loaded.Load(str(made.with_name(f"{next(iter(RANKS))}.onnx_adapter")))
    options = ort.RunOptions()
    options.add_active_adapter(loaded)
    options.log_severity_level = 4
    binding = plain.io_binding()
    binding.bind_cpu_input("ids", ids())
    binding.bind_output("y")
    plain.run_with_iobinding(binding, options)
    base = plain.run(["y"], {"ids": ids()})[0]
    np.testing.assert_array_equal(binding.copy_outputs_to_cpu()[0], base)
    assert rel(plain.run(["y"], {"ids": ids()}, options)[0], base) > 0.05


def test_plain_onnx_runtime_takes_the_first_of_two_adapters(made: Path) -> None:
    """docs/serving.md says so, and that our session has mixes."""
    import onnxruntime as ort

    plain = ort.InferenceSession(str(made), providers=["CPUExecutionProvider"])
    names = list(RANKS)[:2]
    files = [ort.LoraAdapter() for _ in names]
    options = ort.RunOptions()
    for name, loaded in zip(names, files, strict=True):
        loaded.Load(str(made.with_name(f"{name}.onnx_adapter")))
        options.add_active_adapter(loaded)
    found = plain.run(["y"], {"ids": ids()}, options)[0]
    assert rel(found, merged(made, names[0])) <= TOL
    assert rel(found, merged(made, names[1])) > 0.05


def test_plain_onnx_runtime_takes_the_files(made: Path) -> None:
    import onnxruntime as ort

    session = open_session(made, "cpu").session
    for name in RANKS:
        loaded = ort.LoraAdapter()
        loaded.Load(str(made.with_name(f"{name}.onnx_adapter")))
        options = ort.RunOptions()
        options.add_active_adapter(loaded)
        got = session.run(["y"], {"ids": ids()}, options)[0]
        assert rel(got, merged(made, name)) <= TOL


def test_files_of_an_export_are_adapters_too(made: Path, tmp_path: Path) -> None:
    """Turned back as they are read, of a stack's batch too; and told apart when written again."""
    net = Net().eval()
    for name, one in ADAPTERS.items():
        path = made.with_name(f"{name}.onnx_adapter")
        read = lora_fx.load_adapter(path).bind(net, (torch.tensor(ids()),))
        assert read.metadata["adapter_version"] == 1
        wanted = one.deltas()
        assert {*read.deltas()} == {*wanted}
        for key, delta in read.deltas().items():
            assert rel(delta, wanted[key]) < 1e-6
        lora_fx.save_adapter(read, tmp_path / f"{name}.onnx_adapter", "onnx_adapter")
        again = lora_fx.load_adapter(tmp_path / f"{name}.onnx_adapter")
        for key, low in read.lowrank.items():
            np.testing.assert_array_equal(again.lowrank[key].a, low.a)


def test_a_mix_is_the_weighted_sum(made: Path) -> None:
    session = Session(made, "cpu")
    for name, one in ADAPTERS.items():
        session.load(name, one)
    weights = {"de": 0.7, "it": -0.4}
    got = session.run({"ids": ids()}, adapter=weights)["y"]
    net = Net().eval().double()
    parameters = dict(net.named_parameters())
    with torch.no_grad():
        for name, w in weights.items():
            for key, delta in ADAPTERS[name].deltas().items():
                parameters[key].add_(w * torch.tensor(delta))
        expected = net(torch.tensor(ids()))["y"].numpy()
    assert rel(got, expected) <= TOL


def test_no_transpose_and_no_scale_of_the_factors_at_run_time(made: Path) -> None:
    model = onnx.load(made)
    onnx.checker.check_model(model, full_check=True)
    manifest = manifest_of(made)
    slots = {n: k for k, s in manifest.slots.items() for n in (s.a, s.b)}
    readers = {
        k: {
            n.op_type
            for n in model.graph.node
            if slots.keys() & {*n.input} and k in {slots.get(i) for i in n.input}
        }
        for k in manifest.slots
    }
    linear = readers["fc.weight"]
    assert linear == readers["w"] == readers["head.weight"] == {"MatMul", "Gemm"}
    assert readers["embed.weight"] == {"Gather", "MatMul"}
    ranks = {k: s.rank for k, s in manifest.slots.items()}
    assert ranks == {k: int(k == "conv.weight") for k in ranks}
    adds = [n for n in model.graph.node if n.op_type == "Add" and "fc.bias" in n.input]
    makers = {o: n for n in model.graph.node for o in n.output}
    (inner,) = [makers[i] for i in adds[0].input if i in makers]
    assert inner.op_type == "Reshape"  # the delta comes before the bias, inside of a product
    gemm = makers[inner.input[0]]
    assert gemm.op_type == "Gemm" and makers[makers[gemm.input[2]].input[0]].op_type == "MatMul"
    assert not any(n.op_type == "Add" and n.output[0] == "y" for n in model.graph.node)
    symbols = {
        i.type.tensor_type.shape.dim[-1].dim_param
        for i in model.graph.input
        if i.name.endswith("lora_A")
    }
    assert len(symbols) == len(manifest.slots)


def test_results_are_kept_and_threads_do_not_mix(made: Path) -> None:
    """Runs share bindings: none may write over another's inputs or outputs."""
    session = Session(made, "cpu")
    for i, (name, rank) in enumerate(RANKS.items()):
        session.load(name, adapter(i, rank))
    jobs = [(name, ids(seed)) for seed in range(8) for name in RANKS]
    alone = [session.run({"ids": x}, adapter=name)["y"] for name, x in jobs]
    copies = [y.copy() for y in alone]
    with ThreadPoolExecutor(4) as pool:
        again = list(
            pool.map(lambda job: session.run({"ids": job[1]}, adapter=job[0])["y"], jobs * 4)
        )
    for i, y in enumerate(again):
        assert np.array_equal(y, copies[i % len(jobs)])
    assert all(np.array_equal(y, z) for y, z in zip(alone, copies, strict=True))
    first, name = jobs[0][1], jobs[0][0]
    one_row = session.run({"ids": first[:1]}, adapter=name)["y"]
    assert rel(one_row, copies[0][:1]) < 1e-6
    session.load(name, adapter(9, 5))
    assert rel(session.run({"ids": first}, adapter=name)["y"], copies[0]) > 0.01
    assert np.array_equal(alone[0], copies[0])


def test_insert_before_and_after_the_export_agree(made: Path) -> None:
    session = Session(made, "cpu")
    session.load("fr", ADAPTERS["fr"])
    module = lora_fx.insert(captured(), adapter=ADAPTERS["fr"])
    module.eval()
    with torch.no_grad():
        expected = module(torch.tensor(ids()))["y"].numpy()
    assert rel(session.run({"ids": ids()}, "fr")["y"], expected) <= 1e-6


def test_a_wrong_scale_is_seen(made: Path) -> None:
    session = Session(made, "cpu")
    wrong = {k: replace(u, alpha=u.alpha * 1.01) for k, u in ADAPTERS["de"].lowrank.items()}
    session.load("de", Adapter(wrong))
    assert rel(session.run({"ids": ids()}, "de")["y"], merged(made, "de")) > TOL


def test_what_does_not_fit_is_refused_by_name(made: Path, tmp_path: Path) -> None:
    session = Session(made, "cpu")
    manifest = manifest_of(made)
    with pytest.raises(LoraFxError, match="no adapter 'de' is loaded"):
        session.run({"ids": ids()}, adapter="de")
    with pytest.raises(LoraFxError, match="input 'ids' is missing"):
        session.run({})
    with pytest.raises(LoraFxError, match="no input 'idz'"):
        session.run({"idz": ids()})
    good = manifest.tensors(ADAPTERS["de"])
    slot = manifest.slots["fc.weight"]
    changes: dict[str, Any] = {
        "'fc.weight.lora_B' is missing": {slot.b: None},
        r"is \[20, 4\]; expected \[20, 8\]|is \[4, 20\]": {slot.a: good[slot.a].T.copy()},
        r"expected \[4, 32\]": {slot.b: good[slot.b][:3].copy()},
        "is float16; expected float32": {slot.a: good[slot.a].astype(np.float16)},
        "'other.lora_A' is not an input": {"other.lora_A": good[slot.a]},
    }
    for i, (words, change) in enumerate(changes.items()):
        tensors = {k: v for k, v in {**good, **change}.items() if v is not None}
        path = tmp_path / f"{i}.onnx_adapter"
        write_file(path, tensors, {"adapter_version": 1, "model_version": 1})
        with pytest.raises(LoraFxError, match=words):
            session.load("bad", path)
        with pytest.raises(LoraFxError, match=words):
            lora_fx.verify(made, path)
    whole = copy.deepcopy(ADAPTERS["de"].entries)
    with pytest.raises(LoraFxError, match=r"'fc\.bias' is a whole tensor, and the file has"):
        session.load("bad", Adapter({**whole, "fc.bias": lora_fx.Full(np.zeros(32))}))
    with pytest.raises(LoraFxError, match="not a target of the file"):
        write_adapter(Adapter({"no.weight": whole["fc.weight"]}), manifest, tmp_path / "x")
    with pytest.raises(LoraFxError, match="not switchable"):
        Session(made.with_name("base-merged.onnx"), "cpu")
    assert lora_fx.verify(made, made.with_name("de.onnx_adapter"))


def test_export_refuses_and_leaves_nothing(tmp_path: Path) -> None:
    args = (torch.tensor(ids()),)
    with pytest.raises(LoraFxError, match="unknown mode"):
        lora_fx.export(Net().eval(), tmp_path / "m.onnx", args, mode="other")
    other_size = Adapter({**ADAPTERS["de"].entries, "fc.bias": lora_fx.Full(np.zeros(31))})
    for mode in ("switch", "load", "batch"):
        with pytest.raises(LoraFxError, match=r"'fc\.bias' is \[31\]; the model's is \[32\]"):
            lora_fx.export(
                Net().eval(), tmp_path / "m.onnx", args, adapters={"x": other_size}, mode=mode
            )
    (tmp_path / "de.onnx_adapter").write_text("mine")
    with pytest.raises(LoraFxError, match="exists"):
        lora_fx.export(Net().eval(), tmp_path / "m.onnx", args, mode="switch", adapters=ADAPTERS)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("de.onnx_adapter", "mine")]


def test_adapters_of_another_file_are_kept_or_their_end_is_said(tmp_path: Path) -> None:
    """One written beside the first file has the name that the second would take."""
    args, one = (torch.tensor(ids()),), {"de": ADAPTERS["de"]}
    first, file = tmp_path / "first.onnx", tmp_path / "de.onnx_adapter"
    kind: dict[str, Any] = {"mode": "switch", "provider": "cpu"}
    lora_fx.export(Net().eval(), first, args, adapters=one, **kind)
    before = file.read_bytes()
    other = {"de": ADAPTERS["de"].weighted(0.5)}
    with pytest.raises(LoraFxError, match=r"de\.onnx_adapter already exists"):
        lora_fx.export(Net().eval(), tmp_path / "second.onnx", args, adapters=other, **kind)
    assert file.read_bytes() == before and not (tmp_path / "second.onnx").exists()
    again = lora_fx.export(Net().eval(), first, args, adapters=one, force=True, **kind)
    assert not [w for w in again.warnings if "replaced" in w], "they are its own"
    second = tmp_path / "second.onnx"
    report = lora_fx.export(Net().eval(), second, args, adapters=other, force=True, **kind)
    assert "de.onnx_adapter, which belongs to another file, is replaced" in report.warnings
    assert file.read_bytes() != before


class Tied(nn.Module):
    """A table that is looked up, and multiplied by at the end."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(rows, 24)
        self.mid = nn.Linear(24, 24)
        self.head = nn.Linear(24, rows, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": self.head(torch.tanh(self.mid(self.embed(ids))))}


@pytest.mark.parametrize("given", [False, True])
def test_a_tied_table(given: bool, tmp_path: Path) -> None:
    """So large that the exporter does not store a transposed copy."""
    model, args = Tied(2000).eval(), (torch.tensor(ids()),)
    target = lora_fx.find(model, args)["embed.weight"]
    a, b = draw("embed.weight", target.layout, 3, 0, "probe")
    one = Adapter({"embed.weight": lora_fx.LowRank(a, b * 0.2, 3.0, target.layout)})
    lora_fx.export(
        model, tmp_path / "s.onnx", args, mode="switch", provider="cpu",
        adapters={"one": one} if given else None, include=None if given else "*",
    )  # fmt: skip
    session = Session(tmp_path / "s.onnx", "cpu")
    session.load("one", one)
    wide = copy.deepcopy(model).double()
    with torch.no_grad():
        wide.embed.weight.add_(torch.tensor(one.deltas()["embed.weight"]))
        expected = wide(*args)["y"].numpy()
    assert rel(session.run({"ids": ids()}, "one")["y"], expected) <= 1e-6


def test_a_tied_table_that_is_stored_twice(tmp_path: Path) -> None:
    """A plain export has a small head transposed, as another tensor."""
    model, args = Tied(100).eval(), (torch.tensor(ids()),)
    options: dict[str, Any] = {"mode": "switch", "provider": "cpu"}
    lora_fx.export(model, tmp_path / "all.onnx", args, include="*", **options)
    assert {*manifest_of(tmp_path / "all.onnx").slots} == {"embed.weight", "mid.weight"}
    lora_fx.export(model, tmp_path / "s.onnx", args, **options)
    assert {*manifest_of(tmp_path / "s.onnx").slots} == {"embed.weight@head.weight", "mid.weight"}


class Picked(nn.Module):
    """Matrices of a stack that data picks, one for each row: x W, or W x."""

    def __init__(self, left: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left, self.w = left, nn.Parameter(torch.randn(4, 6, 9))

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        w = self.w[ids]
        return w @ x[..., None] if self.left else x[:, None] @ w


@pytest.mark.parametrize("left", [False, True])
def test_picked_matrices_at_rank_0_and_at_others(left: bool, tmp_path: Path) -> None:
    """No transpose that ONNX Runtime would fuse into a product of rank 0 and leave unwritten."""
    model, x = Picked(left).eval(), torch.randn(5, 9 if left else 6)
    picks = torch.tensor([3, 0, 0, 2, 3])
    made = lora_fx.insert(model, (x, picks), rank=3, dead="allow").adapter()
    rng = np.random.default_rng(0)
    given = {
        k: replace(u, b=rng.normal(size=u.b.shape).astype(np.float32))
        for k, u in made.lowrank.items()
    }
    one = Adapter(given)
    path = tmp_path / "m.onnx"
    lora_fx.export(model, path, (x, picks), mode="switch", adapters={"one": one}, provider="cpu")
    session = Session(path, provider="cpu")
    session.load("one", path.with_name("one.onnx_adapter"))
    feeds = {"x": x.numpy(), "ids": picks.numpy()}
    for name, delta in ((None, 0), ("one", one.deltas(dtype="float64")["w"])):
        (got,) = session.run(feeds, adapter=name).values()
        w = (model.w.detach().double().numpy() + delta)[picks.numpy()]
        xs = x.double().numpy()
        want = w @ xs[..., None] if left else xs[:, None] @ w
        assert rel(got, want) < 2e-6
