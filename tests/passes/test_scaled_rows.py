"""DoRA evaluated on its base: branch = fold = m/‖V‖·V by hand, over every row of the table."""

from __future__ import annotations

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
from lora_fx.adapter.evaluated import Evaluation, base_number, evaluated, weight_hash
from lora_fx.adapter.lowrank import LowRank
from lora_fx.adapter.scaled_rows import GAINS, scaled_gains
from lora_fx.adapter.starts import matrix
from lora_fx.adapter.variant import variant_of
from lora_fx.compare import rel
from lora_fx.errors import LoraFxError, MisfitError
from lora_fx.onnx import Session
from lora_fx.passes.find import find
from lora_fx.passes.fold import Fold
from lora_fx.passes.insert import Insert
from tests.passes.test_rows import captured, run
from tests.passes.test_variants import TOL, by_hand, explicit, started, trained
from tests.table import ROWS, Row

EXPLICIT = 2e-6


def of_row(row: Row) -> tuple[Any, Any, dict[str, LowRank], dict[str, LowRank], np.ndarray]:
    """The input, the capture, DoRA's updates, the same evaluated, and the outputs by hand."""
    _, x, cap = captured(row)
    graph = cap.fx_graph()
    found, start = started(cap, "dora", "kaiming")
    dora = {key: trained(key, low) for key, low in start.items()}
    read = {key: matrix(found[key], graph.read(found[key].parameter.name)) for key in dora}
    served = {key: evaluated(low, read[key], key) for key, low in dora.items()}
    new = {}
    for key, low in dora.items():
        t = found[key]
        new[key] = (t, by_hand(row, t, low, graph.read(t.parameter.name)))
    return x, cap, dora, served, explicit(row, x, new)


def outputs(row: Row, step: Any) -> np.ndarray:
    model, x, cap = captured(row)
    graph = cap.fx_graph(root=type(model)(row))
    assert step(graph).modified
    if isinstance(step, Insert):
        assert not step(graph).modified, "a second run changes nothing"
    return run(graph, graph.root, x)


@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)
def test_branch_fold_and_hand(row: Row) -> None:
    _, cap, _, served, want = of_row(row)
    base = run(cap.fx_graph(), cap.fx_graph().root, captured(row)[1])
    live = not set(row.dead) & set(served)
    if live:
        assert 0.05 < rel(want, base) < 5, "an effect that is seen"
    for step in (Insert(served), Insert(served, weight_form=True), Fold(served)):
        assert rel(outputs(row, step), want) < TOL


MUTATIONS = {
    "d is dropped": lambda low: replace(
        low, variant_tensors={GAINS: np.zeros_like(low.variant_tensors[GAINS])}
    ),
    "g in b is dropped": lambda low: replace(
        low, b=low.b / (1 + low.variant_tensors[GAINS][..., None])
    ),
    "d of other rows": lambda low: replace(
        low, variant_tensors={GAINS: np.roll(low.variant_tensors[GAINS], 1, axis=-1)}
    ),
    "twice as strong": lambda low: scaled_gains(low, 2.0),
}


@pytest.mark.parametrize("name", MUTATIONS)
@pytest.mark.parametrize("row", [r for r in ROWS if not r.dead], ids=lambda r: r.name)
def test_a_wrong_factor_is_seen(row: Row, name: str) -> None:
    _, _, _, served, want = of_row(row)
    wrong = {key: MUTATIONS[name](low) for key, low in served.items()}
    for step in (Insert(wrong), Fold(wrong)):
        assert rel(outputs(row, step), want) > 1e-3


def test_a_weight_multiplies_the_whole_change() -> None:
    row = ROWS[0]
    _, cap, _, served, want = of_row(row)
    base = run(cap.fx_graph(), cap.fx_graph().root, captured(row)[1])
    half = Adapter(served).weighted(0.5).lowrank
    assert rel(outputs(row, Insert(half)), (base + want) / 2) < TOL


def test_updates_of_parts_take_the_output_form() -> None:
    """Rows of one weight, some with factors and some without, at one use."""
    net = nn.Sequential(nn.Linear(8, 12))
    x = torch.randn(3, 8)
    module = lora_fx.insert(net, (x,), rank=2, include="0.weight", variant="dora")
    low = module.adapter().lowrank["0.weight"]
    rng = np.random.default_rng(0)
    low = replace(low, b=0.3 * rng.standard_normal(low.b.shape, np.float32))
    whole = evaluated(low, net[0].weight.detach().double().numpy(), "w")
    variant = variant_of(whole)
    upper = variant.rows(whole, slice(0, 5))
    lower = replace(variant.rows(whole, slice(5, 12)), variant_tensors={})
    cap = lora_fx.capture(net, (x,))
    graph = cap.fx_graph()
    targets = {"0.weight[0:5]": upper, "0.weight[5:12]": lower}
    updates = {key: replace(u, layout=find(graph)[key].layout) for key, u in targets.items()}
    Insert(updates)(graph)
    forms = [node for node in graph.graph.nodes if "linear" in str(node.target)]
    assert len(forms) == 1 and forms[0].args[1].op == "get_attr", "W itself is read"
    w = net[0].weight.detach().double().numpy()
    new = w + low.scale * (whole.b.astype(np.float64) @ whole.a)
    new[:5] += whole.variant_tensors[GAINS][:5, None] * w[:5]
    want = x.double().numpy() @ new.T + net[0].bias.detach().double().numpy()
    assert rel(run(graph, graph.root, x), want) < EXPLICIT


class Layers(nn.Module):
    """A linear with a bias, a lookup and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 8)
        self.fc = nn.Linear(8, 6)
        self.conv = nn.Conv1d(6, 5, 3, padding=1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.fc(self.table(ids)))
        return self.conv(y.transpose(1, 2))


IDS = torch.randint(0, 9, (2, 7), generator=torch.Generator().manual_seed(0))


def dora_of(net: nn.Module) -> Adapter:
    module = lora_fx.insert(net, (IDS,), rank=3, variant="dora", include="*")
    rng = np.random.default_rng(0)
    entries = {}
    for key, low in module.adapter().lowrank.items():
        assert low.magnitude is not None
        b = 0.4 * rng.standard_normal(low.b.shape, np.float32)
        sizes = low.magnitude * rng.uniform(0.7, 1.4, low.magnitude.shape).astype(np.float32)
        entries[key] = replace(low, b=b, magnitude=sizes)
    return Adapter(entries)


def shown(path: Path, key: str) -> list[str]:
    """The nodes from D of a key on, as `op(inputs)`, in the order of the file."""
    names = {f"{key}.lora_A", f"{key}.lora_B", f"{key}.lora_D"}
    lines = []
    for node in onnx.load(path).graph.node:
        if names & {*node.input}:
            lines.append(f"{node.op_type}({', '.join(node.input)})")
            names.update(node.output)
    return [line for line in lines if ".lora_" in line]


def test_the_slots_of_a_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Layers().eval()
    adapter = dora_of(net)
    lora_fx.export(net, tmp_path / "m.onnx", (IDS,), adapters={"de": adapter}, mode="switch")
    lines = shown(tmp_path / "m.onnx", "fc.weight")
    assert [line.partition("(")[0] for line in lines] == ["MatMul", "Gemm", "Mul"]
    model = onnx.load(tmp_path / "m.onnx")
    inputs = {value.name: value for value in model.graph.input}
    sizes = [d.dim_value for d in inputs["conv.weight.lora_D"].type.tensor_type.shape.dim]
    assert sizes == [5]

    plain = Adapter({key: replace(low, magnitude=None) for key, low in adapter.lowrank.items()})
    lora_fx.export(net, tmp_path / "p.onnx", (IDS,), adapters={"fr": plain}, mode="switch")
    assert not [v.name for v in onnx.load(tmp_path / "p.onnx").graph.input if "_D" in v.name]


def test_another_base_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Layers().eval()
    adapters = {"de": dora_of(net)}
    for ending, target in ((".onnx_adapter", "cpu"), (".safetensors", "portable")):
        folder = tmp_path / target
        folder.mkdir()
        mine = folder / "m.onnx"
        lora_fx.export(net, mine, (IDS,), adapters=adapters, mode="switch", target=target)
        other = Layers().eval()
        other.load_state_dict(net.state_dict())
        with torch.no_grad():
            other.fc.weight[0, 0] += 1e-4
        theirs = {"fr": adapters["de"]}
        lora_fx.export(
            other, folder / "o.onnx", (IDS,), adapters=theirs, mode="switch", target=target
        )
        session = Session(folder / "o.onnx")
        with pytest.raises(LoraFxError, match="computed from another base") as caught:
            session.load("de", folder / f"de{ending}")
        assert "lora-fx convert ADAPTER" in caught.value.hint
        read = lora_fx.load_adapter(folder / f"de{ending}")
        with pytest.raises(LoraFxError, match="computed from another base"):
            session.load("de", read)
        Session(mine).load("de", read)


def test_a_session_evaluates_on_its_own_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Layers().eval()
    adapter = dora_of(net)
    path = tmp_path / "m.onnx"
    lora_fx.export(net, path, (IDS,), mode=lora_fx.Switch(variant="dora", include="*"))
    session = Session(path)
    session.load("de", adapter)
    feeds = {session.session.get_inputs()[0].name: IDS.numpy()}
    (got,) = session.run(feeds, adapter="de").values()
    want = lora_fx.fold(net, (IDS,), adapter=adapter)(IDS).detach().numpy()
    assert rel(got, want) < EXPLICIT
    base = net(IDS).detach().numpy()
    (mixed,) = session.run(feeds, adapter={"de": 0.5}).values()
    assert rel(mixed, base) > 0.05

    plain = tmp_path / "plain.onnx"
    lora_fx.export(net, plain, (IDS,), mode=lora_fx.Switch(include="*"))
    with pytest.raises(LoraFxError, match="takes plain LoRA") as caught:
        Session(plain).load("de", adapter)
    assert "--variant dora" in caught.value.hint and "--as lora" in caught.value.hint


def test_numbers_of_bases() -> None:
    w = np.arange(12.0).reshape(3, 4)
    assert weight_hash(w) == weight_hash(w.astype(np.float32))
    assert weight_hash(w) != weight_hash(w.reshape(4, 3))
    hashes = {"u": weight_hash(w), "v": weight_hash(w + 1)}
    assert base_number(hashes, []) == 1
    numbers = {base_number(hashes, keys) for keys in (["u"], ["v"], ["u", "v"])}
    assert len(numbers) == 3 and all(1 < n < 2**31 for n in numbers)


def test_what_cannot_be_evaluated() -> None:
    low = LowRank(np.ones((2, 4), np.float32), np.zeros((3, 2), np.float32), 2.0)
    low = replace(low, magnitude=np.ones(3, np.float32))
    with pytest.raises(LoraFxError, match="row of W \\+ ΔW is zero"):
        evaluated(low, np.zeros((3, 4)), "w")
    with pytest.raises(MisfitError, match=r"\[3, 4\]; the weight is \[4, 4\]"):
        evaluated(low, np.ones((4, 4)), "w")
    plain = Adapter({"w": replace(low, magnitude=None)})
    assert Evaluation(lambda key: np.ones((3, 4)))(plain) is plain
